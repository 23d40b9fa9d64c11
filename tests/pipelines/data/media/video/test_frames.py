import concurrent.futures
import contextlib
import importlib.util
import os
import signal
import threading
import time

import av
import numpy as np
import pytest
from PIL import Image

from pipelines.data.failures import MediaError
from pipelines.data.media.clip import BACKEND_NAMES, ClipRequest
from pipelines.data.media.frame_sampling import Sampling
from pipelines.data.media.video import probe
from pipelines.data.media.video import pyav as video_pyav
from pipelines.data.media.video.backends import BACKENDS
from pipelines.data.media.video.frames import read_clip
from pipelines.data.media.video.pool import VideoPool
from pipelines.data.media.video.probe import open_container, probe_video
from pipelines.data.media.video.pyav import PyAVBackend
from pipelines.data.media.video.wire import receive, send
from tests.pipelines.data.builders import PREPROCESSING, jpeg, open_files, write_clip, write_moving_clip

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
    return _levels(read_clip(str(path), _request(**changes), [backend]).pixels)


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


def test_a_child_that_does_not_read_is_killed_at_the_deadline(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", [100] * 3)
    pool = VideoPool(timeout_s=1.5, memory_bytes=4 * GIB)
    try:
        pool.read_clip(_request(), path=str(path))
        os.kill(pool.child_pids()[0], signal.SIGSTOP)
        start_s = time.monotonic()
        with pytest.raises(MediaError) as caught:
            pool.read_clip(_request(), data=path.read_bytes() + bytes(4 * 1024**2))  # more than a pipe holds
        assert caught.value.error_class == "timeout" and 1.4 < time.monotonic() - start_s < 3
        assert pool.child_pids() == []
        assert pool.read_clip(_request(), path=str(path)).pixels.shape == (4, 3, 32, 32)
    finally:
        pool.close()


def test_a_message_larger_than_a_pipe_passes_whole_and_half_of_one_is_late():
    far, near = (os.fdopen(end, mode, 0) for end, mode in zip(os.pipe(), ("rb", "wb"), strict=True))
    os.set_blocking(near.fileno(), False)
    payload = np.random.default_rng(0).bytes(3 * 1024**2)
    with far, near, concurrent.futures.ThreadPoolExecutor(1) as thread:
        reading = thread.submit(receive, far)
        send(near, {"task": "clip"}, payload[:5], payload[5:], deadline_s=time.monotonic() + 20)
        assert reading.result(20) == ({"task": "clip"}, payload)
        near.write(b"half")
        with pytest.raises(TimeoutError):
            receive(far, time.monotonic() + 0.1)
        near.close()
        assert receive(far) is None


def test_a_dead_child_is_replaced(tmp_path, pool):
    path = str(write_clip(tmp_path / "clip.mp4", [100] * 3))
    pool.read_clip(_request(), path=path)
    first = pool.child_pids()
    os.kill(first[0], 9)
    assert pool.read_clip(_request(), path=path).pixels.shape == (4, 3, 32, 32)
    assert pool.child_pids() != first


@contextlib.contextmanager
def _killed(pool, number, is_due=lambda pid: True, most=99):
    """Send a signal to every child for which `is_due`, up to so many; yields the list of their pids."""
    victims, is_done = [], threading.Event()

    def kill_children():
        while not is_done.wait(0.001):
            for pid in pool.child_pids():
                if pid not in victims and len(victims) < most and is_due(pid):
                    victims.append(pid)
                    os.kill(pid, number)
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGCONT)

    killer = threading.Thread(target=kill_children)
    killer.start()
    try:
        yield victims
    finally:
        is_done.set()
        killer.join()


def _has_open(path):
    """Whether a child is at work on the file: it holds it open, and is stopped so that it still does when it dies."""

    def is_due(pid):
        if path not in open_files(pid):
            return False
        os.kill(pid, signal.SIGSTOP)
        if path in open_files(pid):
            return True
        os.kill(pid, signal.SIGCONT)
        return False

    return is_due


@pytest.mark.parametrize(("name", "codec"), [("a.gif", "gif"), ("a.avi", "mpeg4"), ("a.mp4", "mpeg4")])
def test_a_healthy_clip_whose_decoders_are_killed_is_used(tmp_path, pool, name, codec):
    """Somebody else's SIGKILL says nothing of the file; GIF and AVI have no backend but the first."""
    path = str(write_moving_clip(tmp_path / name, codec))
    request = _request(num_frames=8)
    with _killed(pool, signal.SIGKILL, _has_open(path), most=3) as victims:
        clip = pool.read_clip(request, path=path)
    assert len(victims) == 3
    assert np.array_equal(clip.pixels, pool.read_clip(request, path=path).pixels) and clip.pixels.std() > 10


@pytest.mark.parametrize(("name", "codec"), [("a.gif", "gif"), ("a.mp4", "mpeg4")])
def test_one_crash_costs_no_clip_its_only_backend(tmp_path, pool, name, codec):
    path = str(write_moving_clip(tmp_path / name, codec))
    with _killed(pool, signal.SIGSEGV, _has_open(path), most=1) as victims:
        assert pool.read_clip(_request(), path=path).pixels.shape == (4, 3, 32, 32)
    assert len(victims) == 1


