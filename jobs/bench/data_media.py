"""Files for the data benchmark: photographs as 1080p JPEGs of about 400 KB, and H.264 clips that pan over them."""

import io
import os
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

JPEG_SIZE = (1920, 1080)
JPEG_BYTES = 400_000
CLIP_SIZE = (640, 360)
CLIP_RATE = 30


def photographs() -> list[Image.Image]:
    """Photographs of QFORMER_TEST_DATA; empty if it is absent."""
    root = Path(os.environ.get("QFORMER_TEST_DATA") or Path(__file__).parents[2] / "../shared/data").resolve()
    return [Image.open(path).convert("RGB") for path in sorted((root / "captioned").rglob("*.jpg"))]


def picture(photos: list[Image.Image], seed: int, size: tuple[int, int]) -> Image.Image:
    """A part of a photograph, or of a fractal with the spectrum of one, enlarged to `size`.

    Args:
        photos: Source photographs; empty for fractals.
        seed: Seed of the choice of photograph and crop.
        size: Width and height in pixels.
    """
    rng = np.random.default_rng(seed)
    if not photos:
        return Image.fromarray(_fractal(rng, size))
    photo = photos[seed % len(photos)]
    share = rng.uniform(0.7, 1.0)
    width, height = int(photo.width * share), int(photo.height * share)
    left, top = int(rng.integers(photo.width - width + 1)), int(rng.integers(photo.height - height + 1))
    enlarged = photo.crop((left, top, left + width, top + height)).resize(size, Image.Resampling.BICUBIC)
    # Add grain, which an enlarged photograph lacks and which fills most of a large JPEG.
    grain = rng.normal(0, 4, (size[1], size[0], 1)).astype(np.float32)
    return Image.fromarray(np.clip(np.asarray(enlarged, dtype=np.float32) + grain, 0, 255).astype(np.uint8))


def write_jpegs(folder: Path, count: int, size: tuple[int, int] = JPEG_SIZE, size_bytes: int = JPEG_BYTES) -> list[str]:
    """Write JPEGs of about `size_bytes`; return their paths."""
    folder.mkdir(parents=True)
    photos, paths = photographs(), []
    for index in range(count):
        path = folder / f"{index:04d}.jpg"
        path.write_bytes(_jpeg_of(picture(photos, index, size), size_bytes))
        paths.append(str(path))
    return paths


def write_clips(folder: Path, count: int, gop: int, num_frames: int) -> list[str]:
    """Write H.264 clips with a key frame every `gop` frames that pan over a picture; return their paths."""
    folder.mkdir(parents=True)
    photos, paths = photographs(), []
    width, height = CLIP_SIZE
    for index in range(count):
        large = np.asarray(picture(photos, index, (2 * width, 2 * height)))
        path = folder / f"{index:04d}.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=CLIP_RATE)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.options = {"g": str(gop), "keyint_min": str(gop), "sc_threshold": "0", "preset": "fast"}
            for number in range(num_frames):
                # A slow pan along an ellipse: every block moves, none stands still or jumps.
                angle = 2 * np.pi * number / 300
                left = round(width / 2 * (1 + 0.9 * np.cos(angle)))
                top = round(height / 2 * (1 + 0.9 * np.sin(angle)))
                frame = av.VideoFrame.from_ndarray(
                    np.ascontiguousarray(large[top : top + height, left : left + width]), format="rgb24"
                )
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        paths.append(str(path))
    return paths


def _jpeg_of(image: Image.Image, size_bytes: int) -> bytes:
    """Encode with the quality that comes nearest to a size."""
    best = b""
    low, high = 30, 97
    while low <= high:
        quality = (low + high) // 2
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        if not best or abs(buffer.tell() - size_bytes) < abs(len(best) - size_bytes):
            best = buffer.getvalue()
        low, high = (quality + 1, high) if buffer.tell() < size_bytes else (low, quality - 1)
    return best


def _fractal(rng: np.random.Generator, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Noise whose power falls with the square of the frequency, as that of photographs does."""
    total = np.zeros((size[1], size[0], 3), dtype=np.float32)
    cells, weight = 4, 64.0
    while cells < size[0]:
        grid = rng.normal(0, weight, (max(2, cells * size[1] // size[0]), cells, 3)).astype(np.float32)
        for channel in range(3):
            layer = Image.fromarray(grid[..., channel]).resize(size, Image.Resampling.BICUBIC)
            total[..., channel] += np.asarray(layer)
        cells, weight = 2 * cells, weight / 2
    return np.clip(total + 128, 0, 255).astype(np.uint8)
