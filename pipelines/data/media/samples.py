"""One sample's bytes to pixels and sound; training, evaluation, captioning and serving all decode by this class."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pipelines.data import storage
from pipelines.data.failures import MediaError
from pipelines.data.media.audio_sampling import AudioSampling
from pipelines.data.media.check_result import CheckResult
from pipelines.data.media.clip import MAX_DURATION_S, Clip, ClipRequest, WaveformRequest
from pipelines.data.media.facts import content_hash
from pipelines.data.media.frame_sampling import Sampling
from pipelines.data.media.image_clip import decode_image_clip
from pipelines.data.media.stage_costs import StageCosts
from pipelines.data.media.transforms import Augmentation
from pipelines.data.media.video.pool import VideoPool
from pipelines.data.schema import IMAGE, KINDS, VIDEO
from pipelines.data.storage import members
from pipelines.data.storage.retries import with_retries
from qformer.preprocessing import Preprocessing

ValueT = TypeVar("ValueT")


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Limits for one media file."""

    max_bytes: int = 2 * 1024**3
    """Size of a file that is held in memory: every file but local videos."""
    max_video_bytes: int = 1024**4
    """Size of a local video, which is read in place: ten hours may have tens of gigabytes."""
    max_pixels: int = 90_000_000
    """Width x height of an image or frame."""
    max_duration_s: float = MAX_DURATION_S
    """Duration of a video."""
    video_timeout_s: float = 30.0
    """Deadline of one clip's decoding; the decoding process is killed after it."""
    video_memory_bytes: int = 4 * 1024**3
    """Memory of one decoding process."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ValueError: If a limit is not positive.
        """
        for limit in dataclasses.fields(self):
            if not (value := getattr(self, limit.name)) > 0:
                raise ValueError(f"{limit.name}={value} must be above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeSettings:
    """Settings for decoding files to pixels and, if requested, sound."""

    preprocessing: Preprocessing
    num_frames: int = 8
    """Number of frames sampled from a video; an image has one."""
    sampling: Sampling = Sampling()
    """Choice of the frames; random only for samples decoded with a seed."""
    limits: Limits = Limits()
    augmentation: Augmentation = Augmentation()
    """Applied only to samples decoded with a seed."""
    uses_seeds: bool = True
    """Whether samples get seeds; False makes decoding deterministic."""
    audio: AudioSampling | None = None
    """Segments of sound decoded with a video's frames; None: no sound. An image has none."""

    @property
    def is_random(self) -> bool:
        """Whether a seed changes the decoded sample."""
        return self.uses_seeds and (self.augmentation.is_active or self.sampling.is_random)

    def num_frames_of(self, kind: str) -> int:
        """Number of frames of a sample of this kind."""
        return self.num_frames if kind == VIDEO else 1

    def row_bytes(self, kind: str) -> int:
        """Bytes of one sample's pixels and sound."""
        sound_bytes = 4 * math.prod(self.audio.shape) if self.audio is not None and kind == VIDEO else 0
        return self.num_frames_of(kind) * 3 * self.preprocessing.height * self.preprocessing.width + sound_bytes


@dataclass(frozen=True, slots=True)
class _Source:
    """A local file that a child process reads itself, or a file's content."""

    path: str | None
    data: bytes


class SampleDecoder:
    """Decodes images in this process (by default) and videos in child processes that can be killed.

    Args:
        settings: Decode settings.
        num_video_children: Number of videos decoded at the same time, for callers with threads.
        isolates_images: Whether children decode images, too: slower, but a decoder crash loses one sample only.
    """

    def __init__(self, settings: DecodeSettings, num_video_children: int = 1, *, isolates_images: bool = False) -> None:
        self.settings = settings
        self._isolates_images = isolates_images
        self.videos = VideoPool(
            timeout_s=settings.limits.video_timeout_s,
            memory_bytes=settings.limits.video_memory_bytes,
            size=num_video_children,
        )

    def decode(
        self,
        *,
        kind: str,
        media: str | None = None,
        data: bytes | None = None,
        start_s: float | None = None,
        end_s: float | None = None,
        seed: int | None = None,
        costs: StageCosts | None = None,
    ) -> Clip:
        """Fetch and decode one sample.

        Args:
            kind: "image" or "video".
            media: Path or URI; not read when `data` is given.
            data: The file's content.
            start_s: Start of the clip in seconds after the video's first frame; None: the start of the video.
            end_s: Exclusive end of the clip in the same seconds; None: the end.
            seed: Seed for frames, crop and flip; None makes nothing random.
            costs: Costs to which this sample's are added; None: not measured.

        Raises:
            MediaError: If the sample cannot be used. No other error is raised, whatever the file contains.
        """
        costs = StageCosts() if costs is None else costs
        with _only_media_errors():
            source = self._source(kind, media, data, costs)
            return self._decode(kind, media, source, start_s, end_s, seed, costs, wants_facts=False)

    def check(
        self,
        *,
        kind: str,
        media: str | None = None,
        data: bytes | None = None,
        start_s: float | None = None,
        end_s: float | None = None,
    ) -> CheckResult:
        """Decode one sample without seed to find out whether it can be used, and the facts of its file."""
        size_bytes = fingerprint = None
        costs = StageCosts()
        try:
            with _only_media_errors():
                source = self._source(kind, media, data, costs)
                with costs.measure("fetch"):
                    size_bytes, fingerprint = self._fingerprint(media, source)
                clip = self._decode(kind, media, source, start_s, end_s, None, costs, wants_facts=True)
            return CheckResult(size_bytes=size_bytes, content_hash=fingerprint, facts=clip.facts, costs=costs)
        except MediaError as error:
            return CheckResult(error=error, size_bytes=size_bytes, content_hash=fingerprint, costs=costs)

    def waveform(
        self,
        *,
        sample_rate_hz: int,
        media: str | None = None,
        data: bytes | None = None,
        start_s: float | None = None,
        end_s: float | None = None,
    ) -> NDArray[np.float32] | None:
        """Fetch a video and decode its first audio track to mono.

        Args:
            sample_rate_hz: Sample rate of the result.
            media: Path or URI; not read when `data` is given.
            data: The file's content.
            start_s: Start in seconds after the first video frame; None: the start of the video.
            end_s: Exclusive end in the same seconds; None: the end.

        Returns:
            float32 [samples] within [-1, 1]; None when the file has no audio track.

        Raises:
            MediaError: If the sound cannot be used.
        """
        limits = self.settings.limits
        request = WaveformRequest(
            sample_rate_hz=sample_rate_hz, max_duration_s=limits.max_duration_s, start_s=start_s, end_s=end_s
        )
        with _only_media_errors():
            source = self._source(VIDEO, media, data, StageCosts())
            return self._retried(
                media,
                source,
                lambda: self.videos.read_waveform(
                    request, max_pixels=limits.max_pixels, path=source.path, data=source.data
                ),
            )

    def close(self) -> None:
        """End the video children."""
        self.videos.close()

    def _decode(
        self,
        kind: str,
        media: str | None,
        source: _Source,
        start_s: float | None,
        end_s: float | None,
        seed: int | None,
        costs: StageCosts,
        *,
        wants_facts: bool,
    ) -> Clip:
        settings = self.settings
        request = ClipRequest(
            preprocessing=settings.preprocessing,
            num_frames=settings.num_frames,
            max_pixels=settings.limits.max_pixels,
            max_duration_s=settings.limits.max_duration_s,
            sampling=settings.sampling,
            start_s=start_s,
            end_s=end_s,
            augmentation=settings.augmentation,
            seed=seed,
            wants_facts=wants_facts,
            audio=settings.audio if kind == VIDEO else None,
        )
        if kind == IMAGE:
            return self._with_silence(self._decode_image(source, request, costs))
        with costs.measure("decode"):
            return self._retried(
                media, source, lambda: self.videos.read_clip(request, path=source.path, data=source.data)
            )

    def _decode_image(self, source: _Source, request: ClipRequest, costs: StageCosts) -> Clip:
        if not self._isolates_images:
            return decode_image_clip(source.data, request, costs)
        with costs.measure("decode"):
            return self.videos.read_image(source.data, request)

    def _with_silence(self, clip: Clip) -> Clip:
        if self.settings.audio is None:
            return clip
        waveforms, audio_valid = self.settings.audio.silence()
        return dataclasses.replace(clip, waveforms=waveforms, audio_valid=audio_valid)

    def _source(self, kind: str, media: str | None, data: bytes | None, costs: StageCosts) -> _Source:
        if kind not in KINDS:
            raise MediaError("config", f"kind {kind!r} is neither {IMAGE!r} nor {VIDEO!r}", stage="manifest")
        max_bytes = self.settings.limits.max_bytes
        if data is not None:
            if len(data) > max_bytes:
                raise MediaError("too_large", f"{len(data)} bytes exceed the limit of {max_bytes}", stage="read")
            costs.fetched_bytes += len(data)
            return _Source(None, data)
        if not media:
            raise MediaError("config", "neither media nor bytes are given", stage="manifest")
        try:
            storage.require_direct(media)
        except storage.IndirectUriError as error:
            raise MediaError("config", str(error), stage="manifest") from error
        if kind == VIDEO and storage.is_local(media) and members.parse(media) is None:
            # The child reads local files itself, so large ones are not copied through memory.
            return _Source(self._checked_path(media, costs), b"")
        with costs.measure("fetch"):
            content = with_retries(media, lambda: storage.read_bytes(media, max_bytes))
        costs.fetched_bytes += len(content)
        return _Source(None, content)

    def _checked_path(self, media: str, costs: StageCosts) -> str:
        path, max_bytes = storage.local_path(media), self.settings.limits.max_video_bytes
        with costs.measure("fetch"):
            size_bytes = with_retries(media, lambda: storage.require_regular(path)).st_size
        costs.fetched_bytes += size_bytes
        if size_bytes > max_bytes:
            raise MediaError("too_large", f"{size_bytes} bytes exceed the limit of {max_bytes}", stage="read")
        if size_bytes == 0:
            raise MediaError("corrupt", "the file is empty")
        return path

    def _fingerprint(self, media: str | None, source: _Source) -> tuple[int, str]:
        if source.path is None:
            return len(source.data), content_hash(source.data)
        path = source.path

        def read() -> tuple[int, str]:
            with storage.open_regular(path) as file:
                return os.fstat(file.fileno()).st_size, content_hash(file)

        return with_retries(str(media), read)

    def _retried(self, media: str | None, source: _Source, read: Callable[[], ValueT]) -> ValueT:
        """Call `read`, with retries while a child has transient failures with a local file."""
        return read() if source.path is None else with_retries(str(media), read)


@contextlib.contextmanager
def _only_media_errors() -> Iterator[None]:
    """Turn every error into a MediaError, so that a sample can fail only itself."""
    try:
        yield
    except MediaError:
        raise
    except MemoryError as error:
        raise MediaError("too_large", f"not enough memory: {error}") from error
    except OSError as error:  # a failure of this machine, such as no more processes; file errors were classified before
        raise MediaError("transient", f"{type(error).__name__}: {error}") from error
    except Exception as error:
        raise MediaError("corrupt", f"{type(error).__name__}: {error}") from error
