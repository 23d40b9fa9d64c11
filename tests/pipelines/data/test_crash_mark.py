"""What a process leaves behind that dies at a picture, and who finds it."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from pipelines.data.crash_mark import CrashMark
from pipelines.data.samples import SampleDecoder
from pipelines.data.transforms import Augmentation
from tests.pipelines.data.builders import DECODE, encoded

PROCESS = """
import os, sys
from pipelines.data.crash_mark import CrashMark

mark = CrashMark()
print(mark.is_inherited, flush=True)
with mark:
    at_work = input()
    if at_work == "die":
        os.kill(os.getpid(), 9)
if at_work == "close":
    mark.close()
os.kill(os.getpid(), 9)
"""


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)


def _start():
    """A process at a picture, one of several with the same parent, and whether it is a dead one's successor."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROCESS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    return process, process.stdout.readline().strip() == "True"


def _end(process, how):
    process.communicate(how)
    assert process.returncode == -9


def test_a_death_at_a_picture_is_told_to_one_successor(tmp_path):
    living, first = _start()
    dying, second = _start()
    assert not first and not second
    _end(dying, "die")
    successor, is_told = _start()
    assert is_told
    _end(successor, "die after it")
    last, is_told = _start()
    assert not is_told, "neither of the one before, which was done with its picture, nor of the one that lives"
    for process in (living, last):
        _end(process, "close")
    assert list(tmp_path.iterdir()) == []


def test_two_deaths_have_two_successors():
    for process in [_start()[0] for _ in range(2)]:
        _end(process, "die")
    found = [_start() for _ in range(3)]
    assert [is_told for _, is_told in found] == [True, True, False]
    for process, _ in found:
        _end(process, "close")


def test_where_nothing_can_be_written_all_goes_on(monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/proc/nowhere")
    mark = CrashMark()
    with mark:
        assert not mark.is_inherited
    mark.close()


@pytest.mark.parametrize("seed", [None, 3])
def test_pictures_are_the_same_in_children(seed):
    rng = np.random.default_rng(0)
    data = encoded(Image.fromarray(rng.integers(0, 255, (90, 70, 3), dtype=np.uint8)), "JPEG")
    changes = {"augmentation": Augmentation(random_resized_crop=True, horizontal_flip=True)}
    settings = type(DECODE)(preprocessing=DECODE.preprocessing, **changes)
    decoders = [SampleDecoder(settings, isolates_images=isolates) for isolates in (False, True)]
    try:
        here, there = (decoder.decode(kind="image", data=data, seed=seed).pixels for decoder in decoders)
        checked = [decoder.check(kind="image", data=data).facts for decoder in decoders]
        assert decoders[0].videos.child_pids() == [] and len(decoders[1].videos.child_pids()) == 1
        assert np.array_equal(here, there) and checked[0] == checked[1]
        damaged = [decoder.check(kind="image", data=data[:300]).error.error_class for decoder in decoders]
        assert damaged == ["corrupt", "corrupt"]
    finally:
        for decoder in decoders:
            decoder.close()
