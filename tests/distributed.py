"""Run a function in several gloo processes on loopback."""

import socket

import torch
from torch import distributed, multiprocessing


def run_processes(function, world, *arguments):
    """Call `function(rank, world, *arguments)` in `world` spawned processes; raises what any of them raised."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(_enter, (function, world, port, arguments), nprocs=world, join=True)


def _enter(rank, function, world, port, arguments):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    try:
        function(rank, world, *arguments)
    finally:
        distributed.destroy_process_group()
