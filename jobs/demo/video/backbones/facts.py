"""Facts about scenes as tokens at positions of soft prompts: the input of the video demo's tiny language model.

A fact names its thing ("the first thing is red"). Clips show one thing at a time, so a bridge that attends to a moment
need not choose a thing. The position of a fact has no meaning, and a fact may have several.

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
"""Range of the sum of a fact's weights over all its positions."""


def fact_tokens() -> list[str]:
    """Return every fact token, in a fixed order."""
    things = [f"{role} {value}" for role in _ROLES for value in (*COLOURS, *SHAPES)]
    values = [*things, *ACTIONS, *PITCHES, *(f"tone {side}" for side in SIDES)]
    return [f"<{value.replace(' ', '-')}>" for value in values]


def scene_facts(scene: ClipScene) -> dict[str, str]:
    """Return a scene's fact tokens, each with the only word that states it ("" if several words do)."""
    facts = {scene.action: ""}
    for role, thing in zip(_ROLES, scene.things, strict=False):
        facts |= {f"{role} {thing.colour}": thing.colour, f"{role} {thing.shape}": thing.shape}
    if scene.tone is not None:
        facts |= {scene.tone.pitch: scene.tone.pitch, f"tone {scene.tone.side}": ""}
    return {f"<{fact.replace(' ', '-')}>": word for fact, word in facts.items()}


def spread_facts(scenes: list[list[str]], id_of_token: dict[str, int], rng: random.Random) -> Tensor:
    """Write the facts of each scene to a few positions of its prompt.

    Args:
        scenes: Fact tokens of each scene.
        id_of_token: Vocabulary.
        rng: Random number generator; also draws the length, which is the same for all.

    Returns:
        weights_BLV of every token at every position.
    """
    length = rng.randint(_MIN_LENGTH, _MAX_LENGTH)
    weights_BLV = torch.zeros(len(scenes), length, len(id_of_token))
    for row, facts in enumerate(scenes):
        for fact in facts:
            positions = rng.sample(range(length), rng.randint(1, _COPIES_MAX))
            shares = [rng.uniform(*_WEIGHT) for _ in positions]
            total = rng.uniform(*_TOTAL)
            for position, share in zip(positions, shares, strict=True):
                weights_BLV[row, position, id_of_token[fact]] = total * share / sum(shares)
    return weights_BLV
