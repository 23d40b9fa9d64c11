"""Draw scenes as small JPEG images and H.264 clips.

Positions and radii are in units of the central square of the canvas, so a centre crop cuts only moving things at the
ends of their path.
"""

import io
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from jobs.demo.world.scenes import Scene, Thing

RADIUS_OF_SIZE = {"small": 0.13, "large": 0.19}
RGB_OF_COLOUR = {
    "red": (222, 38, 38),
    "green": (40, 165, 60),
    "blue": (45, 70, 225),
    "yellow": (238, 218, 40),
    "purple": (125, 40, 170),
    "cyan": (45, 205, 220),
    "pink": (250, 130, 195),
    "brown": (150, 88, 35),
}
REACH = 1.25
"""Farthest point of any shape from its centre, in radii, with a margin."""
CODEC_OPTIONS = {"preset": "ultrafast", "crf": "18"}
SAMPLE_RATE_HZ = 16_000
_SUPERSAMPLING = 4
_GAP = 0.04
_REST = (0.3, 0.7)
"""Range of the resting place of a clip's thing, and of its position on the axis without motion."""
_PATH = (0.08, 0.92)
"""Ends of a path: beyond the resting places, so that single frames already hint at the motion. In measurements without
such a hint, a bridge that reads frames separately learnt no places at all, because only pairs of places are
informative."""
_NUM_BLINK_PHASES = 4


@dataclass(frozen=True, slots=True)
class Placement:
    """A thing with its random appearance: position, size, colour and angle."""

    thing: Thing
    x: float
    y: float
    radius: float
    rgb: tuple[int, int, int]
    angle_degrees: float
    is_visible: bool = True


def place(scene: Scene, rng: random.Random) -> tuple[Placement, ...]:
    """Draw the positions of a scene's things (in clips: the resting places) such that the relation is clear."""
    appearances = [_appearance(thing, rng) for thing in scene.things]
    if scene.relation is None:
        low, high = (
            (REACH * appearances[0].radius, 1 - REACH * appearances[0].radius) if scene.motion is None else _REST
        )
        return (replace(appearances[0], x=rng.uniform(low, high), y=rng.uniform(low, high)),)
    canonical = scene.canonical()
    if canonical != scene:
        appearances.reverse()
    first, second = appearances
    needed = 1.2 * (first.radius + second.radius) + _GAP
    start = rng.uniform(REACH * first.radius, 1 - REACH * second.radius - needed)
    end = rng.uniform(start + needed, 1 - REACH * second.radius)
    widest = REACH * max(first.radius, second.radius)
    across = rng.uniform(widest + 0.05, 1 - widest - 0.05)
    offset = rng.uniform(-0.05, 0.05)
    if canonical.relation == "left of":
        return replace(first, x=start, y=across), replace(second, x=end, y=across + offset)
    return replace(first, x=across, y=start), replace(second, x=across + offset, y=end)


def move_to(placed: Placement, motion: str | None, progress: float, is_reversed: bool) -> Placement:
    """Return a thing at a moment of its clip.

    Args:
        placed: Thing at its resting place.
        motion: One of `scenes.MOTIONS`, or None for an image.
        progress: Time from 0 to 1.
        is_reversed: Whether it moves right to left or bottom to top; for blinking, whether it starts invisible.

    Returns:
        The thing at its new position.
    """
    share = 1 - progress if is_reversed else progress
    along = _PATH[0] + share * (_PATH[1] - _PATH[0])
    match motion:
        case "moving sideways":
            return replace(placed, x=along)
        case "moving up and down":
            return replace(placed, y=along)
        case "blinking":
            phase = min(int(progress * _NUM_BLINK_PHASES), _NUM_BLINK_PHASES - 1)
            return replace(placed, is_visible=(phase % 2 == 0) != is_reversed)
        case _:
            return placed


def make_background(width: int, height: int, rng: random.Random) -> Image.Image:
    """Draw a light or dark grey background with a slight gradient and noise."""
    tone = rng.uniform(172, 225) if rng.random() < 0.5 else rng.uniform(30, 80)
    angle = rng.uniform(0, 2 * math.pi)
    strength = rng.uniform(0, 14)
    noise_std = rng.uniform(0, 3)
    tint = np.array([rng.uniform(-6, 6) for _ in range(3)], dtype=np.float32)
    x = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    grey = tone + strength * (math.cos(angle) * x + math.sin(angle) * y)
    noise = np.random.default_rng(rng.getrandbits(64)).standard_normal((height, width), dtype=np.float32)
    pixels = (grey + noise_std * noise)[:, :, None] + tint
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def paint(background: Image.Image, things: tuple[Placement, ...]) -> Image.Image:
    """Return the background with the visible things drawn on it."""
    canvas = background.copy()
    for placed in things:
        if placed.is_visible:
            mask, corner = shape_mask(placed, *canvas.size)
            canvas.paste(placed.rgb, (*corner, corner[0] + mask.width, corner[1] + mask.height), mask)
    return canvas


