"""Render clip scenes as frames, and encode them such that only the order of frames carries the order of events."""

import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jobs.demo.video.world.scenes import CHANGE, EVENTS, MOVES, ClipScene
from jobs.demo.video.world.sound import waveform_of
from jobs.demo.world.render import Placement, canvas_size, encode_mp4, make_background, move_to, paint, place
from jobs.demo.world.scenes import Scene, Thing

DURATION_S = 2
RATES_HZ = (4, 12)
"""Frame rates: a uniform sample of 8 of the 8 or 24 frames is the same forwards and backwards."""
NUM_FRAMES = 8
CODEC_OPTIONS = {"preset": "ultrafast", "g": "1", "qp": "20"}
"""Options for independent frames of equal quality; otherwise the first frame would have a higher quality."""
_MOTION_OF_MOVE = {"moves right": "moving sideways", "moves down": "moving up and down"}
"""Motions for `jobs.demo.world.render.move_to`; the other moves are their reversals."""
_EVENT_TIME = (0.4, 0.6)
"""Time of an event, in shares of the clip. Tones are before or after this range."""
_CHANGE_TIME = (0.35, 0.65)
_PAUSE_MIDDLE = (0.45, 0.55)
_PAUSE_LENGTH = (0.1, 0.2)
_PAUSE_AT_END = (0.0, 0.08)


@dataclass(frozen=True, slots=True)
class RenderedClip:
    """Frames and sound of a clip."""

    frames: list[NDArray[np.uint8]]
    """Frames, RGB (height, width, 3)."""
    rate_hz: int
    waveform: NDArray[np.float32] | None
    """Sound; None for a clip without an audio track."""

    def write(self, path: Path) -> None:
        """Encode as MP4."""
        encode_mp4(self.frames, self.rate_hz, path, options=CODEC_OPTIONS, waveform=self.waveform)


def render_clip(scene: ClipScene, seed: str) -> RenderedClip:
    """Render a clip scene.

    With the same seed, a scene and its reversal have the same frames in opposite order, because always the same one of
    the two is drawn. Each has its own sound.
    """
    rng = random.Random(f"{seed}/frames")
    width, height = canvas_size(rng, 64, 112)
    rate_hz = rng.choice(RATES_HZ)
    background = make_background(width, height, rng)
    forward = scene if _is_forward(scene) else scene.reversed()
    num_frames = DURATION_S * rate_hz
    moments = _moments(forward, [(index + 0.5) / num_frames for index in range(num_frames)], rng)
    frames = [np.asarray(paint(background, moment)) for moment in moments]
    rng = random.Random(f"{seed}/{scene.action}/sound")
    waveform = None if scene.tone is None else waveform_of(scene.tone, DURATION_S, rng)
    return RenderedClip(frames if scene == forward else frames[::-1], rate_hz, waveform)


def _is_forward(scene: ClipScene) -> bool:
    if scene.action in MOVES:
        return scene.action in _MOTION_OF_MOVE
    if scene.action in EVENTS:
        return scene.action == EVENTS[0]
    first, second = scene.things
    return first.pair < second.pair


def _moments(scene: ClipScene, times: list[float], rng: random.Random) -> list[tuple[Placement, ...]]:
    """Visible things at each time, in shares of the clip; random times are symmetric to the middle of the clip."""
    first, *more = (_at_rest(thing, rng) for thing in scene.things)
    if scene.action in MOVES:
        return [(move_to(first, _MOTION_OF_MOVE[scene.action], time, is_reversed=False),) for time in times]
    if scene.action in EVENTS:
        event = rng.uniform(*_EVENT_TIME)
        return [(first,) if time >= event else () for time in times]
    (second,) = more
    if scene.action == CHANGE:
        change = rng.uniform(*_CHANGE_TIME)
        second = replace(second, x=first.x, y=first.y)
        return [(first,) if time < change else (second,) for time in times]
    middle, half = rng.uniform(*_PAUSE_MIDDLE), rng.uniform(*_PAUSE_LENGTH) / 2
    begin, end = rng.uniform(*_PAUSE_AT_END), 1 - rng.uniform(*_PAUSE_AT_END)
    intervals = ((first, begin, middle - half), (second, middle + half, end))
    return [tuple(placed for placed, start, stop in intervals if start <= time < stop) for time in times]


def _at_rest(thing: Thing, rng: random.Random) -> Placement:
    (placed,) = place(Scene((thing,), motion="staying still"), rng)
    return placed
