"""What a process leaves behind that dies at a picture, and who finds it."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from pipelines.data.dataset import build_segment
from pipelines.data.media.crash_marker import CrashMarker
from pipelines.data.media.samples import SampleDecoder
from pipelines.data.media.transforms import Augmentation
from pipelines.data.order.global_batches import Order
from pipelines.data.order.mixture import Corpus, MixtureSource
from pipelines.data.order.row_index import TableRows
from tests.pipelines.data.builders import DECODE, encoded, image_manifest
from tests.pipelines.data.crashing_decoder import CRASHING_SIZE, crashing_settings, write_plugin

PROCESS = """
import os, sys
from pipelines.data.media.crash_marker import CrashMarker

mark = CrashMarker()
print(mark.follows_crash, flush=True)
with mark:
    at_work = input()
    if at_work == "die":
        os.kill(os.getpid(), 9)
if at_work == "close":
    mark.close()
os.kill(os.getpid(), 9)
"""


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
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


def test_a_crash_at_an_image_is_known_to_one_successor(tmp_path, own_folder):
    living, first = _start()
    dying, second = _start()
    assert not first and not second
    _end(dying, "die")
    successor, follows_crash = _start()
    assert follows_crash
    _end(successor, "die after it")
    last, follows_crash = _start()
    assert not follows_crash, "neither of the one before, which was done with its picture, nor of the one that lives"
    for process in (living, last):
        _end(process, "close")
    assert list(tmp_path.iterdir()) == []


def test_two_deaths_have_two_successors(own_folder):
    for process in [_start()[0] for _ in range(2)]:
        _end(process, "die")
    found = [_start() for _ in range(3)]
    assert [follows_crash for _, follows_crash in found] == [True, True, False]
    for process, _ in found:
        _end(process, "close")


def test_where_nothing_can_be_written_all_goes_on(monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/proc/nowhere")
    mark = CrashMarker()
    with mark:
        assert not mark.follows_crash
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


@pytest.mark.parametrize("num_crashing", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_images_that_crash_their_decoder_cost_their_rows_alone(tmp_path, ray_local, monkeypatch, num_crashing):
    """All in one block, more than an actor may be restarted for: after the first, images are decoded in children."""
    monkeypatch.setenv("QFORMER_DRIVER", str(os.getpid()))
    table = image_manifest(tmp_path, 8)
    for number in range(num_crashing):
        (tmp_path / f"{number}.jpg").write_bytes(encoded(Image.new("RGB", CRASHING_SIZE), "PNG"))
    corpus = Corpus([MixtureSource("", TableRows(table))])
    (stream,) = build_segment(
        Order(corpus.streams("proportional"), 0, 8),
        ray_local.put(corpus),
        first_step=0,
        end_step=2,
        world_size=1,
        source=crashing_settings(DECODE, write_plugin(tmp_path)),
        decode_workers=1,
    )
    for batch in stream:
        names = {failure.sample_id: (failure.error_class, failure.stage) for failure in batch.failures}
        assert names == {f"s{number}": ("corrupt", "decode") for number in range(num_crashing)}
        assert all("SIGSEGV" in failure.message for failure in batch.failures)
        assert batch.is_valid.sum() == 8 - num_crashing
        for row, name in enumerate(batch.sample_ids):
            level = batch.images[row, 0, 0].mean()
            assert not batch.is_valid[row] or abs(level - int(name[1:]) * 7 % 256) < 6
