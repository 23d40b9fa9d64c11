"""The encoder deployment: the frozen vision encoder, and the adapters that read its tokens.

Images and frames of all adapters share one pass of the encoder; then each adapter's Q-Former reads its own tokens.
Adapters are loaded on first use and dropped least recently used first (Serve's multiplexing), so a replica serves more
of them than it holds.
"""

import asyncio
import contextlib
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from ray import serve
from ray.util.metrics import Gauge, Histogram
from torch import Tensor

from pipelines.serving.contract.adapters import Adapter, SharedEncoder
from pipelines.serving.contract.errors import Refusal
from pipelines.serving.contract.wire import DecodedMedia, MatchScore, TextEmbeddings
from pipelines.serving.workers.adapter_models import PromptAdapter, RetrievalAdapter, load_adapter, load_backbone
from pipelines.serving.workers.batcher import Batcher

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class EncoderTask:
    """One image or clip, and the function that reads its tokens."""

    clip: DecodedMedia
    group: tuple[object, ...]
    """Key of the tasks that are finished together, if their pixels also have the same shape."""
    finish: Callable[[Tensor, Tensor, Sequence["EncoderTask"]], Sequence[Any]]
    """Function from tokens_BFPV, is_frame_BF and the tasks of a group to one result per task."""
    argument: Any = None
    """Further input of `finish`: an instruction, or texts."""


def run_tasks(features: Callable[[Tensor], Tensor], tasks: Sequence[EncoderTask]) -> list[Any]:
    """Encode all images and frames, one pass per image size, then finish each group."""
    results: list[Any] = [None] * len(tasks)
    tokens_of: dict[int, Tensor] = {}
    for indices in _group_indices(tasks, lambda task: task.clip.pixels.shape[1:]):
        frames = np.concatenate([tasks[index].clip.pixels for index in indices])
        tokens_GPV = features(torch.from_numpy(frames)[None])[0]
        parts = tokens_GPV.split([len(tasks[index].clip.pixels) for index in indices])
        tokens_of |= dict(zip(indices, parts, strict=True))
    for indices in _group_indices(tasks, lambda task: (*task.group, task.clip.pixels.shape)):
        group = [tasks[index] for index in indices]
        tokens_BFPV = torch.stack([tokens_of[index] for index in indices])
        valid_BF = np.stack([task.clip.frame_valid for task in group])
        is_frame_BF = torch.from_numpy(valid_BF).to(tokens_BFPV.device)
        for index, result in zip(indices, group[0].finish(tokens_BFPV, is_frame_BF, group), strict=True):
            results[index] = result
    return results


