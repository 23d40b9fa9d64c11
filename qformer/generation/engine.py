"""Continuous batching: requests join and leave the batch at any step.

A step reads at most `prefill_tokens` of waiting prompts and then generates one token for every running request. The
engine has no thread and no event loop: its owner calls `step` (see `async_engine` and `completion`).
"""

import collections
import logging
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qformer.generation.batch import RunningBatch
from qformer.generation.passes.decoder import DecoderPasses
from qformer.generation.passes.encoder_decoder import EncoderDecoderPasses
from qformer.generation.requests.active_request import ActiveRequest
from qformer.generation.requests.request import (
    Delta,
    EngineRequest,
    GenerationFailedError,
    QueueFullError,
    RequestError,
    TooLongError,
)
from qformer.generation.requests.token_selection import NOT_FINITE, GenerationRules, select_tokens
from qformer.generation.statistics import EngineMeter, EngineStats
from qformer.language import LanguageModel

logger = logging.getLogger(__name__)

Outcome = Delta | Exception
"""Outcome of a step for a request: its new text, or its error."""

_MAX_OVERTAKEN = 64
"""Requests that may overtake a longer one that does not fit; after that, memory is reserved for it."""

_Run = Callable[[int, Sequence[ActiveRequest]], Tensor]
"""One pass over the rows from a first slot; returns their logits."""


