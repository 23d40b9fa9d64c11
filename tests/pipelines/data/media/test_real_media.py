"""Every real file of QFORMER_TEST_DATA meets the truth of its MANIFEST.json, or the failure stated there."""

import importlib.util
import json
import os

import numpy as np
import pytest

from pipelines.data.failures import MediaError
from pipelines.data.media.clip import ClipRequest
from pipelines.data.media.frame_sampling import Sampling
from pipelines.data.media.images import decode_image, image_facts
from pipelines.data.media.video.backends import BACKENDS
from pipelines.data.media.video.pool import VideoPool
from pipelines.data.media.video.probe import probe_video
from tests.conftest import REPOSITORY
from tests.pipelines.data.builders import PREPROCESSING

FOLDER = (REPOSITORY / (os.environ.get("QFORMER_TEST_DATA") or "../shared/data")).resolve()
MAX_PIXELS = 50_000_000
MEAN_TOLERANCE, QUADRANT_TOLERANCE = 3.1, 4.0
"""Levels, "about 3" by the manifest. The truth was taken from packed RGB, whose colours have half the width and are
rounded down: the exact conversion of `sample_h265.ts` is 3.13 off in the mean. 10-bit and HDR get three times that:
their way to 8 bits is a matter of taste. Quadrants tell the rotation; which of them has the middle line of an odd size
in the truth is not known."""
SCALED_TOLERANCE = 2.5
"""Levels between the means of a frame and of the same frame decoded at the size of the encoder: scaling comes before
the colours are cut off at 0 and 255, which shows in saturated pictures, and unscaled frames are rounded down."""
HEIF = importlib.util.find_spec("pillow_heif")


def _squashed(width: int, height: int):
    changes = {"crop": "squash", "width": width, "height": height}
    return type(PREPROCESSING).from_dict({**PREPROCESSING.to_dict(), **changes})


SQUARE = _squashed(64, 64)


def _records(kind: str) -> list:
    manifest = FOLDER / "MANIFEST.json"
    if not manifest.is_file():
        reason = f"no {manifest}: set QFORMER_TEST_DATA to run the tests on real files"
        return [pytest.param(None, marks=pytest.mark.skip(reason=reason))]
    records = json.loads(manifest.read_text())["records"]
    return [pytest.param(record, id=record["path"]) for record in records if record["kind"] == kind]


@pytest.fixture(scope="module")
def pool():
    made = VideoPool(timeout_s=30, memory_bytes=4 * 1024**3)
    yield made
    made.close()


def _request(**changes) -> ClipRequest:
    return ClipRequest(**{"preprocessing": SQUARE, "num_frames": 1, "max_pixels": MAX_PIXELS, **changes})


@pytest.mark.parametrize("record", _records("video"))
def test_videos(record, pool):
    """Size, rotation, frames, sound; the colours of the first frame's quadrants (so also the turn) and of the last."""
    truth, path = record["ground_truth"], str(FOLDER / record["path"])
    if truth["expected"] in ("must_fail", "no_video_stream"):
        with pytest.raises(MediaError) as caught:
            pool.read_clip(_request(), path=path)
        is_soundtrack = truth["expected"] == "no_video_stream"
        assert caught.value.error_class == ("unsupported" if is_soundtrack else "corrupt")
        return
    stream = truth["streams"][0]
    last_s = truth["last_pts_s"] - truth["first_pts_s"]
    sampling = Sampling(strategy="times", times_s=(0.0, last_s) if last_s > 0 else (0.0,))
    wanted = {"num_frames": 2, "sampling": sampling, "wants_facts": True}
    shown = _squashed(stream["display_width"], stream["display_height"])
    clip = pool.read_clip(_request(preprocessing=shown, **wanted), path=path)
    facts = clip.facts
    assert (facts.width, facts.height) == (stream["display_width"], stream["display_height"])
    assert (facts.rotation_deg, facts.codec) == (stream["rotation_cw_deg"], stream["codec"])
    assert facts.has_audio == truth["has_audio"]
    depth_factor = 3 if "10" in (stream["pix_fmt"] or "") else 1
    tolerance = MEAN_TOLERANCE * depth_factor
    if facts.width >= 8:  # a single pixel has no quadrants
        expected = np.array(truth["mean_rgb_quadrants_first"])
        assert _quadrants(clip.pixels[0]) == pytest.approx(expected, abs=QUADRANT_TOLERANCE * depth_factor)
    means = clip.pixels.mean(axis=(2, 3))
    assert means[0] == pytest.approx(np.array(truth["mean_rgb"]["first"]), abs=tolerance)
    if truth["expected"] == "decodes":
        assert facts.num_frames == stream["decoded_frames"]
        assert means[1] == pytest.approx(np.array(truth["mean_rgb"]["last"]), abs=tolerance)
        assert clip.frame_valid.tolist() == [True, facts.num_frames > 1]
    if facts.width >= 8:
        scaled = pool.read_clip(_request(**wanted), path=path)
        assert scaled.pixels.mean(axis=(2, 3)) == pytest.approx(means, abs=SCALED_TOLERANCE * depth_factor)


