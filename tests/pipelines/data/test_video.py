import importlib.util
import os
import threading
import time

import numpy as np
import pytest
from PIL import Image

from pipelines.data.clip import ClipRequest
from pipelines.data.media import MediaError
from pipelines.data.video import read_clip
from pipelines.data.video_backends import BACKENDS
from pipelines.data.video_pool import VideoPool
from tests.pipelines.data.builders import PREPROCESSING, write_clip

GIB = 1024**3
LEVEL_TOLERANCE = 4
"""H.264 at crf 1 and the way through YUV; worst measured 2."""
MEAN_TOLERANCE = 4.0
"""Levels; worst measured 3.8, on an odd size whose middle column belongs to no quadrant. 10-bit and HDR get three times
that, for their conversion to 8 bits is a matter of taste."""


INSTALLED = [name for name in ("pyav", "decord") if importlib.util.find_spec(name.removeprefix("py"))]
"""Torchcodec loads torch and wants an FFmpeg of its own; its test is apart."""


def _request(**changes) -> ClipRequest:
    return ClipRequest(**{"preprocessing": PREPROCESSING, "num_frames": 4, "max_pixels": 10**8, **changes})


def _levels(clip_TCHW) -> list[float]:
    return clip_TCHW.mean(axis=(1, 2, 3)).tolist()


def _shown(path, backend, **changes) -> list[float]:
    return _levels(read_clip(str(path), _request(**changes), _others(backend)).pixels)


def _others(backend):
    return [other.name for other in BACKENDS if other.name != backend]


@pytest.fixture
def pool():
    made = VideoPool(timeout_s=20, memory_bytes=4 * GIB)
    yield made
    made.close()


@pytest.mark.parametrize("backend", INSTALLED)
def test_frames_are_segment_centres(tmp_path, backend):
    path = write_clip(tmp_path / "clip.mp4", [20 * i for i in range(12)])
    assert _shown(path, backend) == pytest.approx([20, 80, 140, 200], abs=LEVEL_TOLERANCE)
    assert _shown(path, backend, num_frames=1) == pytest.approx([120], abs=LEVEL_TOLERANCE)


@pytest.mark.parametrize("backend", INSTALLED)
def test_frames_are_chosen_by_time_not_by_index(tmp_path, backend):
    """Five quick frames, then three that each stay for a second."""
    path = write_clip(tmp_path / "vfr.mkv", [10, 30, 50, 70, 90, 150, 190, 230], [0, 1, 2, 3, 4, 10, 20, 30])
    assert _shown(path, backend, num_frames=3) == pytest.approx([90, 150, 190], abs=LEVEL_TOLERANCE)


@pytest.mark.parametrize("backend", INSTALLED)
def test_a_part_of_a_clip(tmp_path, backend):
    path = write_clip(tmp_path / "clip.mp4", [10 * i for i in range(20)])
    part = _shown(path, backend, num_frames=2, start_s=1.0, end_s=1.4)
    assert part == pytest.approx([110, 130], abs=LEVEL_TOLERANCE)
    beyond = _shown(path, backend, num_frames=1, start_s=1.0, end_s=99.0)
    assert beyond == pytest.approx([150], abs=LEVEL_TOLERANCE)
    with pytest.raises(MediaError, match="start_s=5"):
        read_clip(str(path), _request(start_s=5.0))


def test_far_frames_are_sought(tmp_path):
    path = write_clip(tmp_path / "long.mp4", [(7 * i) % 250 for i in range(400)])
    assert _shown(path, "pyav") == pytest.approx([(7 * i) % 250 for i in (50, 150, 250, 350)], abs=LEVEL_TOLERANCE)


def test_one_frame_is_repeated(tmp_path):
    assert _shown(write_clip(tmp_path / "one.mp4", [77]), "pyav") == pytest.approx([77] * 4, abs=LEVEL_TOLERANCE)


def test_a_gif_is_a_clip(tmp_path):
    frames = [Image.new("RGB", (40, 30), (level, level, level)) for level in (0, 80, 160, 240)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100)
    assert _shown(tmp_path / "a.gif", "pyav") == pytest.approx([0, 80, 160, 240], abs=LEVEL_TOLERANCE)


@pytest.mark.parametrize("name", ["-dash.mp4", "with space and é.mp4", "percent%03d.mp4", "a:b.mp4"])
def test_odd_names(tmp_path, pool, name):
    path = write_clip(tmp_path / name, [100] * 3)
    assert pool.read_clip(_request(), path=str(path)).pixels.shape == (4, 3, 32, 32)


