"""The media deployment: files in, pixels out. It fetches files and decodes them in child processes that it can kill."""

import asyncio
import functools
import logging
from concurrent.futures import ThreadPoolExecutor

from ray.util.metrics import Gauge

from pipelines.data.failures import MediaError
from pipelines.data.media.clip import Clip
from pipelines.data.media.samples import DecodeSettings, Limits, SampleDecoder
from pipelines.serving.contract.adapters import Adapter
from pipelines.serving.contract.config import FetchPolicy
from pipelines.serving.contract.errors import RETRY_AFTER_S, ApiError, Refusal
from pipelines.serving.contract.uploads import Upload, require_kind
from pipelines.serving.contract.wire import DecodedMedia
from pipelines.serving.workers.fetching import Fetcher

logger = logging.getLogger(__name__)

# Status, code and advice for a file that cannot be used, by the error class of `pipelines.data`.
REFUSALS = {
    "corrupt": (400, "invalid_media", "send a file that other programs can open"),
    "missing": (400, "invalid_media", "send the file"),
    "config": (400, "invalid_media", "send an image or a video"),
    "unsupported": (415, "unsupported_media_type", "send a JPEG, PNG, WebP or MP4"),
    "too_large": (422, "media_too_large", "send a smaller one"),
    "timeout": (422, "media_too_slow", "send a shorter or smaller one"),
}
_KILL_EVERY_S = 0.05


class DecodePool:
    """Decodes files in parallel, each in its own child process.

    Training and the caption job use the same decoder, so served results equal theirs. A child is killed when its caller
    is cancelled.

    Args:
        num_children: Files decoded at once.
    """

    def __init__(self, num_children: int) -> None:
        self._threads = ThreadPoolExecutor(num_children, thread_name_prefix="decode")
        self._idle: asyncio.LifoQueue[SampleDecoder | None] = asyncio.LifoQueue()
        for _ in range(num_children):
            self._idle.put_nowait(None)  # the first file brings the settings
        self.num_waiting = 0
        self._waiting = Gauge("qformer_serve_media_queue", "Files that wait for a decoding process.")

    async def decode(self, upload: Upload, settings: DecodeSettings) -> Clip:
        """Decode one file.

        Raises:
            MediaError: If it cannot be used.
        """
        self._count(1)
        try:
            decoder = await self._idle.get()
        finally:
            self._count(-1)
        try:
            if decoder is None:
                decoder = SampleDecoder(settings, isolates_images=True)
            decoder.settings = settings  # adapters may differ from file to file
            task = functools.partial(decoder.decode, kind=upload.kind, data=upload.data)
            work = asyncio.get_running_loop().run_in_executor(self._threads, task)
            try:
                return await asyncio.shield(work)
            except asyncio.CancelledError:
                await _kill(decoder, work)
                raise
        finally:
            self._idle.put_nowait(decoder)

    def _count(self, change: int) -> None:
        self.num_waiting += change
        self._waiting.set(self.num_waiting)


class MediaWorker:
    """One replica of the media deployment."""

    def __init__(self, limits: Limits, fetch: FetchPolicy, num_children: int) -> None:
        self._limits = limits
        self._fetcher = Fetcher(fetch)
        self._decoders = DecodePool(num_children)

    async def decode(self, upload: Upload, adapter: Adapter) -> DecodedMedia | Refusal:
        """Fetch and decode one image or video with the sampling and preprocessing of `adapter`."""
        try:
            if upload.url is not None:
                data = await self._fetcher.fetch(upload.url)
                require_kind(upload.kind, data)
                upload = Upload(upload.kind, data)
            clip = await self._decoders.decode(upload, adapter.decode_settings(self._limits))
        except ApiError as error:
            return error.refusal
        except MediaError as error:
            return _refusal(upload.kind, error)
        return DecodedMedia(
            pixels=clip.pixels,
            frame_valid=clip.frame_valid,
            waveforms=clip.waveforms,
            audio_valid=clip.audio_valid,
            size_bytes=len(upload.data),
        )


def _refusal(kind: str, error: MediaError) -> Refusal:
    if error.error_class == "transient":
        logger.warning("decoding failed for now: %s", error.message)
        return Refusal(503, "unavailable", "the decoder is short of resources; try again", retry_after_s=RETRY_AFTER_S)
    status, code, fix = REFUSALS[error.error_class]
    return Refusal(status, code, f"the {kind} cannot be used: {error.message}; {fix}")


async def _kill(decoder: SampleDecoder, work: "asyncio.Future[Clip]") -> None:
    """Kill the child until the waiting thread returns; one kill may miss a child that is just starting."""
    while not work.done():
        decoder.close()
        await asyncio.wait([work], timeout=_KILL_EVERY_S)
    work.exception()  # marks it as retrieved, or asyncio logs it
