"""Sample frames of one clip. Runs only in the child process: decoders crash and hang on damaged files."""

import errno
from collections.abc import Sequence

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.data.failures import MediaError
from pipelines.data.media.audio_sampling import AudioSampling
from pipelines.data.media.clip import BACKEND_NAMES, Clip, ClipRequest, SizeOf
from pipelines.data.media.frame_sampling import ClipFrames, choose_frames
from pipelines.data.media.transforms import Box, center_crop_resized, draw_augmentation, resize_and_crop, resized_size
from pipelines.data.media.video.audio_segments import read_segments
from pipelines.data.media.video.backends import BACKENDS
from pipelines.data.media.video.probe import VideoProbe, probe_video, require_pixel_limit
from pipelines.data.media.video.pyav import rotation_of

_TRANSIENT_ERRORS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ECONNRESET)


def read_clip(path: str, request: ClipRequest, backends: Sequence[str] = BACKEND_NAMES) -> Clip:
    """Decode sampled frames by the first backend that can, and segments of sound.

    Frames are chosen by presentation time, so variable frame rates and non-zero starts do not matter. The container's
    rotation is applied; pixel aspect ratios are not.

    Args:
        path: Local file.
        request: Decode settings.
        backends: Names of the backends to try, in this order.

    Raises:
        MediaError: If the clip cannot be used.
    """
    try:
        found = probe_video(path, request.max_pixels, request.max_duration_s)
        start_s, end_s = _bounds(found, request)
        indexes, frame_valid = _choose(found, request, start_s, end_s)
        pixels = _decode(path, found, request, indexes, backends)
        facts = found.facts(rotation_of(path, found)) if request.wants_facts else None
        waveforms, audio_valid = _sound(path, found, request.audio, start_s, end_s)
        return Clip(pixels, frame_valid, facts, waveforms, audio_valid)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise media_error(error) from error


def media_error(error: Exception) -> MediaError:
    """Classify an error of a decoder or of the operating system."""
    message = f"{type(error).__name__}: {error}"
    if isinstance(error, MemoryError):
        return MediaError("too_large", "decoding needs more memory than video_memory_bytes allows")
    if isinstance(error, FileNotFoundError):
        return MediaError("missing", message, stage="read")
    if isinstance(error, PermissionError):
        return MediaError("config", message, stage="read")
    if isinstance(error, av.error.DecoderNotFoundError):
        return MediaError("unsupported", message)
    if isinstance(error, OSError) and error.errno in _TRANSIENT_ERRORS:
        return MediaError("transient", message, stage="read")
    return MediaError("corrupt", message)


def _bounds(found: VideoProbe, request: ClipRequest) -> tuple[float, float]:
    """Start and exclusive end of the clip in seconds after the first frame."""
    duration_s = found.duration_s
    start_s = request.start_s or 0.0
    end_s = duration_s if request.end_s is None else min(request.end_s, duration_s)
    if not 0 <= start_s < end_s:
        bounds = f"start_s={start_s:g} and end_s={end_s:g}"
        raise MediaError("config", f"{bounds} leave nothing of a clip of {duration_s:.3f} s", stage="manifest")
    return start_s, end_s


def _choose(
    found: VideoProbe, request: ClipRequest, start_s: float, end_s: float
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    frames = ClipFrames(starts_s=found.starts_s, is_key=found.is_key, start_s=start_s, end_s=end_s)
    try:
        return choose_frames(request.sampling, frames, request.num_frames, request.seed)
    except ValueError as error:
        raise MediaError("config", str(error), stage="manifest") from error


def _sound(
    path: str, found: VideoProbe, audio: AudioSampling | None, start_s: float, end_s: float
) -> tuple[NDArray[np.float32], NDArray[np.bool_]] | tuple[None, None]:
    if audio is None:
        return None, None
    if not found.has_audio:
        return audio.silence()
    zero_s = float(found.starts[0]) * found.unit_s
    try:
        return read_segments(path, audio, start_s=start_s, end_s=end_s, zero_s=zero_s)
    except (MediaError, av.FFmpegError, ValueError) as error:
        classified = error if isinstance(error, MediaError) else media_error(error)
        raise MediaError(classified.error_class, f"the sound: {classified.message}", stage=classified.stage) from error


def _decode(
    path: str, found: VideoProbe, request: ClipRequest, indexes: NDArray[np.int64], backends: Sequence[str]
) -> NDArray[np.uint8]:
    failures = []
    wanted = np.unique(indexes)
    for backend in (BACKENDS[name] for name in backends):
        if not backend.supports(found):
            continue
        resizer = _FrameResizer(request)
        try:
            decoded = backend.frames_at(path, found, wanted, resizer.size_of, request.preprocessing.interpolation)
            resized = {index: resizer.resize(frame) for index, frame in decoded}
            return np.stack([resized[index] for index in indexes.tolist()])
        except (MediaError, MemoryError):
            raise
        except Exception as error:  # backends fail in many ways; the next may succeed
            failures.append((backend.name, error))
    if not failures:
        raise MediaError("unsupported", f"no usable decoder for {found.codec}")
    classified = media_error(failures[0][1])
    message = "; ".join(f"{name}: {type(error).__name__} {error}" for name, error in failures)
    raise MediaError(classified.error_class, message, stage=classified.stage)


class _FrameResizer:
    """Resizes a clip's frames, all with the same crop and flip."""

    def __init__(self, request: ClipRequest) -> None:
        self._request = request
        self._augmentation: tuple[Box | None, bool] | None = None
        is_cropped = request.seed is not None and request.augmentation.random_resized_crop
        # A random crop enlarges a part of the frame, so it needs the full resolution.
        self.size_of: SizeOf | None = None if is_cropped else self._smaller

    def resize(self, frame_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Resize and crop one frame to the encoder's input size."""
        request = self._request
        height, width = frame_HWC.shape[:2]
        require_pixel_limit(width, height, request.max_pixels)
        if self._augmentation is None:
            is_plain = request.seed is None
            self._augmentation = (
                (None, False) if is_plain else draw_augmentation(width, height, request.augmentation, request.seed or 0)
            )
        box, is_flipped = self._augmentation
        if box is None and (width, height) == resized_size(width, height, request.preprocessing):
            return center_crop_resized(frame_HWC, request.preprocessing, is_flipped)
        return resize_and_crop(Image.fromarray(np.ascontiguousarray(frame_HWC)), request.preprocessing, box, is_flipped)

    def _smaller(self, width: int, height: int) -> tuple[int, int]:
        """The size after the resize, where that is smaller; backends differ in how they enlarge."""
        require_pixel_limit(width, height, self._request.max_pixels)
        size = resized_size(width, height, self._request.preprocessing)
        return size if size[0] <= width and size[1] <= height else (width, height)
