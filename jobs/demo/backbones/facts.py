"""Facts about scenes as tokens in slots of soft prompts: the training input of the tiny language model.

A prompt has T frames of S slots. The facts of one thing (size, colour, shape, place) share a slot: a weighted sum of
the embeddings of their tokens, plus noise. The slot alone binds facts to a thing, so a query that attends to one part
of a picture and copies its content is already a good bridge. Facts that name their thing instead ("the first thing's
colour is red") were learnt only after a thousand steps or never in measurements: a query must then both choose a thing
and name it, and neither helps without the other. Relations and motions follow from places only. The index of a slot has
no meaning, slots may be empty, and a thing may fill several.

Dimensions: B batch, L = T * S slots, V vocabulary.
"""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from jobs.demo.world.render import Placement, move_to, place
from jobs.demo.world.scenes import COLOURS, SHAPES, SIZES, Scene, Thing

NONE_FACT = "<none>"
NUM_BINS = 5
Group = dict[str, float]
"""Facts of one slot, with their weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptNoise:
    """Corruption of prompts; with every field 0, prompts are clean."""

    noise_std_max: float = 0.0
    """Largest noise on every slot, relative to the standard deviation of the embeddings."""
    scale_spread: float = 0.0
    """Range of the weight of a fact: factors from 1 - 2/3 of this to 1 + this."""
    copies_max: int = 0
    """Largest number of further slots with weaker, incomplete copies of a thing's facts."""
    bleed_rate: float = 0.0
    """Share of prompts in which every slot also holds a weak mixture of all facts of the frame."""
    frame_drop_rate: float = 0.0
    """Probability that a fact is missing in one frame while others have it."""


CLEAN = PromptNoise()
FULL = PromptNoise(
    noise_std_max=0.5,
    scale_spread=0.6,
    copies_max=3,
    bleed_rate=0.5,
    frame_drop_rate=0.15,
)


def fact_tokens() -> list[str]:
    """Return every fact token, in a fixed order."""
    bins = [f"<{axis}{index}>" for axis in "xy" for index in range(NUM_BINS)]
    return [*(f"<{value}>" for value in (*SIZES, *COLOURS, *SHAPES)), *bins, NONE_FACT]


def thing_facts(thing: Thing) -> Group:
    """Return the size, colour and shape of a thing."""
    return {f"<{value}>": 1.0 for value in (thing.size, thing.colour, thing.shape)}


def place_facts(placed: Placement) -> Group:
    """Return the place of a thing: on each axis the two nearest of `NUM_BINS` bins, weighted by distance."""
    facts: Group = {}
    for axis, value in (("x", placed.x), ("y", placed.y)):
        position = min(1.0, max(0.0, (value - 0.1) / 0.8)) * (NUM_BINS - 1)
        low = min(int(position), NUM_BINS - 2)
        facts |= {f"<{axis}{low}>": 1 - (position - low), f"<{axis}{low + 1}>": position - low}
    return {fact: weight for fact, weight in facts.items() if weight > 0}


def image_facts(scene: Scene, rng: random.Random, *, place_rate: float = 1.0) -> list[list[Group]]:
    """Return the facts of a still scene as its only frame, a group for each thing.

    Args:
        scene: The scene.
        rng: Random number generator.
        place_rate: Probability that a single thing gets the facts of its place.
    """
    placed = place(scene, rng)
    # `place` returns the things in canonical order.
    things = [thing_facts(one.thing) | place_facts(one) for one in placed]
    if scene.relation is None and rng.random() >= place_rate:
        things = [thing_facts(one.thing) for one in placed]
    return [things]


