"""Pictures for the demo's vision transformer, with a label for every patch.

Dimensions: B batch, P patches, C channels, H and W pixels.
"""

import io
import math
import random
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import av
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from jobs.demo.world.render import (
    RGB_OF_COLOUR,
    Placement,
    canvas_size,
    clip_frames,
    encode_jpeg,
    encode_mp4,
    make_background,
    paint,
    place,
    shape_mask,
)  # fmt: skip
from jobs.demo.world.scenes import COLOURS, HELD_OUT, SHAPES, SIZES, sample_scene

IMAGE_SIDE = 64
PATCH_SIDE = 8
GRID_SIDE = IMAGE_SIDE // PATCH_SIDE
CLASSES = {"colour": COLOURS, "shape": SHAPES, "size": SIZES}
IGNORED = -100
OTHER_COLOUR = "other"
_CLOSE_COLOUR = 30.0
"""Smallest distance in RGB between a random colour and those held out for its shape; a named colour varies by 17."""
_NEIGHBOUR_DISTANCE = (30.0, 70.0)
_MIN_SATURATION = 80
_FRAMES_PER_CLIP = 4
_OWNED_COVERAGE = 0.12
_CLEAR_COVERAGE = 0.02


@dataclass(frozen=True, slots=True)
class PatchExamples:
    """Rendered pictures with a label for every patch."""

    pixels: Tensor
    """BCHW, uint8."""
    labels: dict[str, Tensor]
    """Labels BP by attribute; the number of its values stands for "no thing", IGNORED for the rim of a thing."""
    offsets: Tensor
    """Vectors BP2 from the centre of the patch to the centre of its thing, in sides of the picture."""


def render_examples(count: int, rng: random.Random, held_out: bool, other_colour_rate: float = 0.0) -> PatchExamples:
    """Render stills through JPEG and clip frames through H.264, with patch labels.

    Args:
        count: Number of pictures.
        rng: Random number generator.
        held_out: Whether scenes hold held-out pairs (`scenes.sample_scene`).
        other_colour_rate: Share of things in stills with a colour outside the named ones.
    """
    pixels: list[NDArray[np.uint8]] = []
    placements: list[tuple[Placement, ...]] = []
    with tempfile.TemporaryDirectory() as folder:
        while len(pixels) < count:
            if rng.random() < 0.1:
                pictures = _clip_pictures(rng, held_out, Path(folder) / "clip.mp4")
            else:
                pictures = [_still_picture(rng, held_out, other_colour_rate)]
            for image, placed in pictures:
                pixels.append(np.asarray(fit_square(image)))
                placements.append(placed)
    labels, offsets = zip(*(_label(placed) for placed in placements[:count]), strict=True)
    pixels_BHWC = torch.from_numpy(np.stack(pixels[:count]))
    stacked = {name: torch.from_numpy(np.stack([label[name] for label in labels])) for name in CLASSES}
    return PatchExamples(
        pixels_BHWC.permute(0, 3, 1, 2).contiguous(), stacked, torch.from_numpy(np.stack(offsets)).float()
    )


def fit_square(image: Image.Image) -> Image.Image:
    """Resize the shorter side to the model's input (bicubic) and crop the centre."""
    scale = IMAGE_SIDE / min(image.size)
    width, height = (max(IMAGE_SIDE, round(side * scale)) for side in image.size)
    image = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - IMAGE_SIDE) // 2, (height - IMAGE_SIDE) // 2
    return image.crop((left, top, left + IMAGE_SIDE, top + IMAGE_SIDE))


