"""Stage 2: generative learning; query outputs become soft prompts of a frozen decoder-only language model.

Dimensions: B batch, F frames, P image tokens, V encoder width, Q queries, T text tokens, L language-model width.
Reference: BLIP-2 (arXiv:2301.12597), section 3.3.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qformer.config import QFormerConfig
from qformer.model import QFormer


class Stage2(nn.Module):
    """The trainables of stage 2: vision layer norm, Q-Former without text branch, projection to the LM's width.

    Raises:
        ValueError: If the config has a text branch with an LM head.
    """

    def __init__(self, config: QFormerConfig, *, language_width: int) -> None:
        super().__init__()
        if config.has_text_branch and config.has_lm_head:
            raise ValueError(
                f"vocab_size={config.vocab_size} with has_lm_head=True: stage 2 generates with the language model, not "
                "with the Q-Former; set has_lm_head=False (or vocab_size=0 for queries without instruction)"
            )
        self.vision_norm = nn.LayerNorm(config.encoder_width, eps=config.vision_norm_eps)
        self.qformer = QFormer(config)
        self.language_projection = nn.Linear(config.hidden_size, language_width)

    def forward(self, image_BFPV: Tensor) -> Tensor:
        """Soft prompts of all frames in time order: [B, F*Q, L]."""
        frames = image_BFPV.shape[1]
        tokens_GPV = self.vision_norm(image_BFPV).flatten(0, 1)
        queries = self.qformer.forward_queries(self.qformer.image_key_values(tokens_GPV))
        return self.language_projection(queries.hidden_BQD).unflatten(0, (-1, frames)).flatten(1, 2)


def language_logits(language_model: nn.Module, prefix_BQL: Tensor, input_ids_BT: Tensor, is_text_BT: Tensor) -> Tensor:
    """Logits of the frozen LM at the text positions after the soft prompts.

    Args:
        language_model: A Hugging Face causal LM.
        prefix_BQL: Soft prompts.
        input_ids_BT: Right-padded text.
        is_text_BT: True at real tokens.

    Returns:
        [B, T + 1, vocab]: entry t predicts text token t; the last entry follows the text.
    """
    embedded_BTL = language_model.get_input_embeddings()(input_ids_BT)  # type: ignore[operator]
    inputs_BSL = torch.cat([prefix_BQL.to(embedded_BTL.dtype), embedded_BTL], dim=1)
    is_prefix_BQ = is_text_BT.new_ones(prefix_BQL.shape[:2])
    mask_BS = torch.cat([is_prefix_BQ, is_text_BT], dim=1).long()
    logits_BSV = language_model(inputs_embeds=inputs_BSL, attention_mask=mask_BS, use_cache=False).logits
    return logits_BSV[:, prefix_BQL.shape[1] - 1 :]


def language_loss(logits_BSV: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the labelled text tokens, as a sum and a count (labels of -100 do not count).

    Args:
        logits_BSV: From `language_logits`.
        labels_BT: Text ids, -100 for the prompt, padding and masked samples.
    """
    logits = logits_BSV[:, : labels_BT.shape[1]].flatten(0, 1).float()
    total = F.cross_entropy(logits, labels_BT.flatten(), ignore_index=-100, reduction="sum")
    return total, (labels_BT != -100).sum()


class Tokenizer(Protocol):
    """What stage 2 needs of a Hugging Face tokenizer."""

    bos_token_id: int | None
    eos_token_id: int
    pad_token_id: int | None

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with the leading token the model expects, if any."""

    def batch_decode(self, ids_BT: Tensor, *, skip_special_tokens: bool) -> list[str]:
        """Texts of rows of ids."""


def caption_ids(
    tokenizer: Tokenizer, captions: Sequence[str], *, prompt: str, max_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and labels of prompt + caption + end token, right-padded to the longest.

    A caption over `max_tokens` loses its last words, never its end token. The prompt (with the tokenizer's own leading
    token, where it adds one) is not counted in the loss; without a prompt that leading token is counted, as in LAVIS.

    Returns:
        input_ids_BT (int64), is_text_BT (bool), labels_BT (int64).
    """
    end, pad = tokenizer.eos_token_id, _pad_id(tokenizer)
    prompt_length = len(_text_ids(tokenizer, prompt)) if prompt else 0
    rows = [[*_text_ids(tokenizer, f"{prompt} {text}".strip())[: max_tokens - 1], end] for text in captions]
    length = max(len(row) for row in rows)
    input_ids_BT = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
    is_text_BT = torch.arange(length)[None] < torch.tensor([len(row) for row in rows])[:, None]
    labels_BT = input_ids_BT.masked_fill(~is_text_BT, -100)
    labels_BT[:, :prompt_length] = -100
    return input_ids_BT, is_text_BT, labels_BT


@torch.no_grad()
def generate(
    language_model: nn.Module, tokenizer: Tokenizer, prefix_BQL: Tensor, *, prompt: str, max_new_tokens: int
) -> list[str]:
    """Greedy captions after the soft prompts; all items share prompt and prefix length, so nothing is padded."""
    start = _text_ids(tokenizer, prompt)
    start_BT = torch.tensor([start] * prefix_BQL.shape[0], dtype=torch.long, device=prefix_BQL.device)
    embedded_BTL = language_model.get_input_embeddings()(start_BT)  # type: ignore[operator]
    inputs_BSL = torch.cat([prefix_BQL.to(embedded_BTL.dtype), embedded_BTL], dim=1)
    ids_BT = language_model.generate(  # type: ignore[operator]
        inputs_embeds=inputs_BSL,
        attention_mask=torch.ones(inputs_BSL.shape[:2], dtype=torch.long, device=inputs_BSL.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=_pad_id(tokenizer),
    )
    return [text.strip() for text in tokenizer.batch_decode(ids_BT, skip_special_tokens=True)]


def _text_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids without an end token, which some tokenizers append by themselves; OPT's leading token has the same id."""
    ids, end = tokenizer.encode(text), tokenizer.eos_token_id
    is_leading = len(ids) == 1 and tokenizer.bos_token_id == end
    return ids[:-1] if ids[-1:] == [end] and not is_leading else ids


def _pad_id(tokenizer: Tokenizer) -> int:
    """Padding is masked, so any id serves a tokenizer that has none."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
