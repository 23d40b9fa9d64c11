"""From conversations to prompts and scores: the work behind the endpoints, over `Models`."""

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipelines.serving.contract.adapters import Adapter
from pipelines.serving.contract.errors import ApiError
from pipelines.serving.contract.wire import AnswerSettings, Decoded, Prompt
from pipelines.serving.http.admission import Context
from pipelines.serving.http.chat import Conversation, Medium
from pipelines.serving.workers.graph import Models

ValueT = TypeVar("ValueT")


@dataclass(frozen=True, slots=True)
class Work:
    """The models on behalf of one request."""

    models: Models
    context: Context

    async def decode(self, medium: Medium, adapter: Adapter) -> Decoded:
        """Fetch and decode one image or video.

        Raises:
            ApiError: With the field that it came in.
        """
        record = self.context.record
        record.num_media += 1
        try:
            decoded = await self.models.decode(medium.upload, adapter)
        except ApiError as error:
            raise ApiError.of(error.refusal, param=medium.param) from None
        record.num_frames += len(decoded.pixels)
        record.reached("decoded")
        return decoded

    async def prompt(self, conversation: Conversation, adapter: Adapter, settings: AnswerSettings) -> Prompt:
        """What the language model reads of a conversation."""
        self.context.record.adapter = adapter

        async def soft_prompts(medium: Medium) -> NDArray[np.float32]:
            decoded = await self.decode(medium, adapter)
            return await self.models.soft_prompts(adapter, decoded, conversation.instruction)

        rows = iter(await together([soft_prompts(medium) for medium in conversation.media]))
        self.context.record.reached("encoded")
        segments = tuple(part if isinstance(part, str) else next(rows) for part in conversation.segments)
        return Prompt(segments=segments, settings=settings)

    async def embed(self, medium: Medium, adapter: Adapter) -> NDArray[np.float32]:
        """Query embeddings [N, E] of one image or clip."""
        decoded = await self.decode(medium, adapter)
        return await self.models.embed(adapter, decoded)


async def together(jobs: Sequence[Coroutine[Any, Any, ValueT]]) -> list[ValueT]:
    """Results of all jobs, in order; when one fails, the others are cancelled."""
    if len(jobs) == 1:
        return [await jobs[0]]
    tasks = [asyncio.create_task(job) for job in jobs]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def mean_pooled(queries_NE: NDArray[np.float32]) -> NDArray[np.float32]:
    """One normalised vector [E]."""
    mean_E = queries_NE.mean(axis=0)
    return mean_E / max(float(np.linalg.norm(mean_E)), 1e-12)
