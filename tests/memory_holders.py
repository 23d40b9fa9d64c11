"""Processes that hold memory; they import nothing heavy, for each is started anew."""

import multiprocessing


def hold(num_bytes, ready, done):
    held = bytearray(b"\1") * num_bytes
    ready.set()
    done.wait()
    assert held[-1] == 1


def hold_in_child(num_bytes, ready, done):
    child = multiprocessing.get_context("spawn").Process(target=hold, args=(num_bytes, ready, done))
    child.start()
    child.join()