def shape_mask(placed: Placement, width: int, height: int) -> tuple[Image.Image, tuple[int, int]]:
    """Draw the anti-aliased coverage of one thing.

    Args:
        placed: Thing to draw.
        width: Canvas width in pixels.
        height: Canvas height in pixels.

    Returns:
        The coverage of the thing's box (0..255) and the box's top left corner on the canvas.
    """
    side = min(width, height)
    centre_x, centre_y = (width - side) / 2 + placed.x * side, (height - side) / 2 + placed.y * side
    reach = placed.radius * side * REACH
    left, top = math.floor(centre_x - reach), math.floor(centre_y - reach)
    box_side = math.ceil(2 * reach) + 2
    big = Image.new("L", (box_side * _SUPERSAMPLING, box_side * _SUPERSAMPLING))
    centre = ((centre_x - left) * _SUPERSAMPLING, (centre_y - top) * _SUPERSAMPLING)
    _draw_shape(ImageDraw.Draw(big), placed, centre, placed.radius * side * _SUPERSAMPLING)
    return big.reduce(_SUPERSAMPLING), (left, top)


def render_image(scene: Scene, rng: random.Random) -> Image.Image:
    """Draw a still scene on a canvas of random size."""
    width, height = canvas_size(rng, 72, 160)
    return paint(make_background(width, height, rng), place(scene, rng))


def encode_jpeg(image: Image.Image, rng: random.Random) -> bytes:
    """Compress an image as JPEG with a quality between 80 and 95."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=rng.randint(80, 95))
    return buffer.getvalue()


def render_clip_frames(scene: Scene, rng: random.Random) -> tuple[list[NDArray[np.uint8]], int]:
    """Draw a moving scene; return its frames (height, width, 3) and the frame rate in frames per second."""
    moments, rate_hz = clip_frames(scene, rng)
    return [pixels for pixels, _ in moments], rate_hz


def clip_frames(scene: Scene, rng: random.Random) -> tuple[list[tuple[NDArray[np.uint8], Placement]], int]:
    """Draw a moving scene, with the position of its thing in every frame.

    Args:
        scene: A scene of one thing with a motion.
        rng: Random number generator.

    Returns:
        The frames (height, width, 3), each with its thing, and the frame rate in frames per second.
    """
    width, height = canvas_size(rng, 64, 112)
    rate_hz = rng.choice((8, 10, 12, 15, 24))
    num_frames = max(8, round(rng.uniform(1.0, 2.5) * rate_hz))
    background = make_background(width, height, rng)
    (placed,) = place(scene, rng)
    is_reversed = rng.random() < 0.5
    moments = []
    for index in range(num_frames):
        now = move_to(placed, scene.motion, (index + 0.5) / num_frames, is_reversed)
        moments.append((np.asarray(paint(background, (now,))), now))
    return moments, rate_hz


def encode_mp4(
    frames: list[NDArray[np.uint8]],
    rate_hz: int,
    path: Path,
    *,
    options: Mapping[str, str] = CODEC_OPTIONS,
    waveform: NDArray[np.float32] | None = None,
) -> None:
    """Write frames as an H.264 clip.

    Args:
        frames: Pictures (height, width, 3), of even height and width.
        rate_hz: Frames per second.
        path: File to write.
        options: Options of the video codec.
        waveform: Mono sound within [-1, 1] at `SAMPLE_RATE_HZ`, for an AAC track; None for a clip without one.
    """
    height, width = frames[0].shape[:2]
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate_hz, options=dict(options))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        track = None if waveform is None else container.add_stream("aac", rate=SAMPLE_RATE_HZ, layout="mono")
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
        if track is not None and waveform is not None:
            sound = av.AudioFrame.from_ndarray(waveform[None], format="fltp", layout="mono")
            sound.sample_rate = SAMPLE_RATE_HZ
            container.mux(track.encode(sound))
            container.mux(track.encode())


def canvas_size(rng: random.Random, smallest: int, largest: int) -> tuple[int, int]:
    """Draw an even width and height; one canvas in four is 4:3, landscape or portrait."""
    side = 2 * rng.randint(smallest // 2, largest // 2)
    if rng.random() < 0.75:
        return side, side
    short = max(smallest, 2 * round(side * 3 / 8))
    long = 2 * round(short * 2 / 3)
    return (long, short) if rng.random() < 0.7 else (short, long)


def _appearance(thing: Thing, rng: random.Random) -> Placement:
    red, green, blue = (min(255, max(0, c + rng.randint(-10, 10))) for c in RGB_OF_COLOUR[thing.colour])
    radius = RADIUS_OF_SIZE[thing.size] * rng.uniform(0.96, 1.04)
    return Placement(thing, 0.5, 0.5, radius, (red, green, blue), rng.uniform(-7, 7))


def _draw_shape(draw: ImageDraw.ImageDraw, placed: Placement, centre: tuple[float, float], radius: float) -> None:
    def at(distance: float, degrees: float) -> tuple[float, float]:
        angle = math.radians(degrees + placed.angle_degrees - 90)
        return centre[0] + distance * math.cos(angle), centre[1] + distance * math.sin(angle)

    match placed.thing.shape:
        case "circle":
            draw.ellipse((*(c - radius for c in centre), *(c + radius for c in centre)), fill=255)
        case "square":
            draw.polygon([at(1.2 * radius, 45 + 90 * i) for i in range(4)], fill=255)
        case "triangle":
            draw.polygon([at(1.2 * radius, 120 * i) for i in range(3)], fill=255)
        case "star":
            tips = [at(radius * (1.2 if i % 2 == 0 else 0.5), 36 * i) for i in range(10)]
            draw.polygon(tips, fill=255)
        case "cross":
            corners = ((1.15, -16), (1.15, 16), (0.45, 45))
            tips = [at(r * radius, d + 90 * i) for i in range(4) for r, d in corners]
            draw.polygon(tips, fill=255)
        case other:
            raise ValueError(f"unknown shape {other!r}")