def flip(
    pixels_BCHW: Tensor, labels: dict[str, Tensor], offsets_BP2: Tensor
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Mirror pictures, labels and offsets left to right."""

    def mirror(values: Tensor) -> Tensor:
        return values.unflatten(1, (GRID_SIDE, GRID_SIDE)).flip(2).flatten(1, 2)

    flipped_offsets_BP2 = mirror(offsets_BP2) * torch.tensor([-1.0, 1.0])
    return pixels_BCHW.flip(3), {n: mirror(label_BP) for n, label_BP in labels.items()}, flipped_offsets_BP2


def _still_picture(
    rng: random.Random, held_out: bool, other_colour_rate: float
) -> tuple[Image.Image, tuple[Placement, ...]]:
    width, height = canvas_size(rng, 72, 160)
    placed: tuple[Placement, ...] = ()
    if rng.random() < 0.96:
        placed = place(sample_scene(rng, "image", held_out), rng)
        placed = tuple(_recolour(p, rng) if rng.random() < other_colour_rate else p for p in placed)
    image = paint(make_background(width, height, rng), placed)
    return Image.open(io.BytesIO(encode_jpeg(image, rng))), placed


def _recolour(placed: Placement, rng: random.Random) -> Placement:
    """Give a thing a colour outside the named ones: half near named ones, none close to those held out for its shape.

    The excluded region is small, because a large one would teach that the shape never has such colours.
    """
    avoided = [RGB_OF_COLOUR[colour] for colour, shape in HELD_OUT if shape == placed.thing.shape]
    while True:
        rgb = _neighbour(rng) if rng.random() < 0.5 else _rgb([rng.uniform(0, 255) for _ in range(3)])
        is_saturated = max(rgb) - min(rgb) >= _MIN_SATURATION
        if is_saturated and all(math.dist(rgb, other) >= _CLOSE_COLOUR for other in avoided):
            return replace(placed, rgb=rgb, thing=replace(placed.thing, colour=OTHER_COLOUR))


def _neighbour(rng: random.Random) -> tuple[int, int, int]:
    """Draw a colour at some distance from a named one."""
    centre = RGB_OF_COLOUR[rng.choice(COLOURS)]
    direction = [rng.gauss(0, 1) for _ in range(3)]
    distance = rng.uniform(*_NEIGHBOUR_DISTANCE) / math.hypot(*direction)
    return _rgb([c + distance * d for c, d in zip(centre, direction, strict=True)])


def _rgb(values: list[float]) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, round(value))) for value in values)
    return red, green, blue


def _clip_pictures(rng: random.Random, held_out: bool, path: Path) -> list[tuple[Image.Image, tuple[Placement, ...]]]:
    moments, rate_hz = clip_frames(sample_scene(rng, "clip", held_out), rng)
    encode_mp4([pixels for pixels, _ in moments], rate_hz, path)
    with av.open(str(path)) as container:
        decoded = [frame.to_image() for frame in container.decode(video=0)]
    chosen = rng.sample(range(len(decoded)), _FRAMES_PER_CLIP)
    return [(decoded[i], (moments[i][1],) if moments[i][1].is_visible else ()) for i in chosen]


def _label(things: tuple[Placement, ...]) -> tuple[dict[str, NDArray[np.int64]], NDArray[np.float64]]:
    num_patches = GRID_SIDE**2
    labels = {name: np.full(num_patches, len(values), np.int64) for name, values in CLASSES.items()}
    offsets = np.zeros((num_patches, 2))
    centres = (np.stack(np.meshgrid(np.arange(GRID_SIDE), np.arange(GRID_SIDE)), -1) + 0.5) / GRID_SIDE
    for placed in things:
        mask, corner = shape_mask(placed, IMAGE_SIDE, IMAGE_SIDE)
        canvas = Image.new("L", (IMAGE_SIDE, IMAGE_SIDE))
        canvas.paste(mask, corner)
        coverage = np.asarray(canvas, np.float64).reshape(GRID_SIDE, PATCH_SIDE, GRID_SIDE, PATCH_SIDE)
        coverage_P = coverage.mean((1, 3)).ravel() / 255
        is_owned_P = coverage_P >= _OWNED_COVERAGE
        is_rim_P = (coverage_P >= _CLEAR_COVERAGE) & ~is_owned_P
        for name, values in CLASSES.items():
            free_P = is_rim_P & (labels[name] == len(values))
            labels[name][free_P] = IGNORED
            value = getattr(placed.thing, name)
            labels[name][is_owned_P] = values.index(value) if value in values else IGNORED
        offsets[is_owned_P] = (placed.x, placed.y) - centres.reshape(-1, 2)[is_owned_P]
    return labels, offsets
