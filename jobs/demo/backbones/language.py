"""Train the demo's tiny causal language model to put facts from soft prompts into words.

A model trained on captions alone ignores soft prompts. This one gets, before every caption, embeddings that hold the
facts of the caption in slots, corrupted like the output of a half-trained bridge (`facts`).

It must also name colour-shape pairs that never occur in its training. Trained on the 32 training pairs alone, it learns
that the other 8 do not exist (a quarter of held-out images right). So many colours and shapes are replaced by made-up
ones, which are removed from the vocabulary after training: with some 500 pairs, copying is simpler than memorising the
pairs. For the same reason, a word whose fact is missing is not scored, so that the model does not learn to guess it.
"""

import logging
import math
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from torch.nn import functional as F

from jobs.demo.backbones.facts import CLEAN, FULL, embed_prompts, fact_tokens
from jobs.demo.backbones.language_batches import IGNORED, MADE_UP_COLOURS, MADE_UP_SHAPES, made_up_facts, sample_batch
from jobs.demo.backbones.lookup_init import VALUES_OF_KIND, init_lookup, mix_facts
from jobs.demo.world.grammar import vocabulary
from jobs.demo.world.scenes import MOTIONS, RELATIONS
from qformer.torch_build.torchvision import import_torchvision

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

WIDTH = 128
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
NUM_STEPS = 2000
NUM_CLEAN_STEPS = 300
PEAK_LEARNING_RATE = 3e-3
LOG_EVERY_STEPS = 100
MAX_NEW_TOKENS = 20
HIDDEN_WORD_RATE = 0.1
# Without smoothing, pairs outside the training set become impossible, which outweighs a fact in the prompt.
LABEL_SMOOTHING = 0.1
PHRASE_WEIGHT = 0.3
PLACE_WEIGHT = 1.5
logger = logging.getLogger(__name__)


def build_tokenizer(made_up: Sequence[str] = ()) -> "PreTrainedTokenizerFast":
    """Make a word-level tokenizer that begins every text with `<bos>` and never adds `<eos>`.

    Args:
        made_up: Words that exist during training only; they come last, so that they can be removed.
    """
    return word_tokenizer([*SPECIAL_TOKENS, *vocabulary(), *fact_tokens(), *made_up])


def word_tokenizer(words: Sequence[str]) -> "PreTrainedTokenizerFast":
    """Make a tokenizer of whole words that begins every text with `<bos>`; `words` begin with `SPECIAL_TOKENS`."""
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bos = ("<bos>", SPECIAL_TOKENS.index("<bos>"))
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[bos])
    return import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def build_model(vocabulary_size: int) -> "LlamaForCausalLM":
    """Make the untrained model."""
    transformers = import_transformers()
    config = transformers.LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        # Attention finds slots by content, so most of a head's width should not depend on the distance.
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        initializer_range=0.06,
        # The embedding of a fact contains that of its word. With tied weights, the fact would compete with the word.
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.LlamaForCausalLM(config)
    return model


def caption_loss(
    model: "LlamaForCausalLM",
    prompts_BLD: Tensor,
    ids_BT: Tensor,
    targets_BT: Tensor | None = None,
    label_smoothing: float = 0.0,
    weight_V: Tensor | None = None,
) -> Tensor:
    """Return the weighted mean cross-entropy of captions and their ends, given soft prompts before `<bos>`.

    Args:
        model: The language model.
        prompts_BLD: Soft prompts.
        ids_BT: `<bos>` caption `<eos>`, then padding.
        targets_BT: Targets at all positions but the last; None: `ids_BT` without padding.
        label_smoothing: Share of each target that is spread over all words.
        weight_V: Weight of each word in the mean; first words weigh `PHRASE_WEIGHT`. None: equal weights.
    """
    words_BTD = model.get_input_embeddings()(ids_BT[:, :-1])
    hidden_BLD = model.model(inputs_embeds=torch.cat([prompts_BLD, words_BTD], dim=1)).last_hidden_state
    # Padding is on the right and attention is causal: no mask needed, only the targets are ignored.
    logits_BTV = model.lm_head(hidden_BLD[:, prompts_BLD.shape[1] :])
    if targets_BT is None:
        targets_BT = ids_BT[:, 1:].masked_fill(ids_BT[:, 1:] == model.config.pad_token_id, IGNORED)
    losses_BT = F.cross_entropy(
        logits_BTV.transpose(1, 2), targets_BT, ignore_index=IGNORED, label_smoothing=label_smoothing, reduction="none"
    )
    weights_BT = (targets_BT != IGNORED).float()
    if weight_V is not None:
        weights_BT = weights_BT * weight_V[targets_BT.clamp(min=0)]
        # The first words of a caption are random, even if they state a relation.
        weights_BT[:, 0] = PHRASE_WEIGHT
    return (losses_BT * weights_BT).sum() / weights_BT.sum()


