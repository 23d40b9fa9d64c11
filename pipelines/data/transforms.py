"""Geometry from a decoded RGB picture to the encoder's input size, on uint8; images and video frames alike."""

import math
import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qformer.preprocessing import Preprocessing

Box = tuple[int, int, int, int]
"""left, top, right, bottom in pixels; right and bottom are exclusive."""

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_CROP_TRIES = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Augmentation:
    """Random changes of training pictures."""

    random_resized_crop: bool = False
    crop_scale: tuple[float, float] = (0.5, 1.0)
    """Smallest and largest share of the picture's area kept by the crop."""
    horizontal_flip: bool = False
    """Half of the pictures are mirrored. Falsifies "left" and "right" in captions."""

    @property
    def is_active(self) -> bool:
        """Whether any change is asked for."""
        return self.random_resized_crop or self.horizontal_flip


def fit(
    image: Image.Image, preprocessing: Preprocessing, crop_box: Box | None = None, flip: bool = False
) -> NDArray[np.uint8]:
    """Resize and crop to the encoder's input.

    The sizes are rounded as torchvision's Resize and CenterCrop round them, so that pictures are the encoder's own.

    Args:
        image: RGB.
        preprocessing: Target geometry.
        crop_box: Part of the picture to resize straight to the target (random resized crop); None fits the whole.
        flip: Mirror left and right.

    Returns:
        uint8 [3, height, width].
    """
    target = (preprocessing.width, preprocessing.height)
    resampling = _RESAMPLING[preprocessing.interpolation]
    if crop_box is not None:
        image = image.crop(crop_box).resize(target, resampling)
    elif preprocessing.crop == "squash":
        image = image.resize(target, resampling)
    else:
        image = _center_crop(_resize_short_side(image, preprocessing.resize_short_side, resampling), target)
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))


def augment(width: int, height: int, augmentation: Augmentation, seed: int) -> tuple[Box | None, bool]:
    """Draw one picture's (or one whole clip's) crop and flip.

    Args:
        width: Of the decoded picture, in pixels.
        height: Of the decoded picture, in pixels.
        augmentation: What to draw.
        seed: The draw is a function of it alone.

    Returns:
        Crop box or None, and whether to mirror.
    """
    rng = random.Random(seed)
    is_flipped = rng.random() < 0.5 and augmentation.horizontal_flip
    if not augmentation.random_resized_crop:
        return None, is_flipped
    return random_crop_box(width, height, augmentation.crop_scale, rng), is_flipped


def random_crop_box(width: int, height: int, scale: tuple[float, float], rng: random.Random) -> Box:
    """Draw a crop of random area and of an aspect ratio between 3:4 and 4:3 (Inception's random resized crop).

    Args:
        width: Of the picture, in pixels.
        height: Of the picture, in pixels.
        scale: Smallest and largest share of the area.
        rng: Source of chance.
    """
    for _ in range(_CROP_TRIES):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left, top = rng.randint(0, width - crop_width), rng.randint(0, height - crop_height)
            return left, top, left + crop_width, top + crop_height
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def _resize_short_side(image: Image.Image, side: int, resampling: Image.Resampling) -> Image.Image:
    short, long = sorted(image.size)
    longer = max(1, int(side * long / short))
    size = (side, longer) if image.width <= image.height else (longer, side)
    return image if size == image.size else image.resize(size, resampling)


def _center_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    left, top = round((image.width - size[0]) / 2), round((image.height - size[1]) / 2)
    return image.crop((left, top, left + size[0], top + size[1]))
