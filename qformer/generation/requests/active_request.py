"""The state of one request from its admission to its end.

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
        number: Number of the request in the engine.
        request: The request.
        language: Language model with the tokenizer.
        tokens_needed: Size of its slot at its longest, in tokens.
    """

    def __init__(self, number: int, request: EngineRequest, language: LanguageModel, tokens_needed: int) -> None:
        self.number, self.settings, self.tokens_needed = number, request.settings, tokens_needed
        self.inputs_SL: Tensor | None = request.inputs_SL
        """Input rows; None after they were read."""
        self.num_inputs = len(request.inputs_SL)
        self.num_cached = 0
        """Number of tokens with keys and values in the slot."""
        self.num_reading = 0
        """Number of tokens that the next pass reads."""
        self.generator = torch.Generator()
        if self.settings.temperature > 0.0:
            self.generator.manual_seed(self.settings.seed)
        self._text = TextStream(language.tokenizer, self.settings.stop, request.is_streamed)
        self._num_returned = 0
        self.queued_at_s = time.monotonic()
        self.num_overtaken = 0
        """Number of later requests that were admitted first."""

    @property
    def ids(self) -> list[int]:
        """Generated tokens so far."""
        return self._text.ids

    @property
    def is_generating(self) -> bool:
        """Whether its prompt was read."""
        return self.num_cached >= self.num_inputs

    @property
    def is_read_next(self) -> bool:
        """Whether the next pass reads the end of its prompt, or a generated token."""
        return self.num_cached + self.num_reading >= self.num_inputs

    def push(self, token_id: int, end_ids: Collection[int]) -> Delta | None:
        """Add the token of a pass; return a delta, or None without new text."""
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
        fresh, self._num_returned = tuple(self.ids[self._num_returned :]), len(self.ids)
        return Delta(piece, fresh, reason, Usage(self.num_inputs, len(self.ids)))