class Engine:
    """Generates for many requests at once with one language model.

    Args:
        language: Frozen model, which must not change during use.
        kv_tokens: Largest number of tokens with stored keys and values: running requests times the final length of the
            longest one. `stats().kv_bytes` is their memory.
        max_requests: Largest number of running requests.
        max_queue: Largest number of waiting requests.
        prefill_tokens: Largest number of input rows read in one step; bounds the delay that new requests cause.

    Raises:
        UserError: If the engine cannot run the model.
        ValueError: If a size is not positive.
    """

    def __init__(
        self,
        language: LanguageModel,
        *,
        kv_tokens: int,
        max_requests: int,
        max_queue: int = 1024,
        prefill_tokens: int = 512,
    ) -> None:
        sizes = {"kv_tokens": kv_tokens, "max_requests": max_requests, "prefill_tokens": prefill_tokens}
        for name, size in {**sizes, "max_queue": max_queue}.items():
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1")
        self.language = language
        self.kv_tokens, self.max_requests, self.max_queue = kv_tokens, max_requests, max_queue
        self.prefill_tokens = prefill_tokens
        self._passes = (EncoderDecoderPasses if language.is_encoder_decoder else DecoderPasses)(language)
        self._rules = GenerationRules.of(language.model, language.end_ids, language.is_encoder_decoder)
        self._waiting: collections.deque[ActiveRequest] = collections.deque()
        self._batch = RunningBatch(self._passes.slots, kv_tokens, max_requests)
        self._next_id = 0
        self._meter = EngineMeter()

    @property
    def is_busy(self) -> bool:
        """Whether a step has work to do."""
        return bool(self._batch.rows or self._waiting)

    @property
    def has_room(self) -> bool:
        """Whether another request may be queued."""
        return len(self._waiting) < self.max_queue

    def check(self, request: EngineRequest) -> None:
        """Check that a request can be run at all.

        Raises:
            RequestError: If not; the message says what to change. `TooLongError` where that is the length.
            GenerationFailedError: If its inputs are not finite.
        """
        inputs_SL, width = request.inputs_SL, self.language.width
        if inputs_SL.ndim != 2 or not len(inputs_SL) or inputs_SL.shape[1] != width:
            raise RequestError(f"inputs are {tuple(inputs_SL.shape)} but the language model takes [rows, {width}]")
        needed = self._passes.tokens_needed(len(inputs_SL), request.settings.max_new_tokens)
        if needed > self.kv_tokens:
            raise TooLongError(
                f"{len(inputs_SL)} input rows and max_new_tokens={request.settings.max_new_tokens} need {needed} "
                f"tokens of memory, the engine has kv_tokens={self.kv_tokens}; shorten the prompt or lower "
                "max_new_tokens",
                self.kv_tokens,
            )
        if not inputs_SL.isfinite().all():
            message = "inputs hold NaN or infinity; the image's features or the bridge's weights are broken"
            raise GenerationFailedError(message)

    def add(self, request: EngineRequest) -> int:
        """Queue a request after all others.

        Returns:
            Number of the request in the results of `step`.

        Raises:
            RequestError: If it cannot be run.
            QueueFullError: If `max_queue` requests wait.
            GenerationFailedError: If its inputs are not finite.
        """
        self.check(request)
        if not self.has_room:
            self._meter.refused += 1
            raise QueueFullError(f"{len(self._waiting)} requests wait, which is the limit; try again later")
        needed = self._passes.tokens_needed(len(request.inputs_SL), request.settings.max_new_tokens)
        running = ActiveRequest(self._next_id, request, self.language, needed)
        self._next_id += 1
        self._waiting.append(running)
        return running.number

    def cancel(self, number: int) -> None:
        """Drop a request, which has no further outcome. A finished or unknown number has no effect."""
        for row in self._batch.rows:
            if row.number == number:
                self._batch.remove(row, is_broken=True)  # the output of its last pass was not checked
                self._meter.cancelled += 1
                return
        for row in self._waiting:
            if row.number == number:
                self._waiting.remove(row)
                self._meter.cancelled += 1
                return

    def drop_all(self) -> list[int]:
        """Drop every request and the memory of keys and values; return the requests' numbers.

        Raises:
            RuntimeError: If the device fails permanently, as CUDA does after some errors; the process must restart.
        """
        dropped = [*self._drop_running(), *self._waiting]
        self._waiting.clear()
        self._meter.failed += len(dropped)
        next(self.language.model.parameters()).flatten()[:1].sum().item()  # checks the device
        return [row.number for row in dropped]

    @torch.inference_mode()
    def step(self) -> list[tuple[int, Outcome]]:
        """Read waiting prompts, generate a token for each running request, and return their outcomes.

        An exception of the model fails the requests that cause it, and no others.
        """
        outcomes: list[tuple[int, Outcome]] = []
        num_tokens = self._pass(*self._next_prompts(outcomes), self._passes.prefill, outcomes)
        generating = self._batch.rows[: self._batch.num_generating]
        for row in generating:
            row.num_reading = 1
        num_tokens += self._pass(0, generating, self._passes.decode, outcomes)
        self._meter.step(num_tokens)
        return outcomes

    def stats(self) -> EngineStats:
        """Statistics of the engine."""
        slots = self._passes.slots
        return self._meter.stats(
            queued=len(self._waiting),
            running=len(self._batch.rows),
            kv_tokens=self.kv_tokens,
            kv_tokens_reserved=len(self._batch.rows) * slots.capacity,
            kv_bytes=self.kv_tokens * slots.bytes_per_token,
        )

    def _drop_running(self) -> list[ActiveRequest]:
        dropped = self._batch.rows
        self._passes.slots.reset()
        self._batch = RunningBatch(self._passes.slots, self.kv_tokens, self.max_requests)
        return dropped

    def _next_prompts(self, outcomes: list[tuple[int, Outcome]]) -> tuple[int, list[ActiveRequest]]:
        """Admit requests within the budgets, and set how many rows to read of each.

        Returns:
            The first slot and the rows; the padded pass has at most `prefill_tokens` input rows, or part of one prompt.
        """
        first = self._batch.num_generating
        rows = self._batch.rows[first:]
        for partial in rows:
            partial.num_reading = min(partial.num_inputs - partial.num_cached, self.prefill_tokens)
        longest = max((row.num_reading for row in rows), default=0)
        while (row := self._next_fitting()) is not None:
            wider = max(longest, row.num_inputs)
            if rows and wider * (len(rows) + 1) > self.prefill_tokens:
                break
            if row is not self._waiting[0]:
                self._waiting[0].num_overtaken += 1
            self._waiting.remove(row)
            longest = wider
            row.num_reading = min(row.num_inputs, self.prefill_tokens) if self._passes.is_chunked else row.num_inputs
            try:
                self._batch.append(row)
            except Exception as error:  # most likely out of memory, and the memory of the others is lost
                outcomes += [(lost.number, self._failure(lost, error)) for lost in [*self._drop_running(), row]]
                return 0, []
            rows.append(row)
        return first, rows

    def _next_fitting(self) -> ActiveRequest | None:
        """The waiting request to admit next: the first one, or a shorter one if the first does not fit."""
        if not self._waiting:
            return None
        may_pass = self._waiting[0].num_overtaken < _MAX_OVERTAKEN
        most_tokens = self._batch.most_tokens()
        candidates = self._waiting if may_pass else [self._waiting[0]]
        return next((row for row in candidates if row.tokens_needed <= most_tokens), None)

    def _pass(self, first: int, rows: list[ActiveRequest], run: _Run, outcomes: list[tuple[int, Outcome]]) -> int:
        """Run some rows, store their tokens and remove finished ones.

        Returns:
            Number of generated tokens.
        """
        results = self._outcomes(first, rows, run) if rows else []
        num_tokens = 0
        for row in rows:  # before any is removed, because removal moves others with their cached tokens
            row.num_cached += row.num_reading
        for row, result in zip(rows, results, strict=True):
            if isinstance(result, int):
                num_tokens += 1
                try:
                    self._push_token(row, result, outcomes)
                    continue
                except Exception as error:
                    result = self._failure(row, error)
            if result is not None:
                self._batch.remove(row, is_broken=True)
                outcomes.append((row.number, result))
        return num_tokens

    def _push_token(self, row: ActiveRequest, token_id: int, outcomes: list[tuple[int, Outcome]]) -> None:
        if not row.ids:
            self._meter.first_token(time.monotonic() - row.queued_at_s, row.num_inputs)
            row.inputs_SL = None
        delta = row.push(token_id, self.language.end_ids)
        if delta is not None:
            outcomes.append((row.number, delta))
            if delta.finish_reason is not None:
                self._meter.finished += 1
                self._batch.remove(row)

    def _outcomes(self, first: int, rows: list[ActiveRequest], run: _Run) -> list[int | Exception | None]:
        """The next token of each row, its error, or None where the prompt is not fully read.

        A failed pass is repeated row by row; it overwrites its own keys and values.
        """
        try:
            logits_NV = run(first, rows)
            choosing = [row for row in rows if row.is_read_next]
            chosen = select_tokens(logits_NV[: len(choosing)], choosing, self._rules) if choosing else []
        except Exception as error:
            if len(rows) > 1:
                return [one for place, row in enumerate(rows) for one in self._outcomes(first + place, [row], run)]
            return [self._failure(rows[0], error)]
        not_finite = FloatingPointError("its logits hold NaN or infinity")
        tokens: list[int | Exception | None] = [
            self._failure(row, not_finite) if token == NOT_FINITE else token
            for row, token in zip(choosing, chosen, strict=True)
        ]
        return tokens + [None] * (len(rows) - len(tokens))

    def _failure(self, row: ActiveRequest, error: Exception) -> GenerationFailedError:
        logger.error("the language model failed on request %d", row.number, exc_info=error)
        self._meter.failed += 1
        failure = GenerationFailedError(f"the language model failed on this request: {error}")
        failure.__cause__ = error
        return failure
