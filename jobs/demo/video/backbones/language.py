"""Train the video demo's tiny causal language model to put facts from soft prompts into words.

Like `jobs.demo.backbones.language`, it must name colour-shape pairs that never occur in its training. So some input
words are replaced by <unk> and give no hint about their neighbours, and a word whose fact is missing is not scored.

Dimensions: B batch, L prompt length, T tokens, D width.
"""

import logging
import math
import random
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from jobs.demo.backbones.facts import embed_prompts
from jobs.demo.backbones.language import (
    SPECIAL_TOKENS,
    caption_loss,
    greedy_captions,
    import_transformers,
    word_tokenizer,
)  # fmt: skip
from jobs.demo.backbones.language_batches import IGNORED, caption_ids
from jobs.demo.video.backbones.facts import fact_tokens, scene_facts, spread_facts
from jobs.demo.video.world.grammar import captions, paraphrase, vocabulary
from jobs.demo.video.world.scenes import draw_scenes

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

WIDTH = 64
NUM_STEPS = 1500
BATCH_SIZE = 64
PEAK_LEARNING_RATE = 3e-3
EMBEDDING_STD = 0.5
"""Roughly the standard deviation of a linear layer's output after a layer norm, such as the output of a bridge."""
NOISE_STD_MAX = 0.5
HIDDEN_WORD_RATE = 0.3
MISSING_RATE = 0.1
LABEL_SMOOTHING = 0.05
LOG_EVERY_STEPS = 250
logger = logging.getLogger(__name__)


def build_clip_tokenizer() -> "PreTrainedTokenizerFast":
    """Make the tokenizer of the grammar's words and the facts."""
    return word_tokenizer([*SPECIAL_TOKENS, *vocabulary(), *fact_tokens()])


def build_clip_model(vocabulary_size: int) -> "LlamaForCausalLM":
    """Make the untrained model."""
    transformers = import_transformers()
    config = transformers.LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=128,
        # Attention finds facts by content, so most of a head's width should not depend on the distance.
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        initializer_range=0.06,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.LlamaForCausalLM(config)
    model.get_input_embeddings().weight.data.normal_(std=EMBEDDING_STD)
    return model


def train_clip_language(
    seed: int = 0, num_steps: int = NUM_STEPS
) -> "tuple[LlamaForCausalLM, PreTrainedTokenizerFast]":
    """Train the model from scratch; about two minutes on one core."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = build_clip_tokenizer()
    model = build_clip_model(len(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, num_steps))
    # Equal weights; with weights given, `caption_loss` gives first words a small one, because openings are random.
    weight_V = torch.ones(len(tokenizer))
    model.train()
    for step in range(num_steps):
        weights_BLV, ids_BT, targets_BT = _sample(tokenizer, rng)
        embedding_VD = model.get_input_embeddings().weight
        prompts_BLD = embed_prompts(weights_BLV, embedding_VD, NOISE_STD_MAX)
        # The output of a bridge has any scale, so train on half to three times that of the embeddings.
        log_scale_B11 = torch.empty(len(prompts_BLD), 1, 1).uniform_(math.log(0.5), math.log(3))
        is_hidden_BT = (torch.rand(ids_BT.shape) < HIDDEN_WORD_RATE) & (ids_BT >= len(SPECIAL_TOKENS))
        read_BT = ids_BT.masked_fill(is_hidden_BT, tokenizer.unk_token_id)
        loss = caption_loss(model, prompts_BLD * log_scale_B11.exp(), read_BT, targets_BT, LABEL_SMOOTHING, weight_V)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % LOG_EVERY_STEPS == 0:
            logger.info("clip language step %d of %d: loss %.3f", step, num_steps, loss.item())
    return model.eval(), tokenizer


def caption_accuracy(
    model: "LlamaForCausalLM",
    tokenizer: "PreTrainedTokenizerFast",
    *,
    noise_std: float,
    count: int = 200,
    seed: int = 1,
) -> float:
    """Measure how often the model's greedy caption of a held-out scene's facts is a caption of that scene.

    Args:
        model: The language model.
        tokenizer: Its tokenizer.
        noise_std: Noise on every position of the prompt, relative to the embeddings' standard deviation.
        count: Number of scenes.
        seed: Seed of scenes, positions and noise.
    """
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    scenes = draw_scenes(rng, count, held_out=True)
    weights_BLV = spread_facts([list(scene_facts(scene)) for scene in scenes], tokenizer.get_vocab(), rng)
    embedding_VD = model.get_input_embeddings().weight.detach()
    prompts_BLD = embed_prompts(weights_BLV, embedding_VD, noise_std_max=0)
    noise_BLD = noise_std * embedding_VD.std() * torch.randn(prompts_BLD.shape, generator=generator)
    texts = greedy_captions(model, tokenizer, prompts_BLD + noise_BLD)
    return sum(text in captions(scene) for text, scene in zip(texts, scenes, strict=True)) / count


def _sample(tokenizer: "PreTrainedTokenizerFast", rng: random.Random) -> tuple[Tensor, Tensor, Tensor]:
    """Draw weights of prompts BLV, captions BT and targets B(T-1); no held-out pair ever occurs."""
    id_of_token = tokenizer.get_vocab()
    scenes = draw_scenes(rng, BATCH_SIZE, held_out=False)
    prompts, texts, unscored = [], [], []
    for scene in scenes:
        facts, missing = scene_facts(scene), ""
        if rng.random() < MISSING_RATE:
            fact = rng.choice([fact for fact, word in facts.items() if word])
            missing = facts.pop(fact)
        prompts.append(list(facts))
        texts.append(paraphrase(scene, rng))
        unscored.append(id_of_token[missing or "<pad>"])
    ids_BT = caption_ids(tokenizer, texts)
    is_unscored_BT = (ids_BT == tokenizer.pad_token_id) | (ids_BT == torch.tensor(unscored)[:, None])
    return spread_facts(prompts, id_of_token, rng), ids_BT, ids_BT.masked_fill(is_unscored_BT, IGNORED)[:, 1:]


def _rate(step: int, num_steps: int) -> float:
    if step < 100:
        return (step + 1) / 100
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - 100) / (num_steps - 100)))