def train_language(seed: int = 0, num_steps: int = NUM_STEPS) -> "tuple[LlamaForCausalLM, PreTrainedTokenizerFast]":
    """Train the model from scratch; about five minutes on one core."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = build_tokenizer([*MADE_UP_COLOURS, *MADE_UP_SHAPES, *made_up_facts()])
    model = build_model(len(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.1)
    mixing_VN, parts_ND, row_of_part = mix_facts(tokenizer, WIDTH)
    init_lookup(model, tokenizer, parts_ND, row_of_part)
    parts_ND.requires_grad_()
    optimizer.add_param_group({"params": [parts_ND]})
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, num_steps))
    attribute_ids = _ids(tokenizer, (word for words in VALUES_OF_KIND.values() for word in words))
    # Paraphrases are random; words that facts determine get a larger weight.
    weight_V = torch.full((len(tokenizer),), PHRASE_WEIGHT)
    weight_V[attribute_ids] = 1
    # Relations and motions are the hardest to learn, and the end token states that there is no second thing.
    weight_V[_ids(tokenizer, {*" ".join((*MOTIONS, *RELATIONS)).split(), "<eos>"})] = PLACE_WEIGHT
    model.train()
    for step in range(num_steps):
        noise = CLEAN if step < NUM_CLEAN_STEPS else FULL
        batch = sample_batch(tokenizer, rng, noise)
        embedding_VD = mixing_VN @ torch.cat([model.get_input_embeddings().weight, parts_ND])
        prompts_BLD = embed_prompts(batch.weights, embedding_VD, noise.noise_std_max)
        if step >= NUM_CLEAN_STEPS:
            # The output of a bridge has any scale, so train on half to three times that of the embeddings.
            log_scale_B11 = torch.empty(len(prompts_BLD), 1, 1).uniform_(math.log(0.5), math.log(3))
            prompts_BLD = prompts_BLD * log_scale_B11.exp()
        # Words that are replaced by <unk> give no hint about their neighbours; only the prompt does.
        is_hidden_BT = torch.isin(batch.ids, attribute_ids) & (torch.rand(batch.ids.shape) < HIDDEN_WORD_RATE)
        is_hidden_BT[:, 1:] |= (batch.targets == IGNORED) & (batch.ids[:, 1:] != tokenizer.pad_token_id)
        read_BT = batch.ids.masked_fill(is_hidden_BT, tokenizer.unk_token_id)
        loss = caption_loss(model, prompts_BLD, read_BT, batch.targets, LABEL_SMOOTHING, weight_V)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % LOG_EVERY_STEPS == 0:
            logger.info("language step %d of %d: loss %.3f", step, num_steps, loss.item())
    with torch.no_grad():
        words_VD = model.get_input_embeddings().weight
        words_VD.copy_(mixing_VN @ torch.cat([words_VD, parts_ND]))
    tokenizer = build_tokenizer()
    model.resize_token_embeddings(len(tokenizer))
    return model.eval(), tokenizer


@torch.no_grad()
def greedy_captions(model: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerFast", prompts_BLD: Tensor) -> list[str]:
    """Return the greedy caption after each soft prompt and `<bos>`."""
    bos_11D = model.get_input_embeddings().weight[tokenizer.bos_token_id][None, None]
    inputs_BLD = torch.cat([prompts_BLD, bos_11D.expand(len(prompts_BLD), 1, -1)], dim=1)
    mask_BL = torch.ones(inputs_BLD.shape[:2], dtype=torch.long)
    ids_BT = model.generate(
        inputs_embeds=inputs_BLD, attention_mask=mask_BL, max_new_tokens=MAX_NEW_TOKENS, do_sample=False
    )
    return list(tokenizer.batch_decode(ids_BT, skip_special_tokens=True))


def save_language(model: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerFast", folder: Path) -> None:
    """Write model and tokenizer in the layout of transformers."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _ids(tokenizer: "PreTrainedTokenizerFast", words: Iterable[str]) -> Tensor:
    return torch.tensor([tokenizer.get_vocab()[word] for word in words])


def import_transformers() -> ModuleType:
    """Import transformers; works even if the installed torchvision does not fit torch."""
    import_torchvision()
    import transformers

    return transformers


def _rate(step: int, num_steps: int) -> float:
    if step < 100:
        return (step + 1) / 100
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - 100) / (num_steps - 100)))
