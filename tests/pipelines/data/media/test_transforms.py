import dataclasses
import random

import numpy as np
import pytest
from PIL import Image

from pipelines.data.media.transforms import (
    Augmentation,
    draw_augmentation,
    random_crop_box,
    resize_and_crop,
    resized_size,
)
from qformer.torch_build.torchvision import import_torchvision
from tests.pipelines.data.builders import PREPROCESSING, limited_memory

RNG = np.random.default_rng(0)
ROUNDED_SHARE = 0.005
"""Of the pixels of a picture made smaller; worst measured 0.0033."""
PICTURE = Image.fromarray(RNG.integers(0, 255, (77, 121, 3), dtype=np.uint8))


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("short_side", [32, 37])
@pytest.mark.parametrize("size", [(121, 77), (77, 121), (33, 32), (20, 400), (1, 1)])
def test_geometry_equals_torchvision(interpolation, short_side, size):
    """Timm's own transforms are torchvision's; pixels are equal but for rounding where only a part is computed."""
    transforms = import_torchvision().transforms
    picture = PICTURE.resize(size)
    reference = transforms.Compose(
        [
            transforms.Resize(short_side, transforms.InterpolationMode(interpolation)),
            transforms.CenterCrop(32),
            transforms.PILToTensor(),
        ]
    )(picture).numpy()
    preprocessing = dataclasses.replace(PREPROCESSING, interpolation=interpolation, resize_short_side=short_side)
    differences = np.abs(resize_and_crop(picture, preprocessing).astype(int) - reference)
    assert differences.max() <= 1 and (differences > 0).mean() <= ROUNDED_SHARE
    assert differences.max() == 0 or min(size) > short_side


def test_squash_keeps_everything():
    preprocessing = dataclasses.replace(PREPROCESSING, crop="squash", height=16, width=24)
    assert resize_and_crop(PICTURE, preprocessing).shape == (3, 16, 24)


def test_flip_mirrors():
    plain, mirrored = resize_and_crop(PICTURE, PREPROCESSING), resize_and_crop(PICTURE, PREPROCESSING, flip=True)
    assert np.array_equal(plain[:, :, ::-1], mirrored)


@pytest.mark.parametrize("size", [(640, 480), (3, 900), (1, 1)])
def test_crops_lie_inside(size):
    for seed in range(50):
        left, top, right, bottom = random_crop_box(*size, (0.5, 1.0), random.Random(seed))
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]


def test_augmentation_is_a_function_of_its_seed():
    both = Augmentation(random_resized_crop=True, horizontal_flip=True)
    draws = [draw_augmentation(640, 480, both, seed) for seed in range(40)]
    assert draws == [draw_augmentation(640, 480, both, seed) for seed in range(40)]
    assert {flip for _, flip in draws} == {True, False} and len({box for box, _ in draws}) > 30
    assert draw_augmentation(640, 480, Augmentation(), 1) == (None, False)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("target", [(32, 32), (20, 32), (32, 8)])
@pytest.mark.parametrize("short_side", [32, 37])
@pytest.mark.parametrize("size", [(3, 400), (400, 3), (1, 1000), (1000, 1), (40, 2000), (2001, 50)])
def test_thin_pictures_are_cut_before_they_are_enlarged(interpolation, target, short_side, size):
    """The same pixels, but for rounding, as Pillow's own way, which makes the whole picture and keeps its middle.

    Levels are far from black and white: the two directions may be taken in another order, and what is clipped between
    them differs then.
    """
    picture = Image.fromarray(RNG.integers(80, 175, (size[1], size[0], 3), dtype=np.uint8))
    preprocessing = dataclasses.replace(
        PREPROCESSING,
        interpolation=interpolation,
        height=target[0],
        width=target[1],
        resize_short_side=short_side,
    )
    width, height = resized_size(*size, preprocessing)
    left, top = round((width - target[1]) / 2), round((height - target[0]) / 2)
    whole = picture.resize((width, height), Image.Resampling[interpolation.upper()])
    expected = np.asarray(whole.crop((left, top, left + target[1], top + target[0]))).transpose(2, 0, 1)
    differences = np.abs(resize_and_crop(picture, preprocessing).astype(int) - expected)
    if interpolation == "nearest":  # a place between two pixels may be rounded to either
        rows_cols = [np.unique(np.argwhere(differences)[:, axis]).size for axis in (1, 2)]
        assert min(rows_cols) <= 2
    else:
        assert differences.max() <= 1


@pytest.mark.parametrize("size", [(60_000, 1), (1, 60_000), (90_000_000 // 2, 2)])
def test_thin_pictures_take_little_memory(size):
    """Made as a whole, the smallest of these would have three billion pixels."""
    preprocessing = dataclasses.replace(PREPROCESSING, height=224, width=224, resize_short_side=224)
    with limited_memory(2 * 1024**3):
        fitted = resize_and_crop(Image.new("RGB", size, (10, 20, 30)), preprocessing)
    assert np.array_equal(fitted, np.broadcast_to(np.array([10, 20, 30])[:, None, None], (3, 224, 224)))
