"""Content of the video demo's clips as plain values: actions, things and tones.

Every scene has a reversal with the same frames in opposite order. Without the order of frames, the two cannot be
distinguished.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from jobs.demo.world.scenes import HELD_OUT, PAIRS, SIZES, Thing

MOVES = ("moves left", "moves right", "moves up", "moves down")
EVENTS = ("appears", "disappears")
SEQUENCE = "then"
CHANGE = "turns into"
ACTIONS = (*MOVES, *EVENTS, SEQUENCE, CHANGE)
REVERSED = {
    "moves left": "moves right",
    "moves right": "moves left",
    "moves up": "moves down",
    "moves down": "moves up",
    "appears": "disappears",
    "disappears": "appears",
    SEQUENCE: SEQUENCE,
    CHANGE: CHANGE,
}
KINDS = {"direction": MOVES, "event": EVENTS, "first": (SEQUENCE,), "before": (CHANGE,)}
"""Actions by the attribute that needs the order of frames: the direction of a motion; whether a thing appears or
disappears; which of two things comes first; what a thing was before."""
KIND_SHARES = {"direction": 3, "event": 3, "first": 2, "before": 2}
"""Shares of the kinds, in tenths; only events have sound, and there are four directions."""
PITCHES = ("low", "middle", "high")
SIDES = ("before", "after")
SILENT_SHARE = 0.25
"""Share of events without an audio track."""

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Tone:
    """A tone before or after an event."""

    pitch: str
    side: str
    """Whether it starts before or after the event."""


@dataclass(frozen=True, slots=True)
class ClipScene:
    """Content of a clip: one thing with an action, or two things in sequence."""

    action: str
    things: tuple[Thing, ...]
    tone: Tone | None = None

    def __post_init__(self) -> None:
        num_things = 2 if self.action in (SEQUENCE, CHANGE) else 1
        if self.action not in ACTIONS or len(self.things) != num_things:
            raise ValueError(f"no scene has action {self.action!r} and {len(self.things)} things")
        if self.tone is not None and self.action not in EVENTS:
            raise ValueError(f"only events have a tone, not {self.action!r}")

    @property
    def kind(self) -> str:
        """Key of `KINDS`: the attribute that needs the order of frames."""
        return next(kind for kind, actions in KINDS.items() if self.action in actions)

    def reversed(self) -> "ClipScene":
        """Scene with the same frames in opposite order; the tone stays."""
        return replace(self, action=REVERSED[self.action], things=self.things[::-1])

    def is_held_out(self) -> bool:
        """Whether any thing has a colour-shape pair that is held out of training."""
        return any(thing.pair in HELD_OUT for thing in self.things)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ClipScene":
        """Rebuild a scene from `to_dict`."""
        tone = Tone(**values["tone"]) if values["tone"] else None
        return cls(values["action"], tuple(Thing(**thing) for thing in values["things"]), tone)


def draw_scenes(rng: random.Random, count: int, *, held_out: bool) -> list[ClipScene]:
    """Draw scenes whose actions, pitches and sides are as evenly spread as `count` allows.

    Args:
        rng: Random number generator.
        count: Number of scenes.
        held_out: Whether all things have held-out colour-shape pairs, or none.

    Returns:
        The scenes in random order. Two things of one scene differ in colour and in shape.
    """
    pairs = HELD_OUT if held_out else tuple(pair for pair in PAIRS if pair not in HELD_OUT)
    kinds = _spread(rng, [kind for kind, share in KIND_SHARES.items() for _ in range(share)], count)
    scenes = []
    for kind in KINDS:
        actions = _spread(rng, KINDS[kind], kinds.count(kind))
        tones = _tones(rng, len(actions)) if kind == "event" else [None] * len(actions)
        scenes += [ClipScene(a, _things(rng, a, pairs), tone) for a, tone in zip(actions, tones, strict=True)]
    rng.shuffle(scenes)
    return scenes


def _tones(rng: random.Random, count: int) -> list[Tone | None]:
    num_silent = round(SILENT_SHARE * count)
    kinds = [Tone(pitch, side) for pitch in PITCHES for side in SIDES]
    tones: list[Tone | None] = [*_spread(rng, kinds, count - num_silent), *[None] * num_silent]
    rng.shuffle(tones)
    return tones


def _things(rng: random.Random, action: str, pairs: Sequence[tuple[str, str]]) -> tuple[Thing, ...]:
    first = rng.choice(pairs)
    if action not in (SEQUENCE, CHANGE):
        return (Thing(rng.choice(SIZES), *first),)
    second = rng.choice([pair for pair in pairs if pair[0] != first[0] and pair[1] != first[1]])
    return Thing(rng.choice(SIZES), *first), Thing(rng.choice(SIZES), *second)


def _spread(rng: random.Random, values: Iterable[Value], count: int) -> list[Value]:
    """Values in random order, each equally often up to one."""
    values = list(values)
    rng.shuffle(values)
    spread = [values[index % len(values)] for index in range(count)]
    rng.shuffle(spread)
    return spread
