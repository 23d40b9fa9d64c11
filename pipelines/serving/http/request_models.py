"""Model calls on behalf of one request: decoding, prompts and embeddings, noted in the request's log record."""

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipelines.serving.contract.adapters import Adapter
from pipelines.serving.contract.errors import ApiError
from pipelines.serving.contract.wire import AnswerSettings, DecodedMedia, Prompt
from pipelines.serving.http.admission import RequestContext
from pipelines.serving.http.chat import Conversation, MediaInput
from pipelines.serving.workers.graph import Models

ValueT = TypeVar("ValueT")


@dataclass(frozen=True, slots=True)
class RequestModels:
    """The models, bound to one request."""

    models: Models
    context: RequestContext

    async def decode(self, medium: MediaInput, adapter: Adapter) -> DecodedMedia:
        """Fetch and decode one image or video.

        Raises:
            ApiError: If the media cannot be used; names the field of the request.
        """
        record = self.context.record
        record.num_media += 1
        try:
            decoded = await self.models.decode(medium.upload, adapter)
        except ApiError as error:
            raise ApiError.of(error.refusal, param=medium.param) from None
        record.num_frames += len(decoded.pixels)
        record.finish_stage("decoded")
        return decoded

    async def prompt(self, conversation: Conversation, adapter: Adapter, settings: AnswerSettings) -> Prompt:
        """Prompt of a conversation for the language model."""
        self.context.record.adapter = adapter

        async def soft_prompts(medium: MediaInput) -> NDArray[np.float32]:
            decoded = await self.decode(medium, adapter)
            return await self.models.soft_prompts(adapter, decoded, conversation.instruction)

        rows = iter(await gather([soft_prompts(medium) for medium in conversation.media]))
        self.context.record.finish_stage("encoded")
        segments = tuple(part if isinstance(part, str) else next(rows) for part in conversation.segments)
        return Prompt(segments=segments, settings=settings)

    async def embed(self, medium: MediaInput, adapter: Adapter) -> NDArray[np.float32]:
        """Query embeddings [N, E] of one image or clip."""
        decoded = await self.decode(medium, adapter)
        return await self.models.embed(adapter, decoded)


async def gather(coroutines: Sequence[Coroutine[Any, Any, ValueT]]) -> list[ValueT]:
    """Run coroutines concurrently; returns their results in order. When one fails, the others are cancelled."""
    if len(coroutines) == 1:
        return [await coroutines[0]]
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def mean_pool(queries_NE: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean over the queries, normalised: [E]."""
    mean_E = queries_NE.mean(axis=0)
    return mean_E / max(float(np.linalg.norm(mean_E)), 1e-12)
