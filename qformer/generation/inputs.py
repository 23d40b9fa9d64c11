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
    """Soft prompts and one prompt, as `LanguageModel.generate` puts them together (cut to its `max_prompt_tokens`).

    Returns:
        inputs_SL, in the type of the language model's embeddings.
    """
    return language._generation_inputs([prefix_NL], [prompt])["inputs_embeds"][0]


@torch.no_grad()
def segment_inputs(language: LanguageModel, segments: Sequence[str | Tensor]) -> Tensor:
    """Texts and soft prompts in any order, for several media and turns; nothing is cut.

    The tokenizer's leading token, if any, comes once, in front of the first text, and an encoder's end token once, at
    the end: `[prefix_NL, prompt]` gives what `prompt_inputs` does.

    Args:
        language: The model that will read them.
        segments: Texts, and soft prompts [N, L] of any bridge.

    Returns:
        inputs_SL, in the type of the language model's embeddings.

    Raises:
        ValueError: If there is none, or soft prompts have another width than the model.
    """
    weight = cast(Any, language.model).get_input_embeddings().weight
    texts = [segment for segment in segments if isinstance(segment, str)]
    ids = [_ids(language, text, is_first=place == 0) for place, text in enumerate(texts)]
    if language.is_encoder_decoder:
        end = [int(language.tokenizer.eos_token_id)]
        segments, ids = ([*segments, ""], [*ids, end])
    rows, ids_left = [], iter(ids)
    for segment in segments:
        if isinstance(segment, str):
            text_ids = torch.tensor(next(ids_left), dtype=torch.long, device=weight.device)
            rows.append(language._embed(text_ids))
        elif segment.ndim != 2 or segment.shape[1] != language.width:
            raise ValueError(
                f"soft prompts are {tuple(segment.shape)} but the language model takes [rows, {language.width}]"
            )
        else:
            rows.append(segment.to(weight))
    if not rows:
        raise ValueError("no segments: give at least one text or soft prompts")
    return torch.cat(rows)


def num_text_tokens(language: LanguageModel, text: str) -> int:
    """Rows that `text` takes among `segment_inputs`, as a later segment."""
    return len(_ids(language, text, is_first=False))


def require_shareable(language: LanguageModel, num_bridges: int) -> None:
    """See that several bridges may share a language model: low-rank updates belong to one bridge alone.

    Raises:
        UserError: If the model carries updates and is to be shared.
    """
    if num_bridges > 1 and any(hasattr(module, "lora_A") for module in language.model.modules()):
        raise UserError(
            f"the language model carries low-rank updates (model.lora) of one bridge but {num_bridges} bridges would "
            "share it; serve that bridge by itself, or merge its updates with `qformer export`"
        )


def _ids(language: LanguageModel, text: str, *, is_first: bool) -> list[int]:
    if is_first:
        return language._text_ids(text)
    return list(language.tokenizer.encode(text, add_special_tokens=False))
