import dataclasses
import os
import struct
import subprocess
import sys
import time
import zlib

import av
import numpy as np
import pytest
from PIL import Image

from pipelines.data.batches.batch import unpack
from pipelines.data.batches.decode_rows import CheckRows, DecodeRows
from pipelines.data.batches.plan import evaluation_blocks
from pipelines.data.corpus.quarantine import require_readable
from pipelines.data.failures import Failure, MediaError
from pipelines.data.media.facts import content_hash
from pipelines.data.media.kinds import SNIFFED_BYTES, kind_of_name, sniff_kind
from pipelines.data.media.samples import DecodeSettings, Limits, SampleDecoder
from pipelines.data.media.transforms import Augmentation
from pipelines.data.order.row_index import TableRows
from tests.pipelines.data.builders import DECODE, PREPROCESSING, encoded, jpeg, limited_memory, manifest, write_clip


@pytest.fixture
def decoder():
    made = SampleDecoder(DECODE)
    yield made
    made.close()


def _error(decoder: SampleDecoder, **sample) -> MediaError:
    with pytest.raises(MediaError) as caught:
        decoder.decode(**sample)
    return caught.value


def test_images_and_clips_have_a_time_axis(decoder, tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg())
    clip = write_clip(tmp_path / "a.mp4", [100] * 6)
    assert decoder.decode(kind="image", media=str(tmp_path / "a.jpg")).pixels.shape == (1, 3, 32, 32)
    assert decoder.decode(kind="image", data=jpeg()).pixels.shape == (1, 3, 32, 32)
    assert decoder.decode(kind="video", media=str(clip)).pixels.shape == (4, 3, 32, 32)
    assert decoder.decode(kind="video", data=clip.read_bytes()).pixels.shape == (4, 3, 32, 32)


def test_a_remote_file_is_fetched(decoder):
    import fsspec

    with fsspec.open("memory://bucket/a.jpg", "wb") as file:
        file.write(jpeg())
    assert decoder.decode(kind="image", media="memory://bucket/a.jpg").pixels.shape == (1, 3, 32, 32)
    assert _error(decoder, kind="image", media="memory://bucket/b.jpg").error_class == "missing"


@pytest.mark.parametrize("kind", ["image", "video"])
def test_unreadable_files_are_classified(decoder, tmp_path, kind):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty").write_bytes(b"")
    cases = {"gone": "missing", "": "unsupported", "fifo": "unsupported", "empty": "corrupt"}
    found = {name: _error(decoder, kind=kind, media=str(tmp_path / name)) for name in cases}
    assert {name: error.error_class for name, error in found.items()} == cases
    assert found["gone"].stage == "read" and found["empty"].stage == "decode"


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("prefix", ["", "file://", "local://", "://"])
def test_no_other_name_of_a_local_file_avoids_the_check(decoder, tmp_path, kind, prefix):
    """Opening a pipe would wait for ever, a device never ends; so it must end at once, under all their names."""
    os.mkfifo(tmp_path / "fifo")
    for path in (f"{tmp_path}/fifo", "/dev/zero", f"{tmp_path}/fifo#offset=0&length=9"):
        assert _error(decoder, kind=kind, media=prefix + path).error_class == "unsupported"


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize(
    "media",
    [
        "simplecache::local://{}",
        "simplecache::file://{}",
        "filecache::memory://a::local://{}",
        "memory://a::file://{}",
        "zip://a.jpg::local://{}",
        "zip://{}",
        "tar://{}",
        "blockcache::file://{}#offset=0&length=9",
    ],
)
def test_file_systems_within_others_are_refused(decoder, tmp_path, kind, media):
    """A row that names one is wrong itself, and stops no run."""
    os.mkfifo(tmp_path / "fifo")
    error = _error(decoder, kind=kind, media=media.format(tmp_path / "fifo"))
    assert (error.error_class, error.stage) == ("config", "manifest")
    require_readable([Failure("s", media, error.stage, error.error_class, error.message)])


