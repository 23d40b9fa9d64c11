import os
import subprocess
import sys
import time

import numpy as np
import pytest

from pipelines.data.media import SNIFFED_BYTES, MediaError, kind_of_name, sniff_kind
from pipelines.data.samples import DecodeSettings, Limits, SampleDecoder
from pipelines.data.transforms import Augmentation
from tests.pipelines.data.builders import DECODE, PREPROCESSING, jpeg, write_clip


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


def test_wrong_rows_are_config_errors(decoder):
    assert _error(decoder, kind="audio", media="a.wav").error_class == "config"
    assert _error(decoder, kind="image").error_class == "config"


@pytest.mark.parametrize("kind", ["image", "video"])
def test_large_files_are_not_read(tmp_path, kind):
    decoder = SampleDecoder(DecodeSettings(preprocessing=PREPROCESSING, limits=Limits(max_bytes=100)))
    (tmp_path / "large").write_bytes(b"x" * 101)
    assert _error(decoder, kind=kind, media=str(tmp_path / "large")).error_class == "too_large"
    assert _error(decoder, kind=kind, data=b"x" * 101).error_class == "too_large"


@pytest.mark.parametrize("kind", ["image", "video"])
def test_augmentation_follows_its_seed(tmp_path, kind):
    settings = DecodeSettings(
        preprocessing=PREPROCESSING,
        num_frames=2,
        augmentation=Augmentation(random_resized_crop=True, horizontal_flip=True),
    )
    decoder = SampleDecoder(settings)
    ramp = np.tile(np.linspace(0, 255, 64, dtype=np.uint8)[None, :, None], (48, 1, 3))
    if kind == "image":
        from PIL import Image

        path = tmp_path / "a.png"
        Image.fromarray(ramp).save(path)
    else:
        path = write_clip(tmp_path / "a.mp4", [100] * 3, size=64)
    try:
        pictures = {seed: decoder.decode(kind=kind, media=str(path), seed=seed).pixels for seed in (None, 1, 2)}
        again = decoder.decode(kind=kind, media=str(path), seed=1).pixels
    finally:
        decoder.close()
    assert np.array_equal(pictures[1], again)
    if kind == "image":
        assert not np.array_equal(pictures[1], pictures[2]) and not np.array_equal(pictures[1], pictures[None])


def test_decoding_imports_no_torch():
    code = "import pipelines.data.decode_rows, sys; sys.exit(any(m in sys.modules for m in ('torch', 'ray', 'decord')))"
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
