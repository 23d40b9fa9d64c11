"""The other deployments, as the ingress uses them."""

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
from pipelines.serving.contract.wire import Decoded, Matched, Piece, Prompt, TextEmbeddings
from pipelines.serving.workers.calls import call, stream


class Models(Protocol):
    """What the HTTP interface asks for; failures are `ApiError`s."""

    async def decode(self, upload: Upload, adapter: Adapter) -> Decoded:
        """Fetch and decode one file."""

    async def soft_prompts(self, adapter: Adapter, clip: Decoded, instruction: str) -> NDArray[np.float32]:
        """What the language model reads of one image or clip."""

    async def embed(self, adapter: Adapter, clip: Decoded) -> NDArray[np.float32]:
        """Query embeddings [N, E]."""

    async def embed_texts(self, adapter: Adapter, texts: Sequence[str]) -> TextEmbeddings:
        """Embeddings of texts."""

    async def match(self, adapter: Adapter, clip: Decoded, texts: Sequence[str]) -> list[Matched]:
        """How well each text fits."""

    async def answer(self, prompt: Prompt) -> Piece:
        """A whole answer."""

    def stream(self, prompt: Prompt) -> AsyncGenerator[Piece, None]:
        """An answer as it grows."""

    async def take_quota(self, key: ApiKey) -> int:
        """Let a request of `key` in; give the lease back at its end."""

    async def give_quota(self, key: ApiKey, lease: int) -> None:
        """The request has ended."""


class SharedQuotas:
    """The part of `Models` that all replicas share.

    Args:
        quotas: Of `QuotaKeeper`; None where there are no keys.
    """

    def __init__(self, quotas: DeploymentHandle | None) -> None:
        self._quotas = quotas

    async def take_quota(self, key: ApiKey) -> int:
        """See `Models`."""
        if self._quotas is None:
            raise unavailable()
        handle = self._quotas.take
        return accepted(await call(lambda: handle.remote(key), "quotas"))

    async def give_quota(self, key: ApiKey, lease: int) -> None:
        """See `Models`."""
        if self._quotas is not None:
            handle = self._quotas.give_back
            await call(lambda: handle.remote(key, lease), "quotas")


class RemoteModels(SharedQuotas):
    """`Models` by handles.

    Args:
        media: Of `MediaWorker`.
        encoder: Of `EncoderWorker`.
        generator: Of `GeneratorWorker`; None where no adapter answers in text.
        quotas: See `SharedQuotas`.
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

    async def decode(self, upload: Upload, adapter: Adapter) -> Decoded:
        """See `Models`."""
        return accepted(await call(lambda: self._media.decode.remote(upload, adapter), "decoding"))

    async def soft_prompts(self, adapter: Adapter, clip: Decoded, instruction: str) -> NDArray[np.float32]:
        """See `Models`."""
        handle = self._of(adapter, "soft_prompts")
        return await call(lambda: handle.remote(adapter, clip, instruction), "encoding")

    async def embed(self, adapter: Adapter, clip: Decoded) -> NDArray[np.float32]:
        """See `Models`."""
        handle = self._of(adapter, "embed")
        return await call(lambda: handle.remote(adapter, clip), "embedding")

    async def embed_texts(self, adapter: Adapter, texts: Sequence[str]) -> TextEmbeddings:
        """See `Models`."""
        handle = self._of(adapter, "embed_texts")
        return accepted(await call(lambda: handle.remote(adapter, texts), "embedding texts"))

    async def match(self, adapter: Adapter, clip: Decoded, texts: Sequence[str]) -> list[Matched]:
        """See `Models`."""
        handle = self._of(adapter, "match")
        return accepted(await call(lambda: handle.remote(adapter, clip, texts), "matching"))

    async def answer(self, prompt: Prompt) -> Piece:
        """See `Models`."""
        if self._generator is None:
            raise unavailable()
        handle = self._generator.answer
        return accepted(await call(lambda: handle.remote(prompt), "generation"))

    async def stream(self, prompt: Prompt) -> AsyncGenerator[Piece, None]:
        """See `Models`."""
        if (handle := self._stream) is None:
            raise unavailable()
        async with contextlib.aclosing(stream(lambda: handle.remote(prompt), "generation")) as pieces:
            async for piece in pieces:
                yield accepted(piece)

    def _of(self, adapter: Adapter, method: str) -> DeploymentHandle:
        """A method of the encoder, by way of a replica that holds the adapter."""
        found = self._handles.get((adapter.key, method))
        if found is None:
            found = self._encoder.options(multiplexed_model_id=adapter.key, method_name=method)
            self._handles[adapter.key, method] = found
        return found


def accepted(answer: Any) -> Any:
    """What a worker answered.

    Raises:
        ApiError: If that is a refusal.
    """
    if isinstance(answer, Refusal):
        raise ApiError.of(answer)
    return answer
