"""Sample frames of one clip. Runs only in the killable child: decoders crash and hang on damaged files."""

import errno
from collections.abc import Sequence

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.data.clip import BACKEND_NAMES, Clip, ClipRequest, SizeOf
from pipelines.data.media import MediaError
from pipelines.data.sampling import ClipFrames, choose_frames
from pipelines.data.transforms import Box, augment, cut, fit, resized_size
from pipelines.data.video_backends import BACKENDS
from pipelines.data.video_pyav import rotation_of
from pipelines.data.video_survey import VideoSurvey, check_pixels, survey

_PASSING_ERRORS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ECONNRESET)


def read_clip(path: str, request: ClipRequest, backends: Sequence[str] = BACKEND_NAMES) -> Clip:
    """Decode sampled frames by the first backend that can.

    Frames are chosen by presentation time, so variable frame rates and non-zero starts do not matter. The container's
    rotation is applied; pixel aspect ratios are not.

    Args:
        path: Local file.
        request: What to make of it.
        backends: Names of those to try, in this order.

    Raises:
        MediaError: If the clip cannot be used.
    """
    try:
        found = survey(path, request.max_pixels)
        indexes, frame_valid = _choose(found, request)
        pixels = _decode(path, found, request, indexes, backends)
        facts = found.facts(rotation_of(path, found)) if request.wants_facts else None
        return Clip(pixels=pixels, frame_valid=frame_valid, facts=facts)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise media_error(error) from error


def media_error(error: Exception) -> MediaError:
    """The verdict that a decoder's or the operating system's error amounts to."""
    message = f"{type(error).__name__}: {error}"
    if isinstance(error, MemoryError):
        return MediaError("too_large", "decoding needs more memory than video_memory_bytes allows")
    if isinstance(error, FileNotFoundError):
        return MediaError("missing", message, stage="read")
    if isinstance(error, PermissionError):
        return MediaError("config", message, stage="read")
    if isinstance(error, av.error.DecoderNotFoundError):
        return MediaError("unsupported", message)
    if isinstance(error, OSError) and error.errno in _PASSING_ERRORS:
        return MediaError("transient", message, stage="read")
    return MediaError("corrupt", message)


def _choose(found: VideoSurvey, request: ClipRequest) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    duration_s = found.duration_s
    start_s = request.start_s or 0.0
    end_s = duration_s if request.end_s is None else min(request.end_s, duration_s)
    if not 0 <= start_s < end_s:
        bounds = f"start_s={start_s:g} and end_s={end_s:g}"
        raise MediaError("config", f"{bounds} leave nothing of a clip of {duration_s:.3f} s", stage="manifest")
    frames = ClipFrames(starts_s=found.starts_s, is_key=found.is_key, start_s=start_s, end_s=end_s)
    try:
        return choose_frames(request.sampling, frames, request.num_frames, request.seed)
    except ValueError as error:
        raise MediaError("config", str(error), stage="manifest") from error


def _decode(
    path: str, found: VideoSurvey, request: ClipRequest, indexes: NDArray[np.int64], backends: Sequence[str]
) -> NDArray[np.uint8]:
    failures = []
    wanted = np.unique(indexes)
    for backend in (BACKENDS[name] for name in backends):
        if not backend.suits(found):
            continue
        fitter = _Fitter(request)
        try:
            shown = backend.frames_at(path, found, wanted, fitter.size_of, request.preprocessing.interpolation)
            fitted = {index: fitter.fit(frame) for index, frame in shown}
            return np.stack([fitted[index] for index in indexes.tolist()])
        except (MediaError, MemoryError):
            raise
        except Exception as error:  # backends fail in many ways; the next may know better
            failures.append((backend.name, error))
    if not failures:
        raise MediaError("unsupported", f"no usable decoder for {found.codec}")
    verdict = media_error(failures[0][1])
    told = "; ".join(f"{name}: {type(error).__name__} {error}" for name, error in failures)
    raise MediaError(verdict.error_class, told, stage=verdict.stage)


class _Fitter:
    """Fits a clip's frames, all with the one crop and flip drawn for the clip."""

    def __init__(self, request: ClipRequest) -> None:
        self._request = request
        self._plan: tuple[Box | None, bool] | None = None
        is_cropped = request.seed is not None and request.augmentation.random_resized_crop
        # A random crop enlarges a part of the frame, so that it wants all the pixels there are.
        self.size_of: SizeOf | None = None if is_cropped else self._smaller

    def fit(self, frame_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """One frame at the encoder's input size."""
        request = self._request
        height, width = frame_HWC.shape[:2]
        check_pixels(width, height, request.max_pixels)
        if self._plan is None:
            is_plain = request.seed is None
            self._plan = (None, False) if is_plain else augment(width, height, request.augmentation, request.seed or 0)
        box, is_flipped = self._plan
        if box is None and (width, height) == resized_size(width, height, request.preprocessing):
            return cut(frame_HWC, request.preprocessing, is_flipped)
        return fit(Image.fromarray(np.ascontiguousarray(frame_HWC)), request.preprocessing, box, is_flipped)

    def _smaller(self, width: int, height: int) -> tuple[int, int]:
        """The size that `fit` resizes to, where that is smaller; backends enlarge as they like."""
        check_pixels(width, height, self._request.max_pixels)
        size = resized_size(width, height, self._request.preprocessing)
        return size if size[0] <= width and size[1] <= height else (width, height)
