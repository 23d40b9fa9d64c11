"""One sample's bytes to pixels; training, evaluation, the caption job and serving all decode by this class."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pipelines.data import storage
from pipelines.data.decode import decode_image
from pipelines.data.media import MediaError
from pipelines.data.schema import IMAGE, KINDS, VIDEO
from pipelines.data.stage_costs import StageCosts
from pipelines.data.transforms import Augmentation, augment, fit
from pipelines.data.video import ClipRequest
from pipelines.data.video_pool import VideoPool
from qformer.preprocessing import Preprocessing

ValueT = TypeVar("ValueT")
_READ_TRIES = 3
_RETRY_PAUSE_S = 0.5
_DRAFT_FACTOR = 2
"""JPEGs are decoded to at least this many times the resize's target; the filter hides the rest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one media file may cost."""

    max_bytes: int = 2 * 1024**3
    max_pixels: int = 100_000_000
    """Width x height of an image or frame."""
    video_timeout_s: float = 30.0
    video_memory_bytes: int = 4 * 1024**3


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeSettings:
    """How files become pixels."""

    preprocessing: Preprocessing
    num_frames: int = 8
    """Frames sampled uniformly from a video; an image is one frame."""
    limits: Limits = Limits()
    augmentation: Augmentation = Augmentation()
    """Applied only to samples decoded with an augmentation seed."""

    def num_frames_of(self, kind: str) -> int:
        """Frames that `kind` decodes to."""
        return self.num_frames if kind == VIDEO else 1

    def row_bytes(self, kind: str) -> int:
        """Bytes of one sample's pixels."""
        return self.num_frames_of(kind) * 3 * self.preprocessing.height * self.preprocessing.width


class SampleDecoder:
    """Decodes images in this process and videos in killable children.

    Args:
        settings: How files become pixels.
        num_video_children: Videos that can be decoded at a time; for callers with threads.
    """

    def __init__(self, settings: DecodeSettings, num_video_children: int = 1) -> None:
        self.settings = settings
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
        augmentation_seed: int | None = None,
        costs: StageCosts | None = None,
    ) -> NDArray[np.uint8]:
        """Fetch and decode one sample.

        Args:
            kind: "image" or "video".
            media: Path or URI; not read when `data` is given.
            data: The file's content.
            start_s: Beginning of the clip in seconds after the video's first frame; None: the beginning.
            end_s: Exclusive end of the clip in the same seconds; None: the end.
            augmentation_seed: Draws crop and flip; None leaves the picture as it is.
            costs: Gets what this sample took added; None measures for nobody.

        Returns:
            uint8 [T, 3, height, width]; T is 1 for an image.

        Raises:
            MediaError: If the sample cannot be used. Nothing else, whatever the file holds.
        """
        if kind not in KINDS:
            raise MediaError("config", f"kind {kind!r} is neither {IMAGE!r} nor {VIDEO!r}", stage="manifest")
        costs = StageCosts() if costs is None else costs
        if data is None and not media:
            raise MediaError("config", "neither media nor bytes are given", stage="manifest")
        if data is not None and len(data) > self.settings.limits.max_bytes:
            raise MediaError("too_large", f"{len(data)} bytes exceed the limit", stage="read")
        if kind == VIDEO:
            return self._decode_video(media, data, start_s, end_s, augmentation_seed, costs)
        return self._decode_image(data if data is not None else self._read(str(media), costs), augmentation_seed, costs)

    def close(self) -> None:
        """End the video children."""
        self.videos.close()

    def _decode_image(self, data: bytes, augmentation_seed: int | None, costs: StageCosts) -> NDArray[np.uint8]:
        settings, preprocessing = self.settings, self.settings.preprocessing
        is_plain = augmentation_seed is None or not settings.augmentation.random_resized_crop
        # A random crop enlarges a part of the picture, so that it wants all the pixels there are.
        target = max(preprocessing.resize_short_side, preprocessing.height, preprocessing.width)
        with costs.measure("decode"):
            image = decode_image(data, settings.limits.max_pixels, _DRAFT_FACTOR * target if is_plain else None)
        box, is_flipped = None, False
        if augmentation_seed is not None:
            box, is_flipped = augment(image.width, image.height, settings.augmentation, augmentation_seed)
        with costs.measure("transform"):
            return fit(image, preprocessing, box, is_flipped)[None]

    def _decode_video(
        self,
        media: str | None,
        data: bytes | None,
        start_s: float | None,
        end_s: float | None,
        augmentation_seed: int | None,
        costs: StageCosts,
    ) -> NDArray[np.uint8]:
        request = ClipRequest(
            preprocessing=self.settings.preprocessing,
            num_frames=self.settings.num_frames,
            max_pixels=self.settings.limits.max_pixels,
            start_s=start_s,
            end_s=end_s,
            augmentation=self.settings.augmentation,
            augmentation_seed=augmentation_seed,
        )
        if data is None and storage.is_local(str(media)):
            # The child reads local files itself: large ones are never copied through memory.
            path, content = self._checked_path(str(media), costs), b""
        else:
            path, content = None, data if data is not None else self._read(str(media), costs)
        with costs.measure("decode"):
            return self.videos.read_clip(request, path=path, data=content)

    def _read(self, media: str, costs: StageCosts) -> bytes:
        with costs.measure("fetch"):
            data = _with_retries(media, lambda: storage.read_bytes(media, self.settings.limits.max_bytes))
        costs.fetched_bytes += len(data)
        return data

    def _checked_path(self, media: str, costs: StageCosts) -> str:
        path = storage.local_path(media)
        with costs.measure("fetch"):
            size_bytes = _with_retries(media, lambda: storage.require_regular(path)).st_size
        costs.fetched_bytes += size_bytes
        if size_bytes > self.settings.limits.max_bytes:
            raise MediaError("too_large", f"{size_bytes} bytes exceed the limit", stage="read")
        if size_bytes == 0:
            raise MediaError("corrupt", "the file is empty")
        if not os.access(path, os.R_OK):
            raise MediaError("config", "no permission to read it", stage="read")
        return path


def _with_retries(media: str, read: Callable[[], ValueT]) -> ValueT:
    """Call `read`, again after failures that may pass; what stays an error becomes a MediaError."""
    for attempt in range(1, _READ_TRIES + 1):
        try:
            return read()
        except FileNotFoundError as error:
            raise MediaError("missing", f"no file at {media}", stage="read", tries=attempt) from error
        except storage.FileTooLargeError as error:
            raise MediaError("too_large", str(error), stage="read", tries=attempt) from error
        except (IsADirectoryError, NotADirectoryError, PermissionError, ValueError, ImportError) as error:
            raise MediaError("config", f"{type(error).__name__}: {error}", stage="read", tries=attempt) from error
        except Exception as error:  # remote file systems raise their own types
            if attempt == _READ_TRIES or storage.is_local(media):
                message = f"{type(error).__name__}: {error}"
                raise MediaError("transient", message, stage="read", tries=attempt) from error
            time.sleep(_RETRY_PAUSE_S * attempt)
    raise AssertionError("unreachable: the last try returns or raises")
