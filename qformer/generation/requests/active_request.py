"""One request from its admission to its end.

Dimensions: S input rows, L language-model width.
"""

import time
from collections.abc import Collection

import torch
from torch import Tensor

from qformer.generation.requests.request import Delta, EngineRequest, FinishReason, Usage
from qformer.generation.requests.text_stream import TextStream
from qformer.language import LanguageModel


class ActiveRequest:
    """State of one request.

    Args:
        number: The engine's name for it.
        request: What is asked.
        language: Whose tokenizer makes the text.
        tokens_needed: Slot it takes at its longest, tokens.
    """

    def __init__(self, number: int, request: EngineRequest, language: LanguageModel, tokens_needed: int) -> None:
        self.number, self.settings, self.tokens_needed = number, request.settings, tokens_needed
        self.inputs_SL: Tensor | None = request.inputs_SL
        """None once read."""
        self.num_inputs = len(request.inputs_SL)
        self.num_cached = 0
        """Tokens whose keys and values lie in the slot."""
        self.num_reading = 0
        """Tokens that the next pass reads."""
        self.generator = torch.Generator()
        if self.settings.temperature > 0.0:
            self.generator.manual_seed(self.settings.seed)
        self._text = TextStream(language.tokenizer, self.settings.stop, request.is_streamed)
        self._num_told = 0
        self.queued_at_s = time.monotonic()
        self.num_overtaken = 0
        """Later requests that were admitted before it."""

    @property
    def ids(self) -> list[int]:
        """Tokens generated so far."""
        return self._text.ids

    @property
    def is_generating(self) -> bool:
        """Whether its prompt is read."""
        return self.num_cached >= self.num_inputs

    @property
    def is_read_next(self) -> bool:
        """Whether the next pass reads the last of its prompt, or what was generated since."""
        return self.num_cached + self.num_reading >= self.num_inputs

    def push(self, token_id: int, end_ids: Collection[int]) -> Delta | None:
        """Take the token that a pass gave; None where there is nothing to tell of it yet."""
        piece = self._text.add(token_id)
        reason: FinishReason | None = None
        if token_id in end_ids or self._text.is_stopped:
            reason = "stop"
        elif len(self.ids) >= self.settings.max_new_tokens:
            reason = "length"
        if reason is not None:
            piece += self._text.finish()
        if reason is None and not piece:
            return None
        fresh, self._num_told = tuple(self.ids[self._num_told :]), len(self.ids)
        return Delta(piece, fresh, reason, Usage(self.num_inputs, len(self.ids)))
