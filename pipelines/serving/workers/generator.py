"""The generator deployment: the frozen language model with continuous batching."""

import asyncio
import contextlib
import functools
import logging
from collections.abc import AsyncGenerator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch
from ray.util.metrics import Gauge

from pipelines.data.storage.local_copies import local_folder
from pipelines.inference.models import load_captioner
from pipelines.serving.contract.config import ServingConfig
from pipelines.serving.contract.errors import RETRY_AFTER_S, Refusal
from pipelines.serving.contract.wire import Piece, Prompt
from qformer.backbones import load_language
from qformer.config import LanguageSpec
from qformer.generation.async_engine import AsyncEngine, EngineClosedError
from qformer.generation.engine import Engine
from qformer.generation.requests.inputs import segment_inputs, text_ids
from qformer.generation.requests.request import (
    EngineRequest,
    GenerationFailedError,
    QueueFullError,
    RequestError,
    RequestSettings,
    TooLongError,
)
from qformer.language import LanguageModel, build_language_model

logger = logging.getLogger(__name__)

STATS_EVERY_S = 1.0
STREAM_EVERY_S = 0.03
"""Time between two pieces of a streamed answer: short enough to read fluently; each crosses two to four processes."""
LONG_PROMPT = 4096
"""Length of a prompt, in characters plus soft-prompt rows, above which it is read in a thread."""
_GAUGES = {
    "queued": "Prompts that wait for the batch.",
    "running": "Answers that are being generated.",
    "kv_tokens_reserved": "Tokens of the key-value cache in use.",
    "tokens_per_s": "Tokens generated per second, over the last seconds.",
    "mean_batch_size": "Answers per step, over the last seconds.",
    "time_to_first_token_p50_s": "Median time from queuing to the first token, over the last 1,024 answers.",
    "time_to_first_token_p95_s": "95th percentile of that time, over the last 1,024 answers.",
    "cancelled_total": "Answers cancelled by their clients since the start of the replica.",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageSource:
    """Source of the language model, the same for all adapters."""

    language: LanguageSpec
    """Its name is a hub name, a folder or a URI."""
    answer_end_id: int | None
    updated_by: str | None
    """Folder of the checkpoint whose LoRA updates apply; only with a single adapter. None: none."""

    def load(self, device: str) -> LanguageModel:
        """Load the language model.

        Raises:
            UserError: If it cannot be loaded.
        """
        if self.updated_by is not None:
            return load_captioner(local_folder(self.updated_by), device).language
        name = self.language.name
        local = LanguageSpec(str(local_folder(name))) if "://" in name else self.language
        model, tokenizer = load_language(local)
        if self.answer_end_id is not None:
            cast(Any, model).generation_config.eos_token_id = self.answer_end_id
        return build_language_model(model, tokenizer).to(device)


class GeneratorWorker:
    """One replica of the generator deployment.

    Args:
        source: Source of the language model.
        kv_tokens: Size of the key-value cache in tokens.
        max_sequences: Answers generated at once.
        max_prompt_tokens: Limit on the text tokens of a prompt, including the tokenizer's start token.
        use_gpu: Whether to run on CUDA.
        turn: Lock held for every step, shared with the encoder in the fused layout; None: no lock.
    """

    def __init__(
        self,
        source: LanguageSource,
        *,
        kv_tokens: int,
        max_sequences: int,
        max_prompt_tokens: int,
        use_gpu: bool,
        turn: AbstractContextManager[None] | None = None,
    ) -> None:
        self._language = source.load("cuda" if use_gpu else "cpu")
        self._max_prompt_tokens = max_prompt_tokens
        engine = Engine(self._language, kv_tokens=kv_tokens, max_requests=max_sequences)
        self._engine = AsyncEngine(engine, STREAM_EVERY_S, step_lock=turn)
        self._gauges = {name: Gauge(f"qformer_serve_{name}", text) for name, text in _GAUGES.items()}
        self._reporting: asyncio.Task[None] | None = None

    def check_health(self) -> None:
        """Check the engine; on an error, Serve replaces this replica.

        Raises:
            RuntimeError: If the engine has ended.
        """
        if not self._engine.is_alive:
            raise RuntimeError("the generation engine has ended; the log says why")

    async def answer(self, prompt: Prompt) -> Piece | Refusal:
        """Generate a whole answer."""
        return [piece async for piece in self._pieces(prompt, is_streamed=False)][-1]

    async def stream(self, prompt: Prompt) -> AsyncGenerator[Piece | Refusal, None]:
        """Generate an answer piece by piece; closing the iterator cancels it."""
        async with contextlib.aclosing(self._pieces(prompt, is_streamed=True)) as pieces:
            async for piece in pieces:
                yield piece

    async def _pieces(self, prompt: Prompt, *, is_streamed: bool) -> AsyncGenerator[Piece | Refusal, None]:
        if self._reporting is None or self._reporting.done():
            self._reporting = asyncio.create_task(self._report())
        # A switch to a thread takes longer than the tokenisation of a short prompt.
        is_long = sum(len(segment) for segment in prompt.segments) > LONG_PROMPT
        read = functools.partial(self._request, prompt, is_streamed)
        request = await asyncio.to_thread(read) if is_long else read()
        if isinstance(request, Refusal):
            yield request
            return
        try:
            async with contextlib.aclosing(self._engine.generate(request)) as deltas:
                async for delta in deltas:
                    usage = delta.usage
                    yield Piece(
                        text=delta.text,
                        finish_reason=delta.finish_reason,
                        prompt_tokens=usage.prompt_tokens,
                        completion_tokens=usage.completion_tokens,
                    )
        except TooLongError as error:
            yield _too_long(request, error.max_tokens)
        except QueueFullError:
            yield Refusal(503, "overloaded", "the model is busy; try again", retry_after_s=RETRY_AFTER_S)
        except EngineClosedError:
            yield Refusal(503, "unavailable", "the model is starting again; try later", retry_after_s=RETRY_AFTER_S)
        except (GenerationFailedError, RequestError):  # the input from the other deployments is broken
            logger.exception("generation failed")
            yield Refusal(500, "internal", "the model failed on this request; its log says why")

    def _request(self, prompt: Prompt, is_streamed: bool) -> EngineRequest | Refusal:
        """Embed the prompt; refuse it first if it is too long."""
        settings = prompt.settings
        ids = text_ids(self._language, [segment for segment in prompt.segments if isinstance(segment, str)])
        count = sum(map(len, ids))
        if count > self._max_prompt_tokens:
            message = f"{count} text tokens exceed the limit of {self._max_prompt_tokens}; shorten the messages"
            return Refusal(400, "context_length_exceeded", message, "messages")
        segments = [
            segment if isinstance(segment, str) else torch.from_numpy(segment.copy()) for segment in prompt.segments
        ]
        inputs_SL = segment_inputs(self._language, segments, ids)
        if not len(inputs_SL):
            return Refusal(400, "invalid_request", "the messages hold nothing that the model reads", "messages")
        return EngineRequest(
            inputs_SL=inputs_SL,
            settings=RequestSettings(
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                top_p=settings.top_p,
                repetition_penalty=settings.repetition_penalty,
                seed=settings.seed,
                stop=settings.stop,
            ),
            is_streamed=is_streamed,
        )

    async def _report(self) -> None:
        """Export the engine's statistics to Prometheus while it works, and until they are back at 0."""
        is_idle = False
        while not is_idle:
            await asyncio.sleep(STATS_EVERY_S)
            stats = self._engine.stats()
            is_idle = stats.running == stats.queued == stats.mean_batch_size == 0
            for name, gauge in self._gauges.items():
                gauge.set(getattr(stats, name))


def generator_options(config: ServingConfig) -> dict[str, Any] | None:
    """Arguments of `GeneratorWorker`; None where no adapter generates text."""
    if (shared := config.backbones.language) is None:
        return None
    updated_by = config.backbones.updated_by
    return {
        "source": LanguageSource(language=shared.language, answer_end_id=shared.answer_end_id, updated_by=updated_by),
        "kv_tokens": config.kv_tokens,
        "max_sequences": config.max_sequences,
        "max_prompt_tokens": config.requests.max_prompt_tokens,
        "use_gpu": config.use_gpu,
    }


def _too_long(request: EngineRequest, max_tokens: int) -> Refusal:
    """Error of a prompt that is too long, in terms of the HTTP interface instead of the engine's."""
    count, wanted = len(request.inputs_SL), request.settings.max_new_tokens
    message = (
        f"the prompt takes {count} tokens, those of images and frames with it, and max_tokens={wanted}; {max_tokens} "
        "is the most that the model takes of both: ask for fewer, shorten the prompt, or send fewer images"
    )
    return Refusal(400, "context_length_exceeded", message, "max_tokens" if count < max_tokens else "messages")
