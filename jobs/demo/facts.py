"""Facts about scenes as tokens, laid out in slots of soft prompts: what the tiny language model reads.

A prompt has T frames of S slots. A slot holds a weighted sum of fact tokens' embeddings, plus noise. The
order of facts, the slot a fact stands in and empty slots mean nothing; only the frame does, as a set.

Dimensions: B batch, L = T * S slots, V vocabulary.
"""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from jobs.demo.render import Placed, moved, place
from jobs.demo.scenes import COLOURS, MOTIONS, RELATIONS, SHAPES, SIZES, Scene, Thing

NONE_FACT = "<none>"
NUM_BINS = 4
_MOTION_FACT = dict(
    zip(MOTIONS, ("<motion:sideways>", "<motion:updown>", "<motion:blink>", "<motion:still>"), strict=True)
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Clutter:
    """How far prompts depart from clean facts; every field 0 gives clean ones."""

    noise_std_max: float = 0.0
    """Noise on every slot, drawn up to this, relative to the embeddings' own standard deviation."""
    scale_spread: float = 0.0
    """A fact's weight is drawn from 1 - 2/3 of this to 1 + this."""
    repeat_rate: float = 0.0
    """Chance that a fact stands in a second slot too."""
    share_rate: float = 0.0
    """Chance that a fact joins a slot already taken."""
    bleed_rate: float = 0.0
    """Share of prompts whose empty slots hold a weak mixture of facts."""
    frame_drop_rate: float = 0.0
    """Chance that a fact is dropped from one frame though others keep it."""


CLEAN = Clutter()
FULL = Clutter(
    noise_std_max=0.5,
    scale_spread=0.6,
    repeat_rate=0.15,
    share_rate=0.2,
    bleed_rate=0.3,
    frame_drop_rate=0.2,
)


def fact_tokens() -> list[str]:
    """Return every fact token, in a fixed order."""
    things = [f"<{who}:{value}>" for who in "ab" for value in (*SIZES, *COLOURS, *SHAPES)]
    bins = [f"<{who}:{axis}{index}>" for who in "ab" for axis in "xy" for index in range(NUM_BINS)]
    relations = [relation_fact(relation) for relation in RELATIONS]
    return [*things, *bins, *relations, *_MOTION_FACT.values(), NONE_FACT]


def relation_fact(relation: str) -> str:
    """Return the token of a relation of the first thing to the second."""
    return f"<rel:{relation.split()[0]}>"


def thing_facts(who: str, thing: Thing) -> list[str]:
    """Return the three tokens of one thing ("a" or "b")."""
    return [f"<{who}:{value}>" for value in (thing.size, thing.colour, thing.shape)]


def place_facts(who: str, placed: Placed) -> list[str]:
    """Return the two tokens of a thing's coarse place."""
    return [f"<{who}:{axis}{_bin(value)}>" for axis, value in (("x", placed.x), ("y", placed.y))]


def image_facts(scene: Scene, rng: random.Random, *, place_rate: float, relation_rate: float) -> list[list[str]]:
    """Return the facts of a still scene as its only frame.

    Args:
        scene: The scene; its first thing becomes "a".
        rng: Source of chance.
        place_rate: Chance that places are told.
        relation_rate: Chance that a told relation is told by its own token; otherwise by places alone.
    """
    placed = place(scene, rng)
    facts = [fact for who, thing in zip("ab", scene.things, strict=False) for fact in thing_facts(who, thing)]
    places = [fact for who, thing in _by_thing(scene, placed) for fact in place_facts(who, thing)]
    if scene.relation is None:
        return [facts + (places if rng.random() < place_rate else [])]
    steps = [abs(_bin(getattr(placed[0], axis)) - _bin(getattr(placed[1], axis))) for axis in "xy"]
    along, across = steps if scene.canonical().relation == "left of" else steps[::-1]
    if along > across and rng.random() >= relation_rate:
        return [facts + places]
    return [[*facts, relation_fact(scene.relation), *(places if rng.random() < place_rate else [])]]


def clip_facts(scene: Scene, rng: random.Random, num_frames: int, *, motion_fact_rate: float) -> list[list[str]]:
    """Return the facts of each frame of a moving scene.

    Args:
        scene: A scene of one thing with a motion.
        rng: Source of chance.
        num_frames: Frames to tell; a single one always carries the motion's own token.
        motion_fact_rate: Chance of the motion's own token, beside or instead of the evidence for it.
    """
    assert scene.motion is not None
    (placed,) = place(scene, rng)
    is_reversed = rng.random() < 0.5
    frames = []
    for index in range(num_frames):
        now = moved(placed, scene.motion, (index + 0.5) / num_frames, is_reversed)
        is_visible = now.is_visible
        if scene.motion == "blinking" and num_frames != 4:
            is_visible = (index % 2 == 0) != is_reversed
        frames.append([*thing_facts("a", now.thing), *place_facts("a", now)] if is_visible else [NONE_FACT])
    if num_frames == 1 or rng.random() < motion_fact_rate:
        if num_frames == 1:
            frames = [[*thing_facts("a", placed.thing), *(place_facts("a", placed) if rng.random() < 0.3 else [])]]
        elif rng.random() < 0.5:
            frames = [thing_facts("a", placed.thing) for _ in frames]
        chosen = range(num_frames) if rng.random() < 0.5 else [rng.randrange(num_frames)]
        for index in chosen:
            frames[index].append(_MOTION_FACT[scene.motion])
    return frames


def fill_slots(
    prompts: list[list[list[str]]],
    num_slots: int,
    id_of_token: dict[str, int],
    clutter: Clutter,
    rng: random.Random,
) -> Tensor:
    """Spread each prompt's facts over its frames' slots at random.

    Args:
        prompts: For each prompt, for each frame, the facts; all with the same number of frames.
        num_slots: Slots in a frame.
        id_of_token: Vocabulary.
        clutter: How untidy.
        rng: Source of chance.

    Returns:
        weights_BLV of every token in every slot.
    """
    num_frames = len(prompts[0])
    weights_BLV = torch.zeros(len(prompts), num_frames * num_slots, len(id_of_token))
    for row, frames in enumerate(prompts):
        kept = _thin_out(frames, clutter, rng)
        has_bleed = rng.random() < clutter.bleed_rate
        for index, facts in enumerate(kept):
            entries = _assign(facts, num_slots, clutter, rng, has_bleed)
            for slot, fact, weight in entries:
                weights_BLV[row, index * num_slots + slot, id_of_token[fact]] += weight
    return weights_BLV


def embed_prompts(weights_BLV: Tensor, embedding_VD: Tensor, noise_std_max: float) -> Tensor:
    """Turn slots' weights into noisy soft prompts of shape BLD.

    Each prompt draws its own noise strength; one in four draws none at all.
    """
    prompts_BLD = weights_BLV @ embedding_VD
    if noise_std_max == 0:
        return prompts_BLD
    batch = len(prompts_BLD)
    strength_B11 = (torch.rand(batch, 1, 1) * 1.25 - 0.25).clamp(min=0) * noise_std_max
    std = embedding_VD.detach().std()
    return prompts_BLD + torch.randn_like(prompts_BLD) * strength_B11 * std


def _assign(
    facts: list[str], num_slots: int, clutter: Clutter, rng: random.Random, has_bleed: bool
) -> list[tuple[int, str, float]]:
    def weight() -> float:
        return rng.uniform(1 - clutter.scale_spread * 2 / 3, 1 + clutter.scale_spread)

    copies = facts + [fact for fact in facts if rng.random() < clutter.repeat_rate]
    free = list(range(num_slots))
    rng.shuffle(free)
    taken: list[int] = []
    entries = []
    for fact in copies:
        shares = taken and (not free or rng.random() < clutter.share_rate)
        slot = rng.choice(taken) if shares else free.pop()
        taken.append(slot)
        entries.append((slot, fact, weight()))
    if has_bleed and facts:
        entries += [(slot, rng.choice(facts), rng.uniform(0.1, 0.4)) for slot in free for _ in range(2)]
    return entries


def _thin_out(frames: list[list[str]], clutter: Clutter, rng: random.Random) -> list[list[str]]:
    """Drop facts from single frames, but never from all of them."""
    kept = [list(facts) for facts in frames]
    if len(frames) > 1:
        for facts in kept:
            for fact in list(facts):
                holders = sum(fact in other for other in kept)
                if holders > 1 and rng.random() < clutter.frame_drop_rate:
                    facts.remove(fact)
    return kept


def _by_thing(scene: Scene, placed: tuple[Placed, ...]) -> list[tuple[str, Placed]]:
    # `place` answers in canonical order, the tokens follow the scene's own.
    ordered = placed if scene.canonical() == scene else placed[::-1]
    return list(zip("ab", ordered, strict=False))


def _bin(value: float) -> int:
    # Centres lie between 0.1 and 0.9; a bin is a fifth of the canvas, the outer ones reach the edge.
    return min(NUM_BINS - 1, max(0, int((value - 0.1) / 0.2)))
