"""Image bytes to an upright RGB image, by Pillow."""

import contextlib
import functools
import importlib.util
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

from pipelines.data.failures import MediaError
from pipelines.data.media.facts import MediaFacts
from pipelines.data.media.kinds import HEIC_BRANDS, SNIFFED_BYTES, sniff_kind
from pipelines.data.schema import IMAGE, VIDEO

# Closed list: Pillow's other plugins run programs (EPS) or read formats that no corpus has.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "MPO", "ICO", "AVIF", "HEIF", "PPM")
_WHITE = (255, 255, 255, 255)
_TURNED_ORIENTATIONS = (5, 6, 7, 8)
_CLOCKWISE_DEG = {3: 180, 4: 180, 5: 270, 6: 90, 7: 90, 8: 270}
"""Clockwise turn of each EXIF orientation; 4, 5 and 7 are also mirrored."""


def decode_image(data: bytes, max_pixels: int, min_side: int | None = None) -> Image.Image:
    """Decode an image: first frame, EXIF orientation applied, RGB.

    Transparent parts become white (without alpha they would have colours that no viewer shows). 16-bit
    channels are scaled to 8; colour profiles are ignored.

    Args:
        data: The file's content.
        max_pixels: Limit of width x height, checked before any pixel is decoded. Pillow's own limit (about 179
            million pixels) applies as well.
        min_side: Smallest side in pixels that JPEG may decode to (1/2, 1/4 or 1/8 of the full size), which is several
            times faster for large photographs. None decodes at full size.

    Raises:
        MediaError: "corrupt", "unsupported" or "too_large".
    """
    with _opened(data, max_pixels) as image:
        if min_side is not None:
            image.draft(None, (min_side, min_side))
        image.load()
        # A malformed EXIF block does not affect the pixels: the image stays as it is.
        with contextlib.suppress(Exception):
            ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image)


def image_facts(data: bytes, max_pixels: int) -> MediaFacts:
    """Read facts from an image's header, without decoding pixels.

    Raises:
        MediaError: "corrupt", "unsupported" or "too_large".
    """
    with _opened(data, max_pixels) as image:
        orientation = 1
        with contextlib.suppress(Exception):
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        # For a TIFF, Pillow reports the upright size and rotates when it loads the pixels.
        is_turned = orientation in _TURNED_ORIENTATIONS and image.format != "TIFF"
        width, height = image.size[::-1] if is_turned else image.size
        turn = _CLOCKWISE_DEG.get(orientation, 0)
        return MediaFacts(codec=str(image.format).lower(), width=width, height=height, rotation_deg=turn)


@contextlib.contextmanager
def _opened(data: bytes, max_pixels: int) -> Iterator[Image.Image]:
    """Open an image of at most `max_pixels`; every failure becomes a MediaError."""
    try:
        with Image.open(io.BytesIO(data), formats=_available_formats()) as image:
            if image.width * image.height > max_pixels:
                raise MediaError("too_large", f"{image.width}x{image.height} pixels exceed the limit of {max_pixels}")
            yield image
    except MediaError:
        raise
    except (Image.DecompressionBombError, MemoryError) as error:
        raise MediaError("too_large", str(error)) from error
    except UnidentifiedImageError as error:
        raise _unidentified(data) from error
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged input
        is_bomb = "ecompressed data too large" in str(error)
        raise MediaError("too_large" if is_bomb else "corrupt", f"{type(error).__name__}: {error}") from error


def _unidentified(data: bytes) -> MediaError:
    head = data[:SNIFFED_BYTES]
    if head[4:8] == b"ftyp" and head[8:12] in HEIC_BRANDS and "HEIF" not in Image.OPEN:
        return MediaError("unsupported", "HEIC needs the package pillow-heif, which is not installed")
    kind = sniff_kind(head)
    is_gif = head.startswith(b"GIF8")  # a video elsewhere, but Pillow can decode its first frame
    if kind == VIDEO and not is_gif:
        return MediaError("unsupported", "the content is a video, not an image")
    if kind == IMAGE or is_gif or not data:
        return MediaError("corrupt", f"damaged image header, {len(data)} bytes")
    return MediaError("unsupported", f"not an image of a known format, {len(data)} bytes")


@functools.cache
def _available_formats() -> tuple[str, ...]:
    Image.init()
    if importlib.util.find_spec("pillow_heif") is not None:
        importlib.import_module("pillow_heif").register_heif_opener()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_eight_bit(np.asarray(image), image.mode)).convert("RGB")
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert converted is not None, "profileToProfile returns None only in place"
        return converted
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, _WHITE), picture).convert("RGB")
    return image.convert("RGB")


def _eight_bit(values: NDArray[Any], mode: str) -> NDArray[np.uint8]:
    """Scale 16-bit integers by 1/257, and floats in [0, 1] by 255; other floats count as 0 to 255 already."""
    wide = np.nan_to_num(values.astype(np.float64))
    is_unit = mode == "F" and wide.max(initial=0) <= 1
    factor = 255 if is_unit else 1 if mode == "F" else 1 / 257
    return np.clip(np.rint(wide * factor), 0, 255).astype(np.uint8)
