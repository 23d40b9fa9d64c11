"""Continuous batching: requests join and leave the batch at any step.

A step reads at most `prefill_tokens` of waiting prompts and then generates one token for every running request. The
engine knows no threads and no event loop: whoever owns it calls `step` (see `async_engine` and `completion`).
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
"""A request's news: what its text grew by, or why it has failed."""

_MAX_OVERTAKEN = 64
"""Requests that may pass a longer one which finds no place; then places are kept free for it."""

_Run = Callable[[int, Sequence[ActiveRequest]], Tensor]
"""One pass over the rows from a slot on, which gives their logits."""


class Engine:
    """Generates for many requests at once with one language model.

    Args:
        language: The frozen model; nobody else changes it meanwhile.
        kv_tokens: Most tokens whose keys and values are kept: running requests times the longest one's length at its
            end. `stats().kv_bytes` tells what that takes.
        max_requests: Most running requests.
        max_queue: Most waiting requests.
        prefill_tokens: Most input rows read in one step, so that newcomers hold the others up for so long only.

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
        """Whether a step has something to do."""
        return bool(self._batch.rows or self._waiting)

    @property
    def has_room(self) -> bool:
        """Whether another request may be queued."""
        return len(self._waiting) < self.max_queue

    def check(self, request: EngineRequest) -> None:
        """See that a request can be run at all.

        Raises:
            RequestError: If not, with what to change; `TooLongError` where that is the length.
            GenerationFailedError: If its inputs are no numbers.
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
        """Queue a request behind all others.

        Returns:
            Its number, by which `step` tells of it.

        Raises:
            RequestError: If it cannot be run.
            QueueFullError: If `max_queue` requests wait.
            GenerationFailedError: If its inputs are no numbers.
        """
        self.check(request)
        if not self.has_room:
            self._meter.refused += 1
            raise QueueFullError(f"{len(self._waiting)} requests wait, as many as may; try again later")
        needed = self._passes.tokens_needed(len(request.inputs_SL), request.settings.max_new_tokens)
        running = ActiveRequest(self._next_id, request, self.language, needed)
        self._next_id += 1
        self._waiting.append(running)
        return running.number

    def cancel(self, number: int) -> None:
        """Drop a request; it hears nothing more. One that is done, or unknown, changes nothing."""
        for row in self._batch.rows:
            if row.number == number:
                self._batch.remove(row, is_broken=True)  # nobody has looked at what its last pass wrote
                self._meter.cancelled += 1
                return
        for row in self._waiting:
            if row.number == number:
                self._waiting.remove(row)
                self._meter.cancelled += 1
                return

    def drop_all(self) -> list[int]:
        """Drop every request and the memory of their keys and values, and return their numbers.

        Raises:
            RuntimeError: If the device takes no more work, as CUDA does after some failures; this process is lost then.
        """
        dropped = [*self._drop_running(), *self._waiting]
        self._waiting.clear()
        self._meter.failed += len(dropped)
        next(self.language.model.parameters()).flatten()[:1].sum().item()  # asks the device
        return [row.number for row in dropped]

    @torch.inference_mode()
    def step(self) -> list[tuple[int, Outcome]]:
        """Read waiting prompts, generate a token for each running request, and tell what became of them.

        An exception of the model fails the requests that it comes from, and no others.
        """
        news: list[tuple[int, Outcome]] = []
        num_tokens = self._pass(*self._next_prompts(news), self._passes.prefill, news)
        generating = self._batch.rows[: self._batch.num_generating]
        for row in generating:
            row.num_reading = 1
        num_tokens += self._pass(0, generating, self._passes.decode, news)
        self._meter.step(num_tokens)
        return news

    def stats(self) -> EngineStats:
        """What the engine does and did."""
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

    def _next_prompts(self, news: list[tuple[int, Outcome]]) -> tuple[int, list[ActiveRequest]]:
        """Admit requests as the budgets allow, and say what to read of each.

        Returns:
            The first slot and the rows; the padded pass has at most `prefill_tokens` input rows, or one prompt's part.
        """
        first = self._batch.num_generating
        rows = self._batch.rows[first:]
        for begun in rows:
            begun.num_reading = min(begun.num_inputs - begun.num_cached, self.prefill_tokens)
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
            except Exception as error:  # no memory, most likely, and that of the others is lost
                news += [(lost.number, self._failure(lost, error)) for lost in [*self._drop_running(), row]]
                return 0, []
            rows.append(row)
        return first, rows

    def _next_fitting(self) -> ActiveRequest | None:
        """The waiting request to admit next: the first one, or a shorter one while that finds no place."""
        if not self._waiting:
            return None
        may_pass = self._waiting[0].num_overtaken < _MAX_OVERTAKEN
        most_tokens = self._batch.most_tokens()
        candidates = self._waiting if may_pass else [self._waiting[0]]
        return next((row for row in candidates if row.tokens_needed <= most_tokens), None)

    def _pass(self, first: int, rows: list[ActiveRequest], run: _Run, news: list[tuple[int, Outcome]]) -> int:
        """Run some rows, take what they generated and part from those that are done.

        Returns:
            How many tokens that were.
        """
        outcomes = self._outcomes(first, rows, run) if rows else []
        num_tokens = 0
        for row in rows:  # before any leaves, for then others are moved with all that they have
            row.num_cached += row.num_reading
        for row, outcome in zip(rows, outcomes, strict=True):
            if isinstance(outcome, int):
                num_tokens += 1
                try:
                    self._take(row, outcome, news)
                    continue
                except Exception as error:
                    outcome = self._failure(row, error)
            if outcome is not None:
                self._batch.remove(row, is_broken=True)
                news.append((row.number, outcome))
        return num_tokens

    def _take(self, row: ActiveRequest, token_id: int, news: list[tuple[int, Outcome]]) -> None:
        if not row.ids:
            self._meter.first_token(time.monotonic() - row.queued_at_s, row.num_inputs)
            row.inputs_SL = None
        delta = row.push(token_id, self.language.end_ids)
        if delta is not None:
            news.append((row.number, delta))
            if delta.finish_reason is not None:
                self._meter.finished += 1
                self._batch.remove(row)

    def _outcomes(self, first: int, rows: list[ActiveRequest], run: _Run) -> list[int | Exception | None]:
        """The next token of each row; why there is none; or None where a prompt is not read yet.

        A pass that fails is tried again row by row: it writes what it wrote before.
        """
        try:
            logits_NV = run(first, rows)
            choosing = [row for row in rows if row.is_read_next]  # those in front
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