def test_a_playlist_opens_no_other_file(tmp_path, pool):
    """Containers that name other files would let a stranger's upload read this machine's."""
    write_clip(tmp_path / "secret.mp4", [100] * 3)
    for text in ("#EXTM3U\n#EXTINF:1,\nsecret.mp4\n#EXT-X-ENDLIST\n", "ffconcat version 1.0\nfile secret.mp4\n"):
        (tmp_path / "list.mp4").write_text(text)
        with pytest.raises(MediaError):
            pool.read_clip(_request(), path=str(tmp_path / "list.mp4"))


def test_bytes_decode_as_files_do(tmp_path, pool):
    path = write_clip(tmp_path / "clip.mp4", [20 * i for i in range(12)])
    from_path, from_bytes = (
        pool.read_clip(_request(), path=str(path)),
        pool.read_clip(_request(), data=path.read_bytes()),
    )
    assert np.array_equal(from_path.pixels, from_bytes.pixels)


def test_a_hanging_child_is_killed_at_the_deadline(tmp_path):
    os.mkfifo(tmp_path / "fifo.mp4")  # opening it waits for a writer that never comes
    pool = VideoPool(timeout_s=1.5, memory_bytes=4 * GIB)
    try:
        start_s = time.monotonic()
        with pytest.raises(MediaError) as caught:
            pool.read_clip(_request(), path=str(tmp_path / "fifo.mp4"))
        assert caught.value.error_class == "timeout"
        assert time.monotonic() - start_s < 3.2  # before the child's own alarm at 3.5
        assert pool.child_pids() == []
    finally:
        pool.close()


def test_a_dead_child_is_replaced(tmp_path, pool):
    path = str(write_clip(tmp_path / "clip.mp4", [100] * 3))
    pool.read_clip(_request(), path=path)
    first = pool.child_pids()
    os.kill(first[0], 9)
    assert pool.read_clip(_request(), path=path).pixels.shape == (4, 3, 32, 32)
    assert pool.child_pids() != first


def test_a_file_that_kills_every_decoder_is_corrupt(tmp_path, pool):
    """A child is killed while it reads, twice, as a crashing decoder would die."""
    os.mkfifo(tmp_path / "fifo.mp4")
    is_done = threading.Event()

    def kill_children():
        while not is_done.wait(0.3):
            for pid in pool.child_pids():
                os.kill(pid, 9)

    killer = threading.Thread(target=kill_children)
    killer.start()
    try:
        with pytest.raises(MediaError) as caught:
            pool.read_clip(_request(), path=str(tmp_path / "fifo.mp4"))
    finally:
        is_done.set()
        killer.join()
    assert (caught.value.error_class, caught.value.tries) == ("corrupt", 2)
    good = write_clip(tmp_path / "clip.mp4", [100] * 3)
    assert pool.read_clip(_request(), path=str(good)).pixels.shape == (4, 3, 32, 32)


def test_memory_is_limited(tmp_path):
    path = write_clip(tmp_path / "large.mp4", [100] * 3, size=2048)
    pool = VideoPool(timeout_s=20, memory_bytes=700 * 1024**2)
    try:
        pool.read_clip(_request(num_frames=1), path=str(write_clip(tmp_path / "small.mp4", [100])))
        with pytest.raises(MediaError):
            pool.read_clip(_request(preprocessing=_huge()), path=str(path))
    finally:
        pool.close()


def _huge():
    return type(PREPROCESSING).from_dict(
        {**PREPROCESSING.to_dict(), "height": 12000, "width": 12000, "resize_short_side": 12000}
    )


def test_frames_beyond_the_pixel_limit_are_too_large(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", [100] * 3)
    with pytest.raises(MediaError) as caught:
        read_clip(str(path), _request(max_pixels=64 * 64 - 1))
    assert caught.value.error_class == "too_large"


def test_children_see_no_credentials(tmp_path, pool, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    pool.read_clip(_request(), path=str(write_clip(tmp_path / "clip.mp4", [100])))
    (pid,) = pool.child_pids()
    with open(f"/proc/{pid}/environ", "rb") as file:
        assert b"AWS_SECRET" not in file.read()


def test_the_child_loads_neither_torch_nor_ray(tmp_path, pool):
    pool.read_clip(_request(), path=str(write_clip(tmp_path / "clip.mp4", [100])))
    (pid,) = pool.child_pids()
    with open(f"/proc/{pid}/maps") as file:
        mapped = file.read()
    assert "libtorch" not in mapped and "_raylet" not in mapped