@pytest.mark.parametrize(
    ("number", "error_class", "tries"),
    [(signal.SIGSEGV, "corrupt", 2), (signal.SIGABRT, "corrupt", 2), (9, "transient", 5)],
)
def test_what_ends_every_decoder(tmp_path, pool, number, error_class, tries):
    """Decoders that crash on a file say that it is corrupt; those that somebody kills do not."""
    fifo = str(tmp_path / "fifo.mp4")
    os.mkfifo(fifo)
    begun_s = {}

    def is_due(pid):
        return time.monotonic() > begun_s.setdefault(pid, time.monotonic()) + 0.3

    with _killed(pool, number, is_due), pytest.raises(MediaError) as caught:
        pool.read_clip(_request(), path=fifo)
    assert (caught.value.error_class, caught.value.tries) == (error_class, tries)
    good = write_clip(tmp_path / "clip.mp4", [100] * 3)
    assert pool.read_clip(_request(), path=str(good)).pixels.shape == (4, 3, 32, 32)


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


def test_memory_beyond_the_ceiling_is_too_large(tmp_path):
    """The limit is the child's own, so that no file can take the machine's memory."""
    pool = VideoPool(timeout_s=20, memory_bytes=700 * 1024**2)
    try:
        path = write_clip(tmp_path / "clip.mp4", [100] * 3)
        with pytest.raises(MediaError) as caught:
            pool.read_clip(_request(preprocessing=_huge()), path=str(path))
        assert caught.value.error_class == "too_large"
        assert pool.read_clip(_request(), path=str(path)).pixels.shape == (4, 3, 32, 32)
    finally:
        pool.close()


def test_a_picture_renamed_is_no_video(tmp_path):
    """Decoders would show it as a clip of one frame."""
    (tmp_path / "a.mp4").write_bytes(jpeg())
    (tmp_path / "b.mp4").write_bytes(b"just some text\n" * 50)
    for name in ("a.mp4", "b.mp4"):
        with pytest.raises(MediaError) as caught:
            read_clip(str(tmp_path / name), _request())
        assert caught.value.error_class == "unsupported"


def test_a_cut_file_is_corrupt(tmp_path):
    content = write_clip(tmp_path / "clip.mp4", [20 * i for i in range(12)]).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) // 2])
    with pytest.raises(MediaError) as caught:
        read_clip(str(tmp_path / "cut.mp4"), _request())
    assert caught.value.error_class == "corrupt"


def test_damage_is_not_decoded_silently(tmp_path):
    """Packets of zeroes: other decoders repeat a frame for each, without a word."""
    path = write_clip(tmp_path / "clip.mp4", [(7 * i) % 250 for i in range(60)])
    content = bytearray(path.read_bytes())
    begin = content.index(b"mdat") + 4
    size = int.from_bytes(content[begin - 8 : begin - 4], "big") - 8
    content[begin + size // 4 : begin + 3 * size // 4] = bytes(3 * size // 4 - size // 4)
    path.write_bytes(content)
    with pytest.raises(MediaError) as caught:
        read_clip(str(path), _request(num_frames=8))
    assert caught.value.error_class == "corrupt"


def test_videos_that_last_too_long_are_distinguished(tmp_path):
    ten_days = 10 * 24 * 3600 * 10
    path = str(write_clip(tmp_path / "clip.mkv", [10, 20, 30], [0, 1, ten_days]))
    for changes, limit_s in (({}, 7 * 86_400), ({"max_duration_s": 60.0}, 60)):
        with pytest.raises(MediaError, match=f"864000 s exceed the limit of {limit_s} s") as caught:
            read_clip(path, _request(**changes))
        assert caught.value.error_class == "too_large"
    assert len(read_clip(path, _request(max_duration_s=1e6)).pixels) == 4


def test_a_long_video_is_not_decoded_whole(tmp_path):
    """Ten hours, a frame every ten seconds, a key frame every twenty frames: a few groups are decoded."""
    path, count = tmp_path / "long.mp4", 3600
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "1", "g": "20", "preset": "ultrafast"}
        for index in range(count):
            level = index * 250 // count
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), level, dtype=np.uint8), format="rgb24")
            frame.pts = 10 * index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    found = probe_video(str(path), 10**6)
    assert found.duration_s == 36_000
    decoded = _levels(read_clip(str(path), _request()).pixels)
    assert decoded == pytest.approx([31, 93, 156, 218], abs=LEVEL_TOLERANCE)
    with open_container(str(path)) as container:
        cursor = video_pyav._Cursor(container, found)
        cursor.jump(int(found.starts[1800]), is_far=True)
        assert video_pyav._time_of(cursor.at(int(found.starts[1805]))) == found.starts[1805]
        assert cursor.num_packets < 40


