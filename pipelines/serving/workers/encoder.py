"""The encoder deployment: the frozen vision encoder, and the adapters that read its tokens.

One pass of the encoder takes images and frames of all adapters together, for it is the same for all; each adapter's
Q-Former then reads its own. Adapters are loaded when they are first asked for and forgotten by least use
(Serve's multiplexing), so a replica serves more of them than it holds.
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
from pipelines.serving.contract.wire import Decoded, Matched, TextEmbeddings
from pipelines.serving.workers.adapter_models import Matcher, Writer, load_adapter, load_backbone
from pipelines.serving.workers.batcher import Batcher

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """One image or clip, and what becomes of the encoder's tokens."""

    clip: Decoded
    group: tuple[object, ...]
    """Works of the same group, alike in shape, are finished together."""
    finish: Callable[[Tensor, Tensor, Sequence["Work"]], Sequence[Any]]
    """tokens_BFPV and is_frame_BF of a group, and its works -> a result each."""
    argument: Any = None


def run_works(features: Callable[[Tensor], Tensor], works: Sequence[Work]) -> list[Any]:
    """Encode all images and frames in as few passes as their sizes allow, then finish group by group."""
    results: list[Any] = [None] * len(works)
    tokens_of: dict[int, Tensor] = {}
    for places in _grouped(works, lambda work: work.clip.pixels.shape[1:]):
        frames = np.concatenate([works[place].clip.pixels for place in places])
        tokens_GPV = features(torch.from_numpy(frames)[None])[0]
        parts = tokens_GPV.split([len(works[place].clip.pixels) for place in places])
        tokens_of |= dict(zip(places, parts, strict=True))
    for places in _grouped(works, lambda work: (*work.group, work.clip.pixels.shape)):
        group = [works[place] for place in places]
        tokens_BFPV = torch.stack([tokens_of[place] for place in places])
        valid_BF = np.stack([work.clip.frame_valid for work in group])
        is_frame_BF = torch.from_numpy(valid_BF).to(tokens_BFPV.device)
        for place, result in zip(places, group[0].finish(tokens_BFPV, is_frame_BF, group), strict=True):
            results[place] = result
    return results


