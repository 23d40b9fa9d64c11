"""Accuracy of captions: by attribute and as a whole, compared with shuffled images and with chance."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jobs.demo.world.grammar import parse
from jobs.demo.world.scenes import Scene, attributes

ATTRIBUTES = ("size", "colour", "shape", "relation", "motion")
NUM_SHUFFLES = 20


@dataclass(frozen=True, slots=True)
class CaptionScores:
    """Accuracies on one kind of media."""

    count: int
    attributes: dict[str, float]
    """Accuracy by attribute, over all things that have it."""
    shuffled: dict[str, float]
    """Accuracy of the same captions against the scenes of other images."""
    chance: dict[str, float]
    """Accuracy of perfect captions of other images: the best that is possible without the image."""
    whole: float
    """Share of captions that parse to exactly the scene."""


def score_captions(truths: Sequence[Scene], captions: Sequence[str], seed: int = 0) -> CaptionScores:
    """Score captions against the scenes of their media."""
    guesses = [parse(caption) for caption in captions]
    shuffles = [_derangement(len(truths), random.Random(f"{seed}/{index}")) for index in range(NUM_SHUFFLES)]
    return CaptionScores(
        count=len(truths),
        attributes=_accuracy(zip(truths, guesses, strict=True)),
        shuffled=_accuracy((truths[i], guesses[j]) for order in shuffles for i, j in enumerate(order)),
        chance=_accuracy((truths[i], truths[j]) for order in shuffles for i, j in enumerate(order)),
        whole=sum(is_right(truth, caption) for truth, caption in zip(truths, captions, strict=True)) / len(truths),
    )


def is_right(truth: Scene, caption: str) -> bool:
    """Whether a caption parses to exactly the scene."""
    guess = parse(caption)
    return guess is not None and guess.canonical() == truth.canonical()


def _accuracy(pairs: Iterable[tuple[Scene, Scene | None]]) -> dict[str, float]:
    found: dict[str, list[bool]] = {name: [] for name in ATTRIBUTES}
    for truth, guess in pairs:
        for name, values in attributes(truth, guess).items():
            found[name].extend(values)
    return {name: sum(values) / len(values) for name, values in found.items() if values}


def _derangement(count: int, rng: random.Random) -> list[int]:
    """Random permutation without fixed points: a random cycle."""
    order = list(range(count))
    rng.shuffle(order)
    following = dict(zip(order, [*order[1:], order[0]], strict=True))
    return [following[index] for index in range(count)]
