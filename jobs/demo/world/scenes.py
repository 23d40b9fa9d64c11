"""Content of the demo's pictures and clips as plain values: things, relations and motions."""

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Kind = Literal["image", "single", "pair", "clip"]

SIZES = ("small", "large")
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan", "pink", "brown")
SHAPES = ("circle", "square", "triangle", "star", "cross")
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
RELATIONS = tuple(INVERSE)
CANONICAL_RELATIONS = ("left of", "above")
MOTIONS = ("moving sideways", "moving up and down", "blinking", "staying still")
PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
# Each colour once; a step of two spreads the shapes. These pairs occur in no training data of any model.
HELD_OUT = tuple((colour, SHAPES[2 * index % len(SHAPES)]) for index, colour in enumerate(COLOURS))
SINGLE_SHARE = 0.5
"""Share of one-thing scenes among training images."""


@dataclass(frozen=True, slots=True)
class Thing:
    """One coloured shape."""

    size: str
    colour: str
    shape: str

    @property
    def pair(self) -> tuple[str, str]:
        """Colour and shape; some pairs are held out."""
        return self.colour, self.shape


@dataclass(frozen=True, slots=True)
class Scene:
    """One thing, one thing with a motion, or two things with a relation (first to second)."""

    things: tuple[Thing, ...]
    relation: str | None = None
    motion: str | None = None

    def __post_init__(self) -> None:
        if len(self.things) not in (1, 2):
            raise ValueError(f"a scene has one or two things, not {len(self.things)}")
        if (len(self.things) == 2) != (self.relation is not None):
            raise ValueError(f"two things need a relation, one has none; got {self.relation!r}")
        if self.motion is not None and self.relation is not None:
            raise ValueError("only scenes of one thing move")

    def mirrored(self) -> "Scene":
        """Return the same two-thing scene described from the other thing."""
        if self.relation is None:
            return self
        return Scene(self.things[::-1], INVERSE[self.relation], self.motion)

    def canonical(self) -> "Scene":
        """Return the one form of this meaning: the relation is "left of" or "above"."""
        is_canonical = self.relation is None or self.relation in CANONICAL_RELATIONS
        return self if is_canonical else self.mirrored()

    def is_held_out(self) -> bool:
        """Whether any thing has a colour-shape pair that is held out of training."""
        return any(thing.pair in HELD_OUT for thing in self.things)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Scene":
        """Rebuild a scene from `to_dict`."""
        things = tuple(Thing(**thing) for thing in values["things"])
        return cls(things, values["relation"], values["motion"])


def sample_scene(rng: random.Random, kind: Kind, held_out: bool) -> Scene:
    """Draw one scene in canonical form.

    Args:
        rng: Random number generator.
        kind: "single" (one still thing), "pair" (two things), "image" (either), or "clip".
        held_out: Whether the scene has at least one held-out colour-shape pair, or none.

    Returns:
        The canonical scene.
    """
    if kind == "image":
        kind = "single" if rng.random() < SINGLE_SHARE else "pair"
    allowed = HELD_OUT if held_out else tuple(pair for pair in PAIRS if pair not in HELD_OUT)
    first = rng.choice(allowed)
    if kind == "single":
        return Scene((_sized(rng, first),))
    if kind == "clip":
        return Scene((_sized(rng, first),), motion=rng.choice(MOTIONS))
    others = PAIRS if held_out else allowed
    second = rng.choice([pair for pair in others if pair != first])
    things = (_sized(rng, first), _sized(rng, second))
    return Scene(things, relation=rng.choice(RELATIONS)).canonical()


def attributes(truth: Scene, guess: Scene | None) -> dict[str, list[bool]]:
    """Score a guess attribute by attribute, thing by thing, in canonical order.

    What the guess lacks counts as wrong; for an unparsable one, that is everything.

    Args:
        truth: Scene of the picture or clip.
        guess: Scene of the caption, or None.

    Returns:
        Right or wrong for each "size", "colour", "shape", "relation" and "motion" that the truth has.
    """
    truth = truth.canonical()
    guess = guess.canonical() if guess is not None else None
    guessed = guess.things if guess is not None else ()
    scores: dict[str, list[bool]] = {"size": [], "colour": [], "shape": [], "relation": [], "motion": []}
    for index, thing in enumerate(truth.things):
        other = guessed[index] if index < len(guessed) else None
        scores["size"].append(other is not None and other.size == thing.size)
        scores["colour"].append(other is not None and other.colour == thing.colour)
        scores["shape"].append(other is not None and other.shape == thing.shape)
    if truth.relation is not None:
        scores["relation"].append(guess is not None and guess.relation == truth.relation)
    if truth.motion is not None:
        scores["motion"].append(guess is not None and guess.motion == truth.motion)
    return scores


def _sized(rng: random.Random, pair: tuple[str, str]) -> Thing:
    return Thing(rng.choice(SIZES), *pair)