class EncoderWorker:
    """One replica of the encoder deployment; `encoder_class` adds the loading of adapters to it.

    Args:
        backbone: Frozen encoder of all adapters.
        max_batch_frames: Images and frames of one pass, of the Q-Former's with texts: once for each text.
        use_gpu: Run on CUDA.
        turn: Held for every pass; see `FairLock`.
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
        """Held, or it might be forgotten before it is done."""
        self._frames = Histogram(
            "qformer_serve_encoder_batch_frames",
            "Images and frames of one pass of the encoder.",
            boundaries=[1, 2, 4, 8, 16, 32, 64, 128],
        )
        self._waiting = Gauge("qformer_serve_encoder_queue", "Images and clips that wait for a pass of the encoder.")
        self._batcher: Batcher[Work, Any] = Batcher(self._run, max_batch_frames, self._observe)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Load the default adapter before its first request.

        A new replica is ready when it is there, and fails when it cannot be loaded. A running one gets no requests
        until this returns, so it loads a newer adapter meanwhile.
        """
        loading = asyncio.create_task(self._loaded(Adapter.from_dict(user_config["preload"])))
        if not self._is_ready:
            await loading
            self._is_ready = True
        else:
            loading.add_done_callback(_tell_failure)
            self._loading = loading

    async def soft_prompts(self, adapter: Adapter, clip: Decoded, instruction: str) -> NDArray[np.float32]:
        """What the language model is to read of one image or clip: [N, L]."""
        writer = await self._loaded(adapter)
        assert isinstance(writer, Writer)

        def finish(tokens_BFPV: Tensor, is_frame_BF: Tensor, works: Sequence[Work]) -> Sequence[Any]:
            clips, instructions = [work.clip for work in works], [work.argument for work in works]
            return writer.soft_prompts(tokens_BFPV, is_frame_BF, clips, instructions)

        return await self._submit(Work(clip, ("prompts", adapter.key), finish, instruction))

    async def embed(self, adapter: Adapter, clip: Decoded) -> NDArray[np.float32]:
        """Query embeddings [N, E] of one image or clip."""
        matcher = await self._loaded(adapter)
        assert isinstance(matcher, Matcher)
        return await self._submit(Work(clip, ("embed", adapter.key), lambda *group: matcher.embed(*group[:2])))

    async def embed_texts(self, adapter: Adapter, texts: Sequence[str]) -> TextEmbeddings | Refusal:
        """Embeddings of texts."""
        matcher = await self._loaded(adapter)
        assert isinstance(matcher, Matcher)
        return await asyncio.to_thread(matcher.embed_texts, texts)

    async def match(self, adapter: Adapter, clip: Decoded, texts: Sequence[str]) -> list[Matched] | Refusal:
        """How well each text fits one image or clip."""
        matcher = await self._loaded(adapter)
        assert isinstance(matcher, Matcher)
        if (refusal := matcher.refusal(texts)) is not None:
            return refusal

        # Every text is read beside every frame: all of them in one pass would take many times the others' memory.
        most = max(1, self._max_batch_frames // len(clip.pixels))

        def finish(tokens_BFPV: Tensor, is_frame_BF: Tensor, works: Sequence[Work]) -> Sequence[Any]:
            return [
                [
                    one
                    for start in range(0, len(work.argument), most)
                    for one in matcher.match(tokens_FPV, is_frame_F, work.argument[start : start + most])
                ]
                for tokens_FPV, is_frame_F, work in zip(tokens_BFPV, is_frame_BF, works, strict=True)
            ]

        work = Work(clip, ("match", adapter.key), finish, texts)
        return await self._submit(work, readings=len(texts))

    async def load(self, key: str) -> Writer | Matcher:
        """Load the adapter of a key that `_loaded` knows, beside the event loop."""
        folder = self._folders[key]
        logger.info("loading adapter %s", key)
        return await asyncio.to_thread(load_adapter, folder, self._encoder, self._device)

    async def adapter(self, key: str) -> Writer | Matcher:
        """`load`, with a memory; see `encoder_class`."""
        raise NotImplementedError

    async def _loaded(self, adapter: Adapter) -> Writer | Matcher:
        self._folders[adapter.key] = adapter.folder
        return await self.adapter(adapter.key)

    async def _submit(self, work: Work, readings: int = 1) -> Any:
        self._waiting.set(self._batcher.num_waiting + 1)
        return await self._batcher.submit(work, cost=len(work.clip.pixels) * readings)

    def _run(self, works: Sequence[Work]) -> list[Any]:
        with self._turn, torch.inference_mode():
            return run_works(lambda pixels: self._encoder.features(pixels.to(self._device)), works)

    def _observe(self, works: Sequence[Work]) -> None:
        self._frames.observe(sum(len(work.clip.pixels) for work in works))
        self._waiting.set(self._batcher.num_waiting)


def encoder_class(max_loaded_adapters: int) -> type[EncoderWorker]:
    """The deployment's class; how many adapters Serve keeps is a part of it."""

    class Encoder(EncoderWorker):
        """An encoder replica that keeps the adapters used last."""

        @serve.multiplexed(max_num_models_per_replica=max_loaded_adapters)  # type: ignore[untyped-decorator]
        async def adapter(self, key: str) -> Writer | Matcher:
            return await self.load(key)

    return Encoder


def _tell_failure(task: "asyncio.Task[Any]") -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("an adapter could not be loaded: %r", error)


def _grouped(works: Sequence[Work], key: Callable[[Work], object]) -> list[list[int]]:
    places: dict[object, list[int]] = defaultdict(list)
    for place, work in enumerate(works):
        places[key(work)].append(place)
    return [*places.values()]
