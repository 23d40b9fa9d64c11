"""Resize, crop and augmentation of decoded RGB images and video frames, on uint8."""

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
_THIN_ASPECT = 32
"""Aspect ratio above which an image is cropped before it is enlarged: 60,000x1 pixels would become 13,440,000x224.
Other images become a few megapixels at most, and keep Pillow's own pixels bit for bit."""
_FILTER_REACH = 3
"""Reach of the widest filter (Lanczos) in pixels on each side."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Augmentation:
    """Random changes of training images."""

    random_resized_crop: bool = False
    crop_scale: tuple[float, float] = (0.5, 1.0)
    """Smallest and largest share of the image's area that a crop keeps."""
    horizontal_flip: bool = False
    """Whether half of the images are mirrored. Makes "left" and "right" in captions wrong."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ValueError: If a share of the crop is out of its range.
        """
        if not all(0.0 < share <= 1.0 for share in self.crop_scale):
            raise ValueError(f"crop_scale={list(self.crop_scale)} must hold two shares in (0, 1]")

    @property
    def is_active(self) -> bool:
        """Whether any change is enabled."""
        return self.random_resized_crop or self.horizontal_flip


def resize_and_crop(
    image: Image.Image, preprocessing: Preprocessing, crop_box: Box | None = None, flip: bool = False
) -> NDArray[np.uint8]:
    """Resize and crop to the encoder's input.

    Sizes are rounded as torchvision's Resize and CenterCrop round them, as the encoders were trained.

    Args:
        image: RGB image.
        preprocessing: Target geometry.
        crop_box: Part of the image that is resized to the target (random resized crop); None: the whole image.
        flip: Whether to mirror left and right.

    Returns:
        uint8 [3, height, width].
    """
    target = (preprocessing.width, preprocessing.height)
    resampling = _RESAMPLING[preprocessing.interpolation]
    if crop_box is not None:
        image = image.crop(crop_box).resize(target, resampling)
    elif preprocessing.crop == "squash":
        image = image if image.size == target else image.resize(target, resampling)
    else:
        image = _center_crop(image, resized_size(*image.size, preprocessing), target, resampling)
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))


def center_crop_resized(
    frame_HWC: NDArray[np.uint8], preprocessing: Preprocessing, flip: bool = False
) -> NDArray[np.uint8]:
    """Crop the middle of a frame that has been resized already; equal to `resize_and_crop` without the resize.

    Args:
        frame_HWC: RGB frame of `resized_size` in any memory layout.
        preprocessing: Target geometry.
        flip: Whether to mirror left and right.

    Returns:
        uint8 [3, height, width].
    """
    height, width = frame_HWC.shape[:2]
    left, top = round((width - preprocessing.width) / 2), round((height - preprocessing.height) / 2)
    if left < 0 or top < 0:
        return resize_and_crop(Image.fromarray(np.ascontiguousarray(frame_HWC)), preprocessing, flip=flip)
    part = frame_HWC[top : top + preprocessing.height, left : left + preprocessing.width]
    return np.ascontiguousarray((part[:, ::-1] if flip else part).transpose(2, 0, 1))


def resized_size(width: int, height: int, preprocessing: Preprocessing) -> tuple[int, int]:
    """Width and height of the whole image after the resize, before the crop."""
    if preprocessing.crop == "squash":
        return preprocessing.width, preprocessing.height
    short, long = sorted((width, height))
    side = preprocessing.resize_short_side
    longer = max(1, int(side * long / short))
    return (side, longer) if width <= height else (longer, side)


def draw_augmentation(width: int, height: int, augmentation: Augmentation, seed: int) -> tuple[Box | None, bool]:
    """Draw the crop and flip of one image or one whole clip.

    Args:
        width: Width of the decoded image in pixels.
        height: Height of the decoded image in pixels.
        augmentation: Enabled changes.
        seed: Seed that decides all random choices.

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
        width: Width of the image in pixels.
        height: Height of the image in pixels.
        scale: Smallest and largest share of the area.
        rng: Random generator.
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


def _center_crop(
    image: Image.Image, size: tuple[int, int], target: tuple[int, int], resampling: Image.Resampling
) -> Image.Image:
    """Resize to `size`, then crop the middle to `target`.

    Where that makes the image smaller, only the remaining pixels are computed, which was measured to save a fifth of a
    1080p JPEG's time. They are equal but for rounding: one level in one of a thousand pixels. (When Pillow enlarges, it
    treats the edges of a part differently.) Thin images are also cropped first; as a whole they would take gigabytes.
    """
    left, top = round((size[0] - target[0]) / 2), round((size[1] - target[1]) / 2)
    box = (left, top, left + target[0], top + target[1])
    if max(size) > _THIN_ASPECT * min(size):
        return _thin_crop(image, size, box, resampling)
    across, down = image.width / size[0], image.height / size[1]
    is_smaller = across > 1 and down > 1 and resampling != Image.Resampling.NEAREST
    if not is_smaller or left < 0 or top < 0:
        whole = image if image.size == size else image.resize(size, resampling)
        return whole.crop(box)
    right, bottom = min(box[2] * across, image.width), min(box[3] * down, image.height)
    return image.resize(target, resampling, box=(left * across, top * down, right, bottom))


def _thin_crop(image: Image.Image, size: tuple[int, int], box: Box, resampling: Image.Resampling) -> Image.Image:
    """Compute `image.resize(size).crop(box)` from the pixels inside `box` alone."""
    shown: list[float] = [0.0] * 4
    part_box = [0, 0, image.width, image.height]
    for low, high, scale in ((0, 2, image.width / size[0]), (1, 3, image.height / size[1])):
        # The source is cropped first: Pillow stores positions as 32-bit floats, too coarse far from the origin.
        reach = math.ceil(_FILTER_REACH * max(1.0, scale)) + 1
        begin, end = box[low] * scale, min(box[high] * scale, float(part_box[high]))
        part_box[low], part_box[high] = max(0, math.floor(begin) - reach), min(part_box[high], math.ceil(end) + reach)
        shown[low], shown[high] = begin - part_box[low], end - part_box[low]
    part = image.crop((part_box[0], part_box[1], part_box[2], part_box[3]))
    return part.resize((box[2] - box[0], box[3] - box[1]), resampling, box=(shown[0], shown[1], shown[2], shown[3]))
