"""Draw stories as frames whose order tells everything, and encode them so that nothing else does."""

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
"""Eight frames spread evenly over 8 or 24 are the same ones forwards and backwards."""
NUM_FRAMES = 8
CODEC_OPTIONS = {"preset": "ultrafast", "g": "1", "qp": "20"}
"""Every picture by itself and equally well: else the first one of a clip would look better than those that follow."""
_MOTION_OF_MOVE = {"moves right": "moving sideways", "moves down": "moving up and down"}
"""As `render.move_to` draws them; the other moves are these, reversed."""
_EVENT_TIME = (0.4, 0.6)
"""When an event happens, in shares of the clip. Tones lie before or after all of this."""
_CHANGE_TIME = (0.35, 0.65)
_PAUSE_MIDDLE = (0.45, 0.55)
_PAUSE_LENGTH = (0.1, 0.2)
_PAUSE_AT_END = (0.0, 0.08)


@dataclass(frozen=True, slots=True)
class RenderedClip:
    """A story's frames and sound."""

    frames: list[NDArray[np.uint8]]
    """RGB (height, width, 3)."""
    rate_hz: int
    waveform: NDArray[np.float32] | None
    """None: without an audio track."""

    def write(self, path: Path) -> None:
        """Encode as MP4."""
        encode_mp4(self.frames, self.rate_hz, path, options=CODEC_OPTIONS, waveform=self.waveform)


def render_clip(story: ClipScene, seed: str) -> RenderedClip:
    """Draw a story.

    With the same seed a story and its reversal have the same frames, one forwards and one backwards: one of the two is
    drawn, whichever is asked for. Each has a sound of its own.
    """
    rng = random.Random(f"{seed}/frames")
    width, height = canvas_size(rng, 64, 112)
    rate_hz = rng.choice(RATES_HZ)
    background = make_background(width, height, rng)
    forward = story if _is_forward(story) else story.reversed()
    num_frames = DURATION_S * rate_hz
    moments = _moments(forward, [(index + 0.5) / num_frames for index in range(num_frames)], rng)
    frames = [np.asarray(paint(background, moment)) for moment in moments]
    rng = random.Random(f"{seed}/{story.action}/sound")
    waveform = None if story.tone is None else waveform_of(story.tone, DURATION_S, rng)
    return RenderedClip(frames if story == forward else frames[::-1], rate_hz, waveform)


def _is_forward(story: ClipScene) -> bool:
    if story.action in MOVES:
        return story.action in _MOTION_OF_MOVE
    if story.action in EVENTS:
        return story.action == EVENTS[0]
    first, second = story.things
    return first.pair < second.pair


def _moments(story: ClipScene, times: list[float], rng: random.Random) -> list[tuple[Placement, ...]]:
    """What is seen at each time, in shares of the clip; chance has no leaning towards begin or end."""
    first, *more = (_at_rest(thing, rng) for thing in story.things)
    if story.action in MOVES:
        return [(move_to(first, _MOTION_OF_MOVE[story.action], time, is_reversed=False),) for time in times]
    if story.action in EVENTS:
        event = rng.uniform(*_EVENT_TIME)
        return [(first,) if time >= event else () for time in times]
    (second,) = more
    if story.action == CHANGE:
        change = rng.uniform(*_CHANGE_TIME)
        second = replace(second, x=first.x, y=first.y)
        return [(first,) if time < change else (second,) for time in times]
    middle, half = rng.uniform(*_PAUSE_MIDDLE), rng.uniform(*_PAUSE_LENGTH) / 2
    begin, end = rng.uniform(*_PAUSE_AT_END), 1 - rng.uniform(*_PAUSE_AT_END)
    shown = ((first, begin, middle - half), (second, middle + half, end))
    return [tuple(placed for placed, start, stop in shown if start <= time < stop) for time in times]


def _at_rest(thing: Thing, rng: random.Random) -> Placement:
    (placed,) = place(Scene((thing,), motion="staying still"), rng)
    return placed