def test_a_local_file_may_be_named_in_other_ways(decoder, tmp_path):
    (tmp_path / "a::b.jpg").write_bytes(jpeg())
    for prefix in ("", "file://", "local://"):
        assert decoder.decode(kind="image", media=f"{prefix}{tmp_path}/a::b.jpg").pixels.shape == (1, 3, 32, 32)


def test_wrong_rows_are_config_errors(decoder):
    assert _error(decoder, kind="audio", media="a.wav").error_class == "config"
    assert _error(decoder, kind="image").error_class == "config"


@pytest.mark.parametrize("kind", ["image", "video"])
def test_large_files_are_not_read(tmp_path, kind):
    limits = Limits(max_bytes=100, max_video_bytes=200)
    decoder = SampleDecoder(DecodeSettings(preprocessing=PREPROCESSING, limits=limits))
    (tmp_path / "large").write_bytes(b"x" * (201 if kind == "video" else 101))
    assert _error(decoder, kind=kind, media=str(tmp_path / "large")).error_class == "too_large"
    assert _error(decoder, kind=kind, data=b"x" * 101).error_class == "too_large"
    member = f"{tmp_path}/large#offset=0&length=101"
    assert _error(decoder, kind=kind, media=member).error_class == "too_large"


def test_ten_hours_of_several_gigabytes_are_decoded(tmp_path):
    """With the default limits, in a few seconds: 7,200 frames of five seconds, and a hole as large as long sound."""
    path, count = tmp_path / "long.mp4", 7_200
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1, options={"crf": "1", "g": "50", "preset": "ultrafast"})
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for index in range(count):
            level = index * 250 // count
            frame = av.VideoFrame.from_ndarray(np.full((32, 32), level, dtype=np.uint8), format="gray")
            frame.pts = 5 * index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with open(path, "ab") as file:
        size_bytes = 5 * 1024**3
        file.write(struct.pack(">I4sQ", 1, b"free", size_bytes))
        file.truncate(file.tell() - 16 + size_bytes)  # a hole: it takes no disk
    decoder = SampleDecoder(dataclasses.replace(DECODE, num_frames=8))
    try:
        begun_s = time.perf_counter()
        clip = decoder.decode(kind="video", media=str(path))
        taken_s = time.perf_counter() - begun_s
        part = decoder.decode(kind="video", media=str(path), start_s=18_000.0, end_s=18_040.0)
    finally:
        decoder.close()
    shown = [int((index + 0.5) * count / 8) * 250 // count for index in range(8)]
    assert clip.pixels.mean(axis=(1, 2, 3)).tolist() == pytest.approx(shown, abs=4) and clip.frame_valid.all()
    assert part.pixels.mean(axis=(1, 2, 3)).tolist() == pytest.approx([125] * 8, abs=4) and part.frame_valid.all()
    assert taken_s < 10


@pytest.mark.parametrize("kind", ["image", "video"])
def test_augmentation_follows_its_seed(tmp_path, kind):
    settings = DecodeSettings(
        preprocessing=PREPROCESSING,
        num_frames=2,
        augmentation=Augmentation(random_resized_crop=True, horizontal_flip=True),
    )
    decoder = SampleDecoder(settings)
    ramp = np.tile(np.linspace(0, 255, 64, dtype=np.uint8)[None, :, None], (48, 1, 3))
    path = tmp_path / ("a.png" if kind == "image" else "a.gif")
    if kind == "image":
        Image.fromarray(ramp).save(path)
    else:
        # Alike but for a corner, lest the writer drops the second; the crops leave the corner out.
        frames = [np.ascontiguousarray(ramp), ramp.copy()]
        frames[1][-1, -1] = 0
        first, second = (Image.fromarray(frame) for frame in frames)
        first.save(path, save_all=True, append_images=[second], duration=100)
    try:
        pictures = {seed: decoder.decode(kind=kind, media=str(path), seed=seed).pixels for seed in (None, 1, 2)}
        again = decoder.decode(kind=kind, media=str(path), seed=1).pixels
    finally:
        decoder.close()
    assert np.array_equal(pictures[1], again)
    assert not np.array_equal(pictures[1], pictures[2]) and not np.array_equal(pictures[1], pictures[None])
    if kind == "video":
        # One draw for the whole clip: its frames, which are alike, stay alike.
        assert np.array_equal(pictures[1][0], pictures[1][1])


def test_a_hundred_megapixels_are_too_many(decoder):
    """A PNG of a few kilobytes would fill 300 MB; its header tells."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0" * 999))]
    content = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
    error = _error(decoder, kind="image", data=content)
    assert error.error_class == "too_large" and "10000x10000" in error.message


LARGE = dataclasses.replace(
    DECODE,
    preprocessing=dataclasses.replace(PREPROCESSING, height=224, width=224, resize_short_side=224),
    num_frames=2,
)
THIN = [(60_000, 1), (1, 60_000)]


def _thin(size, image_format):
    """A few hundred bytes; scaled to 224 as a whole, 13 million pixels wide."""
    frames = [Image.new("RGB", size, colour) for colour in ((200, 10, 10), (10, 200, 10))]
    more = {"save_all": True, "append_images": frames[1:]} if image_format == "GIF" else {}
    return encoded(frames[0], image_format, **more)


def test_thin_files_are_decoded_in_little_memory():
    """Also in the batch of a training step, where their neighbours must not suffer."""
    rows = [{"sample_id": f"{size}", "media_bytes": _thin(size, "PNG")} for size in THIN]
    rows += [{"sample_id": "other", "media_bytes": jpeg((10, 200, 10))}]
    table = manifest(rows)
    (block,) = evaluation_blocks(TableRows(table), 3)
    with limited_memory(2 * 1024**3):
        found = unpack(DecodeRows(LARGE)(block))
        checked = CheckRows(LARGE)(table).to_pylist()
    assert found.failures == [] and found.is_valid.tolist() == [True] * 3
    assert found.images[:2].mean(axis=(1, 3, 4)).tolist() == [[200, 10, 10]] * 2 and found.images[2].any()
    assert [row["error_class"] for row in checked] == [None] * 3
    assert [(row["width"], row["height"]) for row in checked[:2]] == THIN


@pytest.mark.parametrize("size", THIN)
def test_thin_videos_are_decoded_in_little_memory(size):
    decoder = SampleDecoder(LARGE)
    try:
        pixels = decoder.decode(kind="video", data=_thin(size, "GIF")).pixels
    finally:
        decoder.close()
    assert pixels.mean(axis=(2, 3)).tolist() == [[200, 10, 10], [10, 200, 10]]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError("no more"), "too_large"),
        (OSError(11, "no more processes"), "transient"),
        (ZeroDivisionError("a fault"), "corrupt"),
    ],
)
@pytest.mark.parametrize("kind", ["image", "video"])
def test_whatever_goes_wrong_costs_one_sample(decoder, monkeypatch, kind, error, expected):
    """After the file was read, too: while a picture is fitted, and while a child is started."""

    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr("pipelines.data.media.image_clip.resize_and_crop", fail)
    monkeypatch.setattr(decoder.videos, "read_clip", fail)
    found = decoder.check(kind=kind, data=jpeg()).error
    assert (found.error_class, _error(decoder, kind=kind, data=jpeg()).error_class) == (expected, expected)


def test_checking_tells_what_a_file_is(tmp_path, decoder):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a.jpg").write_bytes(jpeg(exif=exif))
    clip = write_clip(tmp_path / "a.mp4", [100] * 6)
    table = manifest(
        [
            {"sample_id": "image", "media": str(tmp_path / "a.jpg")},
            {"sample_id": "video", "media": str(clip), "kind": "video"},
            {"sample_id": "bytes", "media_bytes": clip.read_bytes(), "kind": "video", "start_s": 0.2, "end_s": 0.3},
            {"sample_id": "text", "media_bytes": b"no picture"},
            {"sample_id": "gone", "media": str(tmp_path / "gone.jpg")},
        ]
    )
    image, video, data, text, gone = CheckRows(DECODE)(table).to_pylist()
    assert (image["codec"], image["width"], image["height"], image["rotation_deg"]) == ("jpeg", 40, 48, 90)
    assert (image["duration_s"], image["fps"], image["has_audio"], image["error_class"]) == (None, None, False, None)
    assert (video["codec"], video["width"], video["num_frames"]) == ("h264", 64, 6)
    assert video["duration_s"] == pytest.approx(0.6) and video["size_bytes"] == clip.stat().st_size
    assert video["content_hash"] == data["content_hash"] == content_hash(clip.read_bytes()) != image["content_hash"]
    assert (text["error_class"], text["size_bytes"], text["codec"]) == ("unsupported", 10, None)
    assert text["content_hash"] is not None
    assert (gone["error_class"], gone["stage"], gone["content_hash"]) == ("missing", "read", None)


def test_a_file_of_several_rows_is_checked_once(tmp_path):
    """Within a block; other parts of it, other kinds and rows with bytes of their own are checked themselves."""
    clip = str(write_clip(tmp_path / "a.mp4", [100] * 6))
    rows = [
        {"media": clip, "kind": "video"},
        {"media": clip, "kind": "video"},
        {"media": clip, "kind": "video", "start_s": 0.1},
        {"media": clip, "kind": "video", "start_s": 9.0},
        {"media": clip, "kind": "image"},
        {"media": clip, "kind": "video", "media_bytes": b"other"},
        {"media": clip, "kind": "video"},
    ]
    table = manifest([{"sample_id": f"{number}", **row} for number, row in enumerate(rows)])
    checks = CheckRows(DECODE)
    calls, check = [], checks._decoder.check
    checks._decoder.check = lambda **sample: calls.append(sample) or check(**sample)
    found = checks(table).to_pylist()
    checks._decoder.close()
    assert len(calls) == 5
    assert [row["error_class"] for row in found] == [None, None, None, "config", "unsupported", "unsupported", None]
    facts = [{name: row[name] for name in ("content_hash", "width", "num_frames")} for row in found]
    assert facts[0] == facts[1] == facts[6] and facts[0]["num_frames"] == 6 and facts[5] != facts[0]
    assert found[0]["decode_s"] > 0 == found[1]["decode_s"] == found[6]["fetched_bytes"]


def test_decoding_imports_no_torch():
    heavy = ("torch", "ray", "decord")
    code = f"import pipelines.data.batches.decode_rows, sys; sys.exit(any(m in sys.modules for m in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_small_images_are_fast(decoder):
    """The demo's 100 px images; 3,500 a second were measured on one busy core, a tenth of that is surely a fault."""
    data = jpeg(size=(100, 100))
    start_s = time.perf_counter()
    for _ in range(200):
        decoder.decode(kind="image", data=data)
    assert 200 / (time.perf_counter() - start_s) > 350


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.JPG", "image"), ("a.webm", "video"), ("a.gif", "video"), ("a.txt", None), ("jpg", None)],
)
def test_kinds_by_name(name, kind):
    assert kind_of_name(name) == kind


def test_kinds_by_content(tmp_path):
    assert sniff_kind(jpeg()[:SNIFFED_BYTES]) == "image"
    for name in ("a.mp4", "a.mkv", "a.avi", "a.ts"):
        assert sniff_kind(write_clip(tmp_path / name, [100]).read_bytes()[:SNIFFED_BYTES]) == "video"
    assert sniff_kind(b"") is None and sniff_kind(b"hello world, this is text") is None
    assert sniff_kind(b"Greetings: a text that begins as a transport stream" * 9) is None
