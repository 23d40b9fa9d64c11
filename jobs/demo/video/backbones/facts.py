"""Facts about stories as tokens, spread over soft prompts: what the video demo's tiny language model reads.

A fact says whose it is ("the first thing is red"), for clips show one thing at a time: a bridge that attends to a
moment has nothing left to choose. Where a fact stands in a prompt means nothing, and it may stand in several places.

Dimensions: B batch, L prompt length, V vocabulary, D width.
"""

import random

import torch
from torch import Tensor

from jobs.demo.video.world.scenes import ACTIONS, PITCHES, SIDES, ClipScene
from jobs.demo.world.scenes import COLOURS, SHAPES

_ROLES = ("first", "second")
_MIN_LENGTH, _MAX_LENGTH = 6, 32
_COPIES_MAX = 5
_WEIGHT = (0.4, 1.6)
_TOTAL = (0.7, 2.0)
"""Of a fact's weights over all its places."""


def fact_tokens() -> list[str]:
    """Return every fact token, in a fixed order."""
    things = [f"{role} {value}" for role in _ROLES for value in (*COLOURS, *SHAPES)]
    values = [*things, *ACTIONS, *PITCHES, *(f"tone {side}" for side in SIDES)]
    return [f"<{value.replace(' ', '-')}>" for value in values]


def scene_facts(story: ClipScene) -> dict[str, str]:
    """Return a story's fact tokens, each with the word that only it tells ("" where several words do)."""
    facts = {story.action: ""}
    for role, thing in zip(_ROLES, story.things, strict=False):
        facts |= {f"{role} {thing.colour}": thing.colour, f"{role} {thing.shape}": thing.shape}
    if story.tone is not None:
        facts |= {story.tone.pitch: story.tone.pitch, f"tone {story.tone.side}": ""}
    return {f"<{fact.replace(' ', '-')}>": word for fact, word in facts.items()}


def spread_facts(stories: list[list[str]], id_of_token: dict[str, int], rng: random.Random) -> Tensor:
    """Write each story's facts into a few places of its prompt.

    Args:
        stories: Fact tokens of each.
        id_of_token: Vocabulary.
        rng: Source of chance; also draws the length, which is the same for all.

    Returns:
        weights_BLV of every token in every place.
    """
    length = rng.randint(_MIN_LENGTH, _MAX_LENGTH)
    weights_BLV = torch.zeros(len(stories), length, len(id_of_token))
    for row, facts in enumerate(stories):
        for fact in facts:
            places = rng.sample(range(length), rng.randint(1, _COPIES_MAX))
            shares = [rng.uniform(*_WEIGHT) for _ in places]
            total = rng.uniform(*_TOTAL)
            for place, share in zip(places, shares, strict=True):
                weights_BLV[row, place, id_of_token[fact]] = total * share / sum(shares)
    return weights_BLV
