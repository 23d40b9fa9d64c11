"""Image bytes to an upright RGB picture, by Pillow."""

import contextlib
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from pipelines.data.media import SNIFFED_BYTES, MediaError, sniff_kind

# Closed list: Pillow's other plugins run programs (EPS) or read formats that no corpus has.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "MPO", "ICO", "AVIF", "HEIF", "PPM")
_WHITE = (255, 255, 255, 255)


def decode_image(data: bytes, max_pixels: int, min_side: int | None = None) -> Image.Image:
    """Decode a picture: first frame, EXIF orientation applied, RGB.

    Transparent parts show white, as on a page (dropping alpha would show colours that no viewer ever saw). 16-bit
    channels are scaled to 8; colour profiles are ignored.

    Args:
        data: The file's content.
        max_pixels: Limit of width x height, checked before any pixel is decoded. Pillow's own ceiling (about 179
            million pixels) holds as well.
        min_side: Let JPEG decode straight to a smaller size (1/2, 1/4, 1/8) whose sides are at least this many
            pixels; several times faster for large photographs. None decodes at full size.

    Raises:
        MediaError: "corrupt", "unsupported" or "too_large".
    """
    try:
        with Image.open(io.BytesIO(data), formats=_available_formats()) as image:
            if image.width * image.height > max_pixels:
                raise MediaError("too_large", f"{image.width}x{image.height} pixels exceed the limit of {max_pixels}")
            if min_side is not None:
                image.draft(None, (min_side, min_side))
            image.load()
            # A malformed EXIF block says nothing about the pixels: the picture stays as it is.
            with contextlib.suppress(Exception):
                ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image)
    except MediaError:
        raise
    except (Image.DecompressionBombError, MemoryError) as error:
        raise MediaError("too_large", str(error)) from error
    except UnidentifiedImageError as error:
        is_damaged = not data or sniff_kind(data[:SNIFFED_BYTES]) is not None
        what = "damaged image header" if is_damaged else "not an image of a known format"
        raise MediaError("corrupt" if is_damaged else "unsupported", f"{what}, {len(data)} bytes") from error
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged input
        raise MediaError("corrupt", f"{type(error).__name__}: {error}") from error


def _available_formats() -> tuple[str, ...]:
    # Idempotent; HEIF is there only when its plugin was registered by the application.
    Image.init()
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
