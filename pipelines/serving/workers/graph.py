"""Interface of the ingress to the other deployments, and its implementation by Serve handles."""

import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from ray.serve.handle import DeploymentHandle

from pipelines.serving.contract.adapters import Adapter
from pipelines.serving.contract.config import ApiKey
from pipelines.serving.contract.errors import ApiError, Refusal, unavailable
from pipelines.serving.contract.uploads import Upload
from pipelines.serving.contract.wire import DecodedMedia, MatchScore, Piece, Prompt, TextEmbeddings
from pipelines.serving.workers.calls import call, stream


class Models(Protocol):
    """The model calls of the HTTP interface; failures are `ApiError`s."""

    async def decode(self, upload: Upload, adapter: Adapter) -> DecodedMedia:
        """Fetch and decode one file."""

    async def soft_prompts(self, adapter: Adapter, clip: DecodedMedia, instruction: str) -> NDArray[np.float32]:
        """Soft prompts of one image or clip for the language model."""

    async def embed(self, adapter: Adapter, clip: DecodedMedia) -> NDArray[np.float32]:
        """Query embeddings [N, E]."""

    async def embed_texts(self, adapter: Adapter, texts: Sequence[str]) -> TextEmbeddings:
        """Embeddings of texts."""

    async def match(self, adapter: Adapter, clip: DecodedMedia, texts: Sequence[str]) -> list[MatchScore]:
        """Score each text against one image or clip."""

    async def answer(self, prompt: Prompt) -> Piece:
        """Generate a whole answer."""

    def stream(self, prompt: Prompt) -> AsyncGenerator[Piece, None]:
        """Generate an answer piece by piece."""

    async def take_quota(self, key: ApiKey) -> int:
        """Admit a request of `key`; returns a lease to release at its end."""

    async def give_quota(self, key: ApiKey, lease: int) -> None:
        """Release the lease of a request that has ended."""


class SharedQuotas:
    """The quota calls of `Models`, which go to one deployment for all replicas.

    Args:
        quotas: Handle of the quota deployment; None where there are no keys.
    """

    def __init__(self, quotas: DeploymentHandle | None) -> None:
        self._quotas = quotas

    async def take_quota(self, key: ApiKey) -> int:
        """Call the quota deployment."""
        if self._quotas is None:
            raise unavailable()
        handle = self._quotas.take
        return unwrap(await call(lambda: handle.remote(key), "quotas"))

    async def give_quota(self, key: ApiKey, lease: int) -> None:
        """Call the quota deployment."""
        if self._quotas is not None:
            handle = self._quotas.give_back
            await call(lambda: handle.remote(key, lease), "quotas")


class RemoteModels(SharedQuotas):
    """`Models` whose workers are other deployments.

    Args:
        media: Handle of the media deployment.
        encoder: Handle of the encoder deployment.
        generator: Handle of the generator deployment; None where no adapter generates text.
        quotas: Handle of the quota deployment; None where there are no keys.
    """

    def __init__(
        self,
        media: DeploymentHandle,
        encoder: DeploymentHandle,
        generator: DeploymentHandle | None,
        quotas: DeploymentHandle | None,
    ) -> None:
        super().__init__(quotas)
        self._media, self._encoder, self._generator = media, encoder, generator
        self._handles: dict[tuple[str, str], DeploymentHandle] = {}
        self._stream = None if generator is None else generator.options(method_name="stream", stream=True)

    async def decode(self, upload: Upload, adapter: Adapter) -> DecodedMedia:
        """Call the media deployment."""
        return unwrap(await call(lambda: self._media.decode.remote(upload, adapter), "decoding"))

    async def soft_prompts(self, adapter: Adapter, clip: DecodedMedia, instruction: str) -> NDArray[np.float32]:
        """Call the encoder deployment."""
        handle = self._of(adapter, "soft_prompts")
        return await call(lambda: handle.remote(adapter, clip, instruction), "encoding")

    async def embed(self, adapter: Adapter, clip: DecodedMedia) -> NDArray[np.float32]:
        """Call the encoder deployment."""
        handle = self._of(adapter, "embed")
        return await call(lambda: handle.remote(adapter, clip), "embedding")

    async def embed_texts(self, adapter: Adapter, texts: Sequence[str]) -> TextEmbeddings:
        """Call the encoder deployment."""
        handle = self._of(adapter, "embed_texts")
        return unwrap(await call(lambda: handle.remote(adapter, texts), "embedding texts"))

    async def match(self, adapter: Adapter, clip: DecodedMedia, texts: Sequence[str]) -> list[MatchScore]:
        """Call the encoder deployment."""
        handle = self._of(adapter, "match")
        return unwrap(await call(lambda: handle.remote(adapter, clip, texts), "matching"))

    async def answer(self, prompt: Prompt) -> Piece:
        """Call the generator deployment."""
        if self._generator is None:
            raise unavailable()
        handle = self._generator.answer
        return unwrap(await call(lambda: handle.remote(prompt), "generation"))

    async def stream(self, prompt: Prompt) -> AsyncGenerator[Piece, None]:
        """Call the generator deployment; closing the iterator cancels the call."""
        if (handle := self._stream) is None:
            raise unavailable()
        async with contextlib.aclosing(stream(lambda: handle.remote(prompt), "generation")) as pieces:
            async for piece in pieces:
                yield unwrap(piece)

    def _of(self, adapter: Adapter, method: str) -> DeploymentHandle:
        """Handle of an encoder method, routed to a replica that has the adapter loaded."""
        found = self._handles.get((adapter.key, method))
        if found is None:
            found = self._encoder.options(multiplexed_model_id=adapter.key, method_name=method)
            self._handles[adapter.key, method] = found
        return found


def unwrap(answer: Any) -> Any:
    """Return the answer of a worker.

    Raises:
        ApiError: If the answer is a refusal.
    """
    if isinstance(answer, Refusal):
        raise ApiError.of(answer)
    return answer