class EncoderWorker:
    """One replica of the encoder deployment; `encoder_class` adds the loading of adapters to it.

    Args:
        backbone: Frozen encoder of all adapters.
        max_batch_frames: Images and frames per pass. A match counts each frame once per text.
        use_gpu: Whether to run on CUDA.
        turn: Lock held for every pass, shared with the generator in the fused layout; None: no lock.
    """

    def __init__(
        self,
        backbone: SharedEncoder,
        max_batch_frames: int,
        use_gpu: bool,
        turn: AbstractContextManager[None] | None = None,
    ) -> None:
        self._device, self._max_batch_frames = "cuda" if use_gpu else "cpu", max_batch_frames
        self._turn = turn or contextlib.nullcontext()
        self._encoder = load_backbone(backbone, self._device)
        self._folders: dict[str, str] = {}
        self._is_ready = False
        self._loading: asyncio.Task[Any] | None = None
        """Reference to the running task; asyncio itself holds only a weak one."""
        self._frames = Histogram(
            "qformer_serve_encoder_batch_frames",
            "Images and frames of one pass of the encoder.",
            boundaries=[1, 2, 4, 8, 16, 32, 64, 128],
        )
        self._waiting = Gauge("qformer_serve_encoder_queue", "Images and clips that wait for a pass of the encoder.")
        self._batcher: Batcher[EncoderTask, Any] = Batcher(self._run, max_batch_frames, self._observe)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Load the default adapter before its first request.

        A new replica is ready once the adapter is loaded, and fails if it cannot be loaded. A running replica gets no
        requests until this returns, so it loads a newer adapter in the background.
        """
        loading = asyncio.create_task(self._loaded(Adapter.from_dict(user_config["preload"])))
        if not self._is_ready:
            await loading
            self._is_ready = True
        else:
            loading.add_done_callback(_log_failure)
            self._loading = loading

    async def soft_prompts(self, adapter: Adapter, clip: DecodedMedia, instruction: str) -> NDArray[np.float32]:
        """Soft prompts [N, L] of one image or clip."""
        writer = await self._loaded(adapter)
        assert isinstance(writer, PromptAdapter)

        def finish(tokens_BFPV: Tensor, is_frame_BF: Tensor, tasks: Sequence[EncoderTask]) -> Sequence[Any]:
            clips, instructions = [task.clip for task in tasks], [task.argument for task in tasks]
            return writer.soft_prompts(tokens_BFPV, is_frame_BF, clips, instructions)

        return await self._submit(EncoderTask(clip, ("prompts", adapter.key), finish, instruction))

    async def embed(self, adapter: Adapter, clip: DecodedMedia) -> NDArray[np.float32]:
        """Query embeddings [N, E] of one image or clip."""
        matcher = await self._loaded(adapter)
        assert isinstance(matcher, RetrievalAdapter)
        return await self._submit(EncoderTask(clip, ("embed", adapter.key), lambda *group: matcher.embed(*group[:2])))

    async def embed_texts(self, adapter: Adapter, texts: Sequence[str]) -> TextEmbeddings | Refusal:
        """Embed texts."""
        matcher = await self._loaded(adapter)
        assert isinstance(matcher, RetrievalAdapter)
        return await asyncio.to_thread(matcher.embed_texts, texts)

    async def match(self, adapter: Adapter, clip: DecodedMedia, texts: Sequence[str]) -> list[MatchScore] | Refusal:
        """Score each text against one image or clip."""
        matcher = await self._loaded(adapter)
        assert isinstance(matcher, RetrievalAdapter)
        if (refusal := matcher.refusal(texts)) is not None:
            return refusal

        # Each text is read with each frame: one pass over all texts would take many times the memory of other passes.
        most = max(1, self._max_batch_frames // len(clip.pixels))

        def finish(tokens_BFPV: Tensor, is_frame_BF: Tensor, tasks: Sequence[EncoderTask]) -> Sequence[Any]:
            return [
                [
                    one
                    for start in range(0, len(task.argument), most)
                    for one in matcher.match(tokens_FPV, is_frame_F, task.argument[start : start + most])
                ]
                for tokens_FPV, is_frame_F, task in zip(tokens_BFPV, is_frame_BF, tasks, strict=True)
            ]

        task = EncoderTask(clip, ("match", adapter.key), finish, texts)
        return await self._submit(task, num_texts=len(texts))

    async def load(self, key: str) -> PromptAdapter | RetrievalAdapter:
        """Load an adapter in a thread; `_loaded` has recorded its folder."""
        folder = self._folders[key]
        logger.info("loading adapter %s", key)
        return await asyncio.to_thread(load_adapter, folder, self._encoder, self._device)

    async def adapter(self, key: str) -> PromptAdapter | RetrievalAdapter:
        """Return an adapter, loaded or from the cache; `encoder_class` implements it."""
        raise NotImplementedError

    async def _loaded(self, adapter: Adapter) -> PromptAdapter | RetrievalAdapter:
        self._folders[adapter.key] = adapter.folder
        return await self.adapter(adapter.key)

    async def _submit(self, task: EncoderTask, num_texts: int = 1) -> Any:
        self._waiting.set(self._batcher.num_waiting + 1)
        return await self._batcher.submit(task, cost=len(task.clip.pixels) * num_texts)

    def _run(self, tasks: Sequence[EncoderTask]) -> list[Any]:
        with self._turn, torch.inference_mode():
            return run_tasks(lambda pixels: self._encoder.features(pixels.to(self._device)), tasks)

    def _observe(self, tasks: Sequence[EncoderTask]) -> None:
        self._frames.observe(sum(len(task.clip.pixels) for task in tasks))
        self._waiting.set(self._batcher.num_waiting)


def encoder_class(max_loaded_adapters: int) -> type[EncoderWorker]:
    """Build the deployment's class; Serve's decorator fixes the number of loaded adapters."""

    class Encoder(EncoderWorker):
        """Encoder replica with a cache of adapters, least recently used dropped first."""

        @serve.multiplexed(max_num_models_per_replica=max_loaded_adapters)  # type: ignore[untyped-decorator]
        async def adapter(self, key: str) -> PromptAdapter | RetrievalAdapter:
            return await self.load(key)

    return Encoder


def _log_failure(loading: "asyncio.Task[Any]") -> None:
    if not loading.cancelled() and (error := loading.exception()) is not None:
        logger.error("an adapter could not be loaded: %r", error)


def _group_indices(tasks: Sequence[EncoderTask], key: Callable[[EncoderTask], object]) -> list[list[int]]:
    groups: dict[object, list[int]] = defaultdict(list)
    for index, task in enumerate(tasks):
        groups[key(task)].append(index)
    return [*groups.values()]