@pytest.mark.parametrize("backend", ["decord", "torchcodec"])
@pytest.mark.parametrize("record", _records("video"))
def test_other_backends_see_the_same(record, backend, pool):
    """Where another backend is asked at all, and finds the frames there are, it shows what PyAV shows, upright."""
    truth, path = record["ground_truth"], str(FOLDER / record["path"])
    if truth["expected"] != "decodes" or not BACKENDS[backend].supports(probe_video(path, MAX_PIXELS)):
        pytest.skip(f"{backend} is not installed, or not asked about this file")
    shown = pool.read_clip(_request(num_frames=4), path=path)
    try:
        seen = pool.read_clip(_request(num_frames=4), path=path, backends=(backend,))
    except MediaError as error:
        pytest.skip(f"{backend} refuses: {error.message[:60]}")
    differences = np.abs(seen.pixels.astype(int) - shown.pixels)
    assert differences.mean() < QUADRANT_TOLERANCE * (3 if "10" in (truth["streams"][0]["pix_fmt"] or "") else 1)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("record", _records("image"))
def test_images(record):
    """Size after EXIF and the colours of the quadrants; what Pillow alone cannot read (HEIC) is unsupported."""
    truth, data = record["ground_truth"], (FOLDER / record["path"]).read_bytes()
    if truth["expected"] != "decodes" or (truth["format"] == "HEIF" and HEIF is None):
        with pytest.raises(MediaError) as caught:
            decode_image(data, MAX_PIXELS)
        assert caught.value.error_class in _failure_classes(truth)
        return
    image, facts = decode_image(data, MAX_PIXELS), image_facts(data, MAX_PIXELS)
    assert list(image.size) == [facts.width, facts.height] == truth["size_after_exif_transpose"]
    assert facts.codec == truth["format"].lower()
    # The truth drops alpha, and has no colours of 16-bit and float pictures.
    if "mean_rgb_quadrants" in truth and not truth["has_transparency"]:
        found = _quadrants(np.asarray(image).transpose(2, 0, 1))
        assert np.asarray(image).mean(axis=(0, 1)) == pytest.approx(np.array(truth["mean_rgb"]), abs=MEAN_TOLERANCE)
        assert found == pytest.approx(np.array(truth["mean_rgb_quadrants"]), abs=QUADRANT_TOLERANCE)


def _failure_classes(truth) -> tuple[str, ...]:
    error = truth.get("error", "")
    if "DecompressionBomb" in error or truth["expected"] == "must_refuse_or_survive_huge_dimensions":
        return ("too_large",)
    if truth.get("format") == "HEIF":
        return ("unsupported",)
    return ("corrupt", "unsupported") if "Unidentified" in error else ("corrupt", "too_large")


def _quadrants(picture_CHW):
    height, width = picture_CHW.shape[1] // 2, picture_CHW.shape[2] // 2
    corners = [(y, x) for y in (slice(height), slice(height, None)) for x in (slice(width), slice(width, None))]
    return np.array([picture_CHW[:, y, x].mean(axis=(1, 2)) for y, x in corners])
