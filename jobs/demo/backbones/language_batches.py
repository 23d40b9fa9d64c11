"""Training batches of the demo's language model: facts in slots, and captions that state them."""

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from jobs.demo.backbones.facts import Group, PromptNoise, clip_facts, fill_slots, image_facts
from jobs.demo.world.grammar import captions
from jobs.demo.world.scenes import Kind, Scene, sample_scene

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENS_PER_BATCH = 2000
MADE_UP_COLOURS = tuple(f"colour{index}" for index in range(8))
MADE_UP_SHAPES = tuple(f"shape{index}" for index in range(8))
MADE_UP_RATE = 0.4
MISSING_RATE = 0.12
PAIR_RATE = 0.8
CLIP_RATE = 0.3
IGNORED = -100


@dataclass(frozen=True, slots=True)
class CaptionBatch:
    """Prompts and captions of equal prompt length."""

    weights: Tensor
    """Weight of every token in every slot, BLV."""
    ids: Tensor
    """Token ids: `<bos>` caption `<eos>`, then padding, BT."""
    targets: Tensor
    """Targets of the loss: `ids` without `<bos>`; padding and words without a fact are ignored, B(T-1)."""


def made_up_facts() -> list[str]:
    """Return the fact tokens of the made-up words."""
    return [f"<{value}>" for value in (*MADE_UP_COLOURS, *MADE_UP_SHAPES)]


def sample_batch(tokenizer: "PreTrainedTokenizerFast", rng: random.Random, noise: PromptNoise) -> CaptionBatch:
    """Draw prompts of one random shape, with one paraphrase each; no held-out pair ever occurs."""
    is_clip = rng.random() < CLIP_RATE
    num_frames, num_slots = _prompt_shape(rng, is_clip)
    id_of_token = tokenizer.get_vocab()
    prompts, texts, missing = [], [], []
    for _ in range(max(16, TOKENS_PER_BATCH // (num_frames * num_slots + 14))):
        kind: Kind = "clip" if is_clip else "pair" if rng.random() < PAIR_RATE else "single"
        scene = sample_scene(rng, kind, held_out=False)
        frames = clip_facts(scene, rng, num_frames) if is_clip else image_facts(scene, rng, place_rate=0.5)
        scene, frames = _swap_words(scene, frames, rng)
        frames, word = _drop_fact(scene, frames, rng) if rng.random() < MISSING_RATE else (frames, "<pad>")
        prompts.append(frames)
        texts.append(captions(scene, rng, 1)[0])
        missing.append(id_of_token[word])
    ids_BT = caption_ids(tokenizer, texts)
    is_unscored_BT = (ids_BT == tokenizer.pad_token_id) | (ids_BT == torch.tensor(missing)[:, None])
    targets_BT = ids_BT.masked_fill(is_unscored_BT, IGNORED)[:, 1:]
    weights_BLV = fill_slots(prompts, num_slots, id_of_token, noise, rng)
    return CaptionBatch(weights_BLV, ids_BT, targets_BT)


def caption_ids(tokenizer: "PreTrainedTokenizerFast", texts: list[str]) -> Tensor:
    """Return `<bos>` caption `<eos>` for every text, padded on the right."""
    rows = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in texts]
    longest = max(map(len, rows))
    return torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows])


def _prompt_shape(rng: random.Random, is_clip: bool) -> tuple[int, int]:
    num_slots = rng.choice((8, 12)) if rng.random() < 0.6 else rng.randint(6, 16)
    if not is_clip:
        return 1, num_slots
    return 4 if rng.random() < 0.6 else rng.choice((3, 5, 6)), num_slots


def _swap_words(scene: Scene, frames: list[list[Group]], rng: random.Random) -> tuple[Scene, list[list[Group]]]:
    """Replace some colours and shapes, in the scene and its facts, by made-up ones."""
    things = []
    swaps: list[dict[str, str]] = []
    for thing in scene.things:
        colour = rng.choice(MADE_UP_COLOURS) if rng.random() < MADE_UP_RATE else thing.colour
        shape = rng.choice(MADE_UP_SHAPES) if rng.random() < MADE_UP_RATE else thing.shape
        swaps.append({f"<{thing.colour}>": f"<{colour}>", f"<{thing.shape}>": f"<{shape}>"})
        things.append(replace(thing, colour=colour, shape=shape))
    swapped = [
        [
            {swap.get(fact, fact): weight for fact, weight in group.items()}
            for group, swap in zip(groups, swaps, strict=True)
        ]
        for groups in frames
    ]
    return replace(scene, things=tuple(things)), swapped


def _drop_fact(scene: Scene, frames: list[list[Group]], rng: random.Random) -> tuple[list[list[Group]], str]:
    """Remove the size, colour or shape of one thing from all frames; also return its word."""
    index = rng.randrange(len(scene.things))
    thing = scene.things[index]
    word = rng.choice((thing.size, thing.colour, thing.shape))
    return [
        [
            {fact: weight for fact, weight in group.items() if at != index or fact != f"<{word}>"}
            for at, group in enumerate(groups)
        ]
        for groups in frames
    ], word