def test_large_files_are_probed_by_their_index(tmp_path, monkeypatch):
    levels = [(7 * i) % 250 for i in range(400)]
    path = write_clip(tmp_path / "large.mp4", levels)
    exact = probe_video(str(path), 10**6)
    monkeypatch.setattr(probe, "_INDEXED_BYTES", 0)
    indexed = probe_video(str(path), 10**6)
    assert exact.is_exact and not indexed.is_exact
    assert indexed.starts_s.tolist() == exact.starts_s.tolist()
    assert _shown(path, "pyav") == pytest.approx([levels[i] for i in (50, 150, 250, 350)], abs=LEVEL_TOLERANCE)


@pytest.mark.parametrize("backend", ["decord", "torchcodec"])
def test_the_others_are_asked_about_containers_with_an_index_only(tmp_path, monkeypatch, backend):
    """Both were measured to show wrong frames, without a word, from containers without one."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)  # as if it were installed
    found = {
        name: probe_video(str(write_clip(tmp_path / f"a.{name}", [9] * 12)), 10**6) for name in ("mp4", "mkv", "ts")
    }
    assert all(one.is_exact for one in found.values())
    assert [name for name, one in found.items() if BACKENDS[backend].supports(one)] == ["mp4", "mkv"]


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mp4", "libx264"), ("a.mkv", "libx265"), ("a.webm", "libvpx"), ("a.mp4", "mpeg4"), ("a.mpg", "mpeg2video")],
)
def test_leaving_frames_out_changes_none(tmp_path, name, codec):
    """The wanted frames are those of decoding everything, bit for bit, whatever refers to what."""
    path, rng = tmp_path / name, np.random.default_rng(0)
    picture = rng.integers(0, 255, (96, 96, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.options = {"g": "30", "bf": "3"} if codec != "libvpx" else {"g": "30"}
        for index in range(100):
            at = index % 32
            shown = np.ascontiguousarray(picture[at : at + 64, 32 - at : 96 - at])
            frame = av.VideoFrame.from_ndarray(shown, format="rgb24")
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with av.open(str(path)) as container:
        whole = {frame.pts: frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)}
    found = probe_video(str(path), 10**6)
    wanted = np.array([0, 1, 7, 17, 29, 30, 33, 58, 71, 99])
    picked = dict(PyAVBackend().frames_at(str(path), found, wanted, None, "bilinear"))
    assert sorted(picked) == wanted.tolist()
    if found.is_exact:  # else all is decoded
        assert [index for index, _ in video_pyav._exact_frames(str(path), found, wanted)] == wanted.tolist()
    for index, frame in picked.items():
        assert np.array_equal(frame, whole[int(found.starts[index])])


def test_the_next_backend_is_tried(tmp_path, monkeypatch):
    """One that cannot be used makes place for the next; a verdict on the file is final."""
    path = str(write_clip(tmp_path / "clip.mp4", [100] * 3))

    class Broken(PyAVBackend):
        name = "broken"
        error: Exception = RuntimeError("no FFmpeg")

        def frames_at(self, *arguments):
            raise self.error

    monkeypatch.setitem(BACKENDS, "broken", Broken())
    assert _levels(read_clip(path, _request(), ["broken", "pyav"]).pixels) == pytest.approx([100] * 4, abs=4)
    with pytest.raises(MediaError, match="broken: RuntimeError no FFmpeg"):
        read_clip(path, _request(), ["broken"])
    monkeypatch.setattr(Broken, "error", MediaError("corrupt", "damaged"))
    with pytest.raises(MediaError, match="damaged"):
        read_clip(path, _request(), ["broken", "pyav"])


def test_all_backends_are_there():
    assert tuple(BACKENDS) == BACKEND_NAMES


def test_key_frames_and_random_segments_of_a_file(tmp_path):
    path = str(write_clip(tmp_path / "clip.mp4", [10 * i for i in range(20)]))
    keys = read_clip(path, _request(num_frames=6, sampling=Sampling(strategy="key_frames")))
    assert _levels(keys.pixels) == pytest.approx([0, 50, 100, 150, 150, 150], abs=LEVEL_TOLERANCE)
    assert keys.frame_valid.tolist() == [True] * 4 + [False] * 2
    draws = [read_clip(path, _request(sampling=Sampling(strategy="random_segment"), seed=seed)) for seed in (1, 1, 2)]
    assert np.array_equal(draws[0].pixels, draws[1].pixels) and not np.array_equal(draws[0].pixels, draws[2].pixels)


def test_facts(tmp_path, pool):
    path = str(write_clip(tmp_path / "clip.mp4", [10 * i for i in range(20)]))
    assert pool.read_clip(_request(), path=path).facts is None
    facts = pool.read_clip(_request(wants_facts=True), path=path).facts
    assert (facts.codec, facts.width, facts.height, facts.num_frames) == ("h264", 64, 64, 20)
    assert facts.duration_s == pytest.approx(2.0) and facts.fps == pytest.approx(10.0)
    assert (facts.rotation_deg, facts.has_audio) == (0, False)
