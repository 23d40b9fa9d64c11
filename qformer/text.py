"""Text of the Q-Former: any Hugging Face tokenizer with [CLS], [SEP] and padding, and [DEC].

Dimensions: B batch, T text tokens.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qformer.errors import UserError
from qformer.torch_build.torchvision import import_torchvision

DEC_TOKEN = "[DEC]"


class EncodedText(NamedTuple):
    """Tokenised texts, padded to the longest."""

    input_ids_BT: Tensor
    """int64, `[CLS] … [SEP]`."""
    is_text_BT: Tensor
    """True at real tokens."""
    num_truncated: int
    """Number of truncated texts."""


class TextTokenizer:
    """Captions to `[CLS] … [SEP]` ids; [DEC] is the next id after the tokenizer's own.

    Args:
        tokenizer: A Hugging Face tokenizer with cls, sep and pad tokens, pad being id 0 as in BERT.
        max_tokens: Length at which captions are truncated, keeping [SEP].

    Raises:
        UserError: If one of the three tokens is missing, or padding has another id.
    """

    def __init__(self, tokenizer: Any, max_tokens: int) -> None:
        missing = [name for name in ("cls_token", "sep_token", "pad_token") if getattr(tokenizer, name) is None]
        if missing:
            raise UserError(f"model.tokenizer: {tokenizer.name_or_path!r} has no {missing[0]}; use a BERT tokenizer")
        if tokenizer.pad_token_id != 0:
            # The Q-Former's embedding of id 0 gets no gradient.
            raise UserError(
                f"model.tokenizer: {tokenizer.name_or_path!r} pads with id {tokenizer.pad_token_id} but the Q-Former's "
                "padding is id 0; use a BERT tokenizer, or 'corpus' to learn one from the captions"
            )
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens

    @property
    def vocab_size(self) -> int:
        """Ids including [DEC], which imported tokenizers hold already (with other tokens after it, unused here)."""
        dec_id = self.tokenizer.get_vocab().get(DEC_TOKEN, len(self.tokenizer))
        return int(dec_id) + 1

    def encode(self, captions: Sequence[str]) -> EncodedText:
        """Tokenise captions; one over the limit keeps [SEP] as its last token, and is counted."""
        rows = self.tokenizer(list(captions), verbose=False)["input_ids"]
        truncated = [row if len(row) <= self.max_tokens else [*row[: self.max_tokens - 1], row[-1]] for row in rows]
        length = max(len(row) for row in truncated)
        pad = self.tokenizer.pad_token_id
        input_ids_BT = torch.tensor([row + [pad] * (length - len(row)) for row in truncated])
        is_text_BT = torch.arange(length)[None] < torch.tensor([len(row) for row in truncated])[:, None]
        return EncodedText(input_ids_BT, is_text_BT, sum(len(row) > self.max_tokens for row in rows))

    def save(self, folder: Path) -> None:
        """Write the tokenizer's ordinary files."""
        self.tokenizer.save_pretrained(str(folder))


def load_text_tokenizer(name: str, max_tokens: int, vocab_size: int | None = None) -> TextTokenizer:
    """Load by hub name or local folder.

    Raises:
        UserError: If it cannot be loaded, is not `TextTokenizer`'s kind, or is not the one of a Q-Former of
            `vocab_size`.
    """
    import_torchvision()
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise UserError(
            f"model.tokenizer: cannot load {name!r}; give a local folder, or 'corpus' to learn one from the captions "
            f"({str(error).strip().splitlines()[0][:200]})"
        ) from error
    tokenizer = TextTokenizer(loaded, max_tokens)
    if vocab_size not in (None, tokenizer.vocab_size):
        raise UserError(
            f"tokenizer: {name!r} has {tokenizer.vocab_size} ids with [DEC] but the Q-Former vocab_size={vocab_size}; "
            "give the tokenizer it was trained with"
        )
    return tokenizer
