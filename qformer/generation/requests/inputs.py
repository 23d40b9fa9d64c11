"""Input rows of a request: soft prompts and embedded text in the order of the conversation.

Dimensions: N soft-prompt rows, S input rows, L language-model width.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from qformer.errors import UserError
from qformer.language import LanguageModel


@torch.no_grad()
def prompt_inputs(language: LanguageModel, prefix_NL: Tensor, prompt: str) -> Tensor:
    """Join soft prompts and one prompt as `LanguageModel.generate` does (truncated to its `max_prompt_tokens`).

    Returns:
        inputs_SL, in the type of the language model's embeddings.
    """
    return language._generation_inputs([prefix_NL], [prompt])["inputs_embeds"][0]


def text_ids(language: LanguageModel, texts: Sequence[str]) -> list[list[int]]:
    """Tokens of a prompt's texts; the tokenizer's leading token, if any, comes once, before the first text."""
    later = (list(language.tokenizer.encode(text, add_special_tokens=False)) for text in texts[1:])
    return [*map(language._text_ids, texts[:1]), *later]


@torch.no_grad()
def segment_inputs(
    language: LanguageModel, segments: Sequence[str | Tensor], ids: Sequence[list[int]] | None = None
) -> Tensor:
    """Join texts and soft prompts in any order, for several media and turns, without truncation.

    An encoder's end token comes once, at the end: `[prefix_NL, prompt]` gives the same as `prompt_inputs`.

    Args:
        language: Model that reads them.
        segments: Texts, and soft prompts [N, L] of any bridge.
        ids: Tokens of the texts from `text_ids`; None: they are tokenised here.

    Returns:
        inputs_SL, in the type of the language model's embeddings.

    Raises:
        ValueError: If there is none, or soft prompts have another width than the model.
    """
    weight = cast(Any, language.model).get_input_embeddings().weight
    if ids is None:
        ids = text_ids(language, [segment for segment in segments if isinstance(segment, str)])
    if language.is_encoder_decoder:
        end = [int(language.tokenizer.eos_token_id)]
        segments, ids = ([*segments, ""], [*ids, end])
    rows, remaining_ids = [], iter(ids)
    for segment in segments:
        if isinstance(segment, str):
            ids_T = torch.tensor(next(remaining_ids), dtype=torch.long, device=weight.device)
            rows.append(language._embed(ids_T))
        elif segment.ndim != 2 or segment.shape[1] != language.width:
            raise ValueError(
                f"soft prompts are {tuple(segment.shape)} but the language model takes [rows, {language.width}]"
            )
        else:
            rows.append(segment.to(weight))
    if not rows:
        raise ValueError("no segments: give at least one text or soft prompts")
    return torch.cat(rows)


def require_shareable(language: LanguageModel, num_bridges: int) -> None:
    """Check that several bridges may share a language model: low-rank updates belong to one bridge.

    Raises:
        UserError: If the model has updates and several bridges.
    """
    if num_bridges > 1 and any(hasattr(module, "lora_A") for module in language.model.modules()):
        raise UserError(
            f"the language model has low-rank updates (model.lora) of one bridge but {num_bridges} bridges would "
            "share it; serve that bridge by itself, or merge its updates with `qformer export`"
        )
