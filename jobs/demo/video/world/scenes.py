"""What the video demo's clips show and sound, as plain values.

Every story has a reversal that shows the very same frames the other way round. So no observer that sees the frames
without their order can tell the two apart.
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
"""By the attribute that needs order, the actions that have it: which way; whether the thing came or went; which of two
things came first; what was there before."""
KIND_SHARES = {"direction": 3, "event": 3, "first": 2, "before": 2}
"""Of the clips, in tenths; events alone have sound, and there are four ways to move."""
PITCHES = ("low", "middle", "high")
SIDES = ("before", "after")
SILENT_SHARE = 0.25
"""Of the events; they have no audio track."""

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Tone:
    """A tone beside an event."""

    pitch: str
    side: str
    """Whether it starts before or after the event."""


@dataclass(frozen=True, slots=True)
class ClipScene:
    """What happens in a clip; two things where one follows the other."""

    action: str
    things: tuple[Thing, ...]
    tone: Tone | None = None

    def __post_init__(self) -> None:
        num_things = 2 if self.action in (SEQUENCE, CHANGE) else 1
        if self.action not in ACTIONS or len(self.things) != num_things:
            raise ValueError(f"no story has action {self.action!r} and {len(self.things)} things")
        if self.tone is not None and self.action not in EVENTS:
            raise ValueError(f"only events have a tone, not {self.action!r}")

    @property
    def kind(self) -> str:
        """The key of `KINDS` that it belongs to: its attribute that needs order."""
        return next(kind for kind, actions in KINDS.items() if self.action in actions)

    def reversed(self) -> "ClipScene":
        """The same frames the other way round; the tone stays where it is."""
        return replace(self, action=REVERSED[self.action], things=self.things[::-1])

    def is_held_out(self) -> bool:
        """Tell whether any thing's colour-shape pair is held out of training."""
        return any(thing.pair in HELD_OUT for thing in self.things)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ClipScene":
        """Rebuild a story from `to_dict`."""
        tone = Tone(**values["tone"]) if values["tone"] else None
        return cls(values["action"], tuple(Thing(**thing) for thing in values["things"]), tone)


def draw_scenes(rng: random.Random, count: int, *, held_out: bool) -> list[ClipScene]:
    """Draw stories whose actions, pitches and sides are as evenly spread as `count` allows.

    Args:
        rng: Source of chance.
        count: How many.
        held_out: True draws things of held-out colour-shape pairs alone, False none of them.

    Returns:
        The stories in random order. Two things of one story differ in colour and in shape.
    """
    pairs = HELD_OUT if held_out else tuple(pair for pair in PAIRS if pair not in HELD_OUT)
    kinds = _spread(rng, [kind for kind, share in KIND_SHARES.items() for _ in range(share)], count)
    stories = []
    for kind in KINDS:
        actions = _spread(rng, KINDS[kind], kinds.count(kind))
        tones = _tones(rng, len(actions)) if kind == "event" else [None] * len(actions)
        stories += [ClipScene(a, _things(rng, a, pairs), tone) for a, tone in zip(actions, tones, strict=True)]
    rng.shuffle(stories)
    return stories


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
    """Each value equally often, or once more or less, in random order."""
    values = list(values)
    rng.shuffle(values)
    spread = [values[index % len(values)] for index in range(count)]
    rng.shuffle(spread)
    return spread
