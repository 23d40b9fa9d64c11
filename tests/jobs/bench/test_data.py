"""The data benchmark's parts at a tiny size: the files, the peers' pixels, the windows, the sums of memory."""

import dataclasses
import multiprocessing
import os

import numpy as np
import pytest
from PIL import Image

from jobs.bench import data, data_media, data_peers
from jobs.bench.data_memory import PeakMemory, tree_bytes
from jobs.bench.data_peers import VIDEO_READS, TimedWindow
from pipelines.data.media.samples import SampleDecoder
from tests.memory_holders import hold_in_child

TINY = data.DataCase(
    batch_size=2,
    rounds=1,
    jpegs=2,
    jpeg_size=(640, 480),
    jpeg_bytes=40_000,
    images=TimedWindow(warm_up=1, timed=1, tail=1),
)


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    return data_media.write_jpegs(tmp_path_factory.mktemp("media") / "jpegs", 2, TINY.jpeg_size, TINY.jpeg_bytes)


def test_jpegs_have_the_size_that_was_asked_for(jpegs):
    for path in jpegs:
        assert Image.open(path).size == TINY.jpeg_size
        assert 0.8 < os.path.getsize(path) / TINY.jpeg_bytes < 1.25


def test_pictures_are_there_without_photographs():
    picture = np.asarray(data_media.picture([], 1, (320, 180)))
    assert picture.shape == (180, 320, 3) and 20 < picture.std() < 90


@pytest.mark.parametrize("gop", [30, 250])
def test_every_peer_reads_the_frames_that_ours_reads(tmp_path, gop):
    import av

    (path,) = data_media.write_clips(tmp_path / "clips", 1, gop, 60)
    with av.open(path) as container:
        keys = [packet.is_keyframe for packet in container.demux(video=0) if packet.size]
    assert len(keys) == 60 and sum(keys) == (2 if gop == 30 else 1)
    decoder = SampleDecoder(data.DECODE)
    ours = decoder.decode(kind="video", media=path).pixels
    decoder.close()
    assert ours.shape == (8, 3, 224, 224)
    # The picture pans: another frame would differ by far more than another scaler.
    assert np.abs(np.diff(ours.astype(np.int16), axis=0)).mean() > 2 * data.MAX_CLIP_LEVELS
    read = {name: data_peers._read_or_error(reader, path) for name, reader in VIDEO_READS.items()}
    assert {"decord", "pyav", "pyav seek"} <= {name for name, found in read.items() if not isinstance(found, str)}
    for name, found in read.items():
        if not isinstance(found, str):
            assert np.abs(found.astype(np.int16) - ours).mean() < data.MAX_CLIP_LEVELS, name


def test_images_are_measured_side_by_side(ray_local, jpegs, capsys):
    seconds = {}
    with data_peers.peer() as other:
        ratio = data._images(TINY, jpegs, other, seconds)
        assert "No such file" in other.read(data_peers.read_image, "/nowhere.jpg")
    assert ratio > 0 and set(seconds) == {"images, batch, ours", "images, batch, dataloader"}
    assert "mean pixel difference" in capsys.readouterr().out


@pytest.mark.slow
def test_ours_reads_as_training_does(ray_local, jpegs):
    steps = [batch.step for batch in data.our_batches(jpegs * 5, "image", 2, segment_steps=2)]
    assert steps == list(range(5))


def test_memory_is_measured_over_several_segments_at_both_sizes():
    case = data.DataCase()
    assert case.memory_images[0] / case.batch_size / case.memory_segment_steps > 1


def test_rays_own_readers_are_measured(ray_local, jpegs, tmp_path):
    clips = data_media.write_clips(tmp_path / "clips", 1, 30, 10)
    seconds = {}
    data._ray_readers(dataclasses.replace(TINY, ray_images=4, ray_clips=2), jpegs, clips, seconds)
    assert set(seconds) == {"images, batch, ray read_images", "clips, batch, ray read_videos"}
    assert min(seconds.values()) > 0


def test_a_window_is_the_time_between_its_batches():
    clock = iter([0.0, 10.0, 11.0, 13.0, 99.0])
    window = TimedWindow(warm_up=2, timed=2, tail=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_peers.time, "perf_counter", lambda: next(clock))
        assert window.seconds_per_batch(range(5)) == 1.5
    with pytest.raises(AssertionError, match="4 batches, not 5"):
        window.seconds_per_batch(range(4))


def test_memory_counts_children():
    # A tree of its own: other tests' processes may end under this one meanwhile.
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    size = 200 * 2**20
    parent = context.Process(target=hold_in_child, args=(size, ready, done))
    parent.start()
    memory, before = PeakMemory(parent.pid), tree_bytes(parent.pid)
    with memory.watch():
        ready.wait()
        during = tree_bytes(parent.pid)
    done.set()
    parent.join()
    assert parent.exitcode == 0 and during - before > size and memory.num_bytes > size
