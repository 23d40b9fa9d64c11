"""All workers in one replica, called without crossing processes.

A call between processes costs some milliseconds whatever it carries (`python -m jobs.bench serve` measures both
layouts), which matters for small models on one machine. The price: parts do not scale separately, and one crash takes
down all of them.
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
from pipelines.serving.contract.wire import DecodedMedia, MatchScore, Piece, Prompt, TextEmbeddings
from pipelines.serving.http.api import Api, build_http
from pipelines.serving.http.health import probe_models
from pipelines.serving.workers.encoder import EncoderWorker, encoder_class
from pipelines.serving.workers.generator import GeneratorWorker, generator_options
from pipelines.serving.workers.graph import SharedQuotas, unwrap
from pipelines.serving.workers.media import MediaWorker
from qformer.generation.fair_lock import FairLock


class LocalModels(SharedQuotas):
    """`Models` whose workers run in this process.

    Args:
        media: Decoder; uses child processes.
        encoder: Encoder; runs in a thread.
        generator: Language model; runs in a thread. None where no adapter generates text.
        quotas: Handle of the quota deployment; None where there are no keys.
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

    async def decode(self, upload: Upload, adapter: Adapter) -> DecodedMedia:
        """Decode in a child process."""
        return unwrap(await self._media.decode(upload, adapter))

    async def soft_prompts(self, adapter: Adapter, clip: DecodedMedia, instruction: str) -> NDArray[np.float32]:
        """Encode in the encoder's thread."""
        return await self._encoder.soft_prompts(adapter, clip, instruction)

    async def embed(self, adapter: Adapter, clip: DecodedMedia) -> NDArray[np.float32]:
        """Embed in the encoder's thread."""
        return await self._encoder.embed(adapter, clip)

    async def embed_texts(self, adapter: Adapter, texts: Sequence[str]) -> TextEmbeddings:
        """Embed texts in a thread."""
        return unwrap(await self._encoder.embed_texts(adapter, texts))

    async def match(self, adapter: Adapter, clip: DecodedMedia, texts: Sequence[str]) -> list[MatchScore]:
        """Match in the encoder's thread."""
        return unwrap(await self._encoder.match(adapter, clip, texts))

    async def answer(self, prompt: Prompt) -> Piece:
        """Generate in the engine's thread."""
        if self._generator is None:
            raise unavailable()
        return unwrap(await self._generator.answer(prompt))

    async def stream(self, prompt: Prompt) -> AsyncGenerator[Piece, None]:
        """Generate in the engine's thread, piece by piece."""
        if self._generator is None:
            raise unavailable()
        async with contextlib.aclosing(self._generator.stream(prompt)) as pieces:
            async for piece in pieces:
                yield unwrap(piece)


class FusedService:
    """One replica of the fused layout. `reconfigure` sets adapters and keys, as in `Ingress`."""

    def __init__(self, config: ServingConfig, quotas: DeploymentHandle | None) -> None:
        # Passes of encoder and language model mostly alternate: torch gets the threads of one of them.
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
        """Serve the adapters and keys of a `live_config`; the default adapter is loaded before the first request."""
        adapters, keys = read_live_config(user_config)
        await self._encoder.reconfigure({"preload": adapters[0].to_dict()})
        self._api.update(adapters, keys)

    async def check_adapter(self, adapter: Adapter) -> Refusal | None:
        """Run a test picture through an adapter that is not served yet; returns the refusal if it fails."""
        try:
            await probe_models(self._models, adapter)
        except ApiError as error:
            return error.refusal
        return None

    def check_health(self) -> None:
        """Report a dead generation engine to Serve; see `GeneratorWorker.check_health`."""
        if self._generator is not None:
            self._generator.check_health()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Build the ASGI application of this replica; Ray Serve calls this in the replica."""
        return build_http(self._api)
