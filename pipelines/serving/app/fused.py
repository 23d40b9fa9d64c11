"""Everything in one replica: the workers of the other deployments, called without a way between processes.

A hop costs some milliseconds whatever it carries (`python -m jobs.bench serve` measures both layouts), which is much
for small models on one machine. The price: nothing scales by itself, and one crash takes all of it.
"""

import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import numpy as np
import torch
from fastapi import FastAPI
from numpy.typing import NDArray
from ray.serve.handle import DeploymentHandle

from pipelines.serving.app.ingress import read_live_config
from pipelines.serving.contract.adapters import Adapter
from pipelines.serving.contract.config import ServingConfig
from pipelines.serving.contract.errors import ApiError, Refusal, unavailable
from pipelines.serving.contract.uploads import Upload
from pipelines.serving.contract.wire import Decoded, Matched, Piece, Prompt, TextEmbeddings
from pipelines.serving.http.api import Api, build_http
from pipelines.serving.http.health import ask
from pipelines.serving.workers.encoder import EncoderWorker, encoder_class
from pipelines.serving.workers.generator import GeneratorWorker, generator_options
from pipelines.serving.workers.graph import SharedQuotas, accepted
from pipelines.serving.workers.media import MediaWorker
from qformer.generation.fair_lock import FairLock


class LocalModels(SharedQuotas):
    """`Models` in this process.

    Args:
        media: Decodes in children.
        encoder: Works in a thread.
        generator: Works in a thread; None where no adapter answers in text.
        quotas: See `SharedQuotas`.
    """

    def __init__(
        self,
        media: MediaWorker,
        encoder: EncoderWorker,
        generator: GeneratorWorker | None,
        quotas: DeploymentHandle | None,
    ) -> None:
        super().__init__(quotas)
        self._media, self._encoder, self._generator = media, encoder, generator

    async def decode(self, upload: Upload, adapter: Adapter) -> Decoded:
        """See `Models`."""
        return accepted(await self._media.decode(upload, adapter))

    async def soft_prompts(self, adapter: Adapter, clip: Decoded, instruction: str) -> NDArray[np.float32]:
        """See `Models`."""
        return await self._encoder.soft_prompts(adapter, clip, instruction)

    async def embed(self, adapter: Adapter, clip: Decoded) -> NDArray[np.float32]:
        """See `Models`."""
        return await self._encoder.embed(adapter, clip)

    async def embed_texts(self, adapter: Adapter, texts: Sequence[str]) -> TextEmbeddings:
        """See `Models`."""
        return accepted(await self._encoder.embed_texts(adapter, texts))

    async def match(self, adapter: Adapter, clip: Decoded, texts: Sequence[str]) -> list[Matched]:
        """See `Models`."""
        return accepted(await self._encoder.match(adapter, clip, texts))

    async def answer(self, prompt: Prompt) -> Piece:
        """See `Models`."""
        if self._generator is None:
            raise unavailable()
        return accepted(await self._generator.answer(prompt))

    async def stream(self, prompt: Prompt) -> AsyncGenerator[Piece, None]:
        """See `Models`."""
        if self._generator is None:
            raise unavailable()
        async with contextlib.aclosing(self._generator.stream(prompt)) as pieces:
            async for piece in pieces:
                yield accepted(piece)


class FusedService:
    """One replica. Which adapters and keys there are comes by `reconfigure`, as in `Ingress`."""

    def __init__(self, config: ServingConfig, quotas: DeploymentHandle | None) -> None:
        # Passes of encoder and language model take turns more often than not: threads for one of them.
        torch.set_num_threads(max(1, int(max(config.encoder.num_cpus, config.generator.num_cpus))))
        media = MediaWorker(config.media_limits, config.fetch, config.decode_children)
        turn = None if config.use_gpu else FairLock()
        encoder = encoder_class(config.max_loaded_adapters)
        self._encoder = encoder(config.backbones.encoder, config.max_batch_frames, config.use_gpu, turn)
        options = generator_options(config)
        self._generator = None if options is None else GeneratorWorker(**options, turn=turn)
        self._models = LocalModels(media, self._encoder, self._generator, quotas)
        self._api = Api(config, self._models)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take what `live_config` gives; the default adapter is loaded before the first request."""
        adapters, keys = read_live_config(user_config)
        await self._encoder.reconfigure({"preload": adapters[0].to_dict()})
        self._api.update(adapters, keys)

    async def rehearse(self, adapter: Adapter) -> Refusal | None:
        """Answer a picture by an adapter that requests do not know yet; why it does not."""
        try:
            await ask(self._models, adapter)
        except ApiError as error:
            return error.refusal
        return None

    def check_health(self) -> None:
        """As `GeneratorWorker.check_health`."""
        if self._generator is not None:
            self._generator.check_health()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Ray Serve's hook: the ASGI application of this replica, made in the replica."""
        return build_http(self._api)