def clip_facts(scene: Scene, rng: random.Random, num_frames: int) -> list[list[Group]]:
    """Return the facts of each frame of a moving scene.

    Args:
        scene: A scene of one thing with a motion.
        rng: Random number generator.
        num_frames: Number of frames.
    """
    assert scene.motion is not None
    (placed,) = place(scene, rng)
    is_reversed = rng.random() < 0.5
    frames: list[list[Group]] = []
    for index in range(num_frames):
        now = move_to(placed, scene.motion, (index + 0.5) / num_frames, is_reversed)
        is_visible = now.is_visible
        if scene.motion == "blinking" and num_frames != 4:
            is_visible = (index % 2 == 0) != is_reversed
        frames.append([thing_facts(now.thing) | place_facts(now) if is_visible else {NONE_FACT: 1.0}])
    return frames


def fill_slots(
    prompts: list[list[list[Group]]],
    num_slots: int,
    id_of_token: dict[str, int],
    noise: PromptNoise,
    rng: random.Random,
) -> Tensor:
    """Assign the groups of each prompt to random slots of its frames.

    Args:
        prompts: Groups by prompt and frame; all prompts have the same number of frames.
        num_slots: Number of slots per frame.
        id_of_token: Vocabulary.
        noise: Corruption of the prompts.
        rng: Random number generator.

    Returns:
        weights_BLV of every token in every slot.
    """
    num_frames = len(prompts[0])
    weights_BLV = torch.zeros(len(prompts), num_frames * num_slots, len(id_of_token))
    for row, frames in enumerate(prompts):
        has_bleed = rng.random() < noise.bleed_rate
        for index, groups in enumerate(_drop_from_frames(frames, noise, rng)):
            for slot, facts in _assign(groups, num_slots, noise, rng, has_bleed):
                for fact, weight in facts.items():
                    weights_BLV[row, index * num_slots + slot, id_of_token[fact]] += weight
    return weights_BLV


def embed_prompts(weights_BLV: Tensor, embedding_VD: Tensor, noise_std_max: float) -> Tensor:
    """Embed the weights of slots as noisy soft prompts of shape BLD.

    Each prompt draws its own noise strength; one in four draws none at all.
    """
    prompts_BLD = weights_BLV @ embedding_VD
    if noise_std_max == 0:
        return prompts_BLD
    strength_B11 = (torch.rand(len(prompts_BLD), 1, 1) * 1.25 - 0.25).clamp(min=0) * noise_std_max
    return prompts_BLD + torch.randn_like(prompts_BLD) * strength_B11 * embedding_VD.detach().std()


def _assign(
    groups: list[Group], num_slots: int, noise: PromptNoise, rng: random.Random, has_bleed: bool
) -> list[tuple[int, Group]]:
    def scaled(group: Group, share: float, include_rate: float = 1.0) -> Group:
        spread = noise.scale_spread
        return {
            fact: weight * share * rng.uniform(1 - spread * 2 / 3, 1 + spread)
            for fact, weight in group.items()
            if rng.random() < include_rate
        }

    free = rng.sample(range(num_slots), num_slots)
    entries = []
    for group in groups:
        entries.append((free.pop(), scaled(group, 1.0)))
        for _ in range(rng.randint(0, noise.copies_max)):
            if len(free) > len(groups):
                entries.append((free.pop(), scaled(group, rng.uniform(0.3, 1.0), include_rate=0.8)))
    if has_bleed:
        strength = rng.uniform(0.05, 0.4)
        entries += [(slot, scaled(group, strength)) for slot in range(num_slots) for group in groups]
    return entries


def _drop_from_frames(frames: list[list[Group]], noise: PromptNoise, rng: random.Random) -> list[list[Group]]:
    """Drop facts of size, colour and shape from single frames, never from all; facts of places stay."""
    remaining = [[dict(group) for group in groups] for groups in frames]
    if len(frames) > 1:
        for groups in remaining:
            for group in groups:
                for fact in [fact for fact in group if fact[1:-1] in (*SIZES, *COLOURS, *SHAPES)]:
                    holders = sum(fact in other for others in remaining for other in others)
                    if holders > 1 and rng.random() < noise.frame_drop_rate:
                        del group[fact]
    return remaining
