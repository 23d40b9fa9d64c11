"""Decoding requests for one media file, and the decoded clip."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.data.media.audio_sampling import AudioSampling
from pipelines.data.media.facts import MediaFacts
from pipelines.data.media.frame_sampling import Sampling
from pipelines.data.media.transforms import Augmentation
from qformer.preprocessing import Preprocessing

BACKEND_NAMES = ("pyav", "decord", "torchcodec")
"""Libraries that decode videos, in the order in which they are tried; see `video.backends`."""
MAX_DURATION_S = 7 * 24 * 3600.0
"""Default limit for a video: longer claimed durations are mostly damage."""
SizeOf = Callable[[int, int], tuple[int, int]]
"""Maps a frame's display width and height in pixels to the size it is scaled to."""


@dataclass(frozen=True, slots=True)
class Clip:
    """One decoded sample. T frames, C channels, H height, W width; A segments of sound of N samples."""

    pixels: NDArray[np.uint8]
    """[T, C, H, W]; T is 1 for an image."""
    frame_valid: NDArray[np.bool_]
    """[T] False where a frame repeats another because the clip has fewer than requested."""
    facts: MediaFacts | None = None
    """Facts of the file; None unless requested."""
    waveforms: NDArray[np.float32] | None = None
    """[A, N] mono sound within [-1, 1], zero where not valid; None unless requested."""
    audio_valid: NDArray[np.bool_] | None = None
    """[A] False where there is no sound: an image, a file without audio track, a segment before the start or after the
    end of the sound. Also False where a segment repeats another because the clip is no longer than one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipRequest:
    """Settings for decoding one clip."""

    preprocessing: Preprocessing
    num_frames: int
    max_pixels: int
    max_duration_s: float = MAX_DURATION_S
    """Limit for the whole file, also where only a part is decoded."""
    sampling: Sampling = Sampling()
    start_s: float | None = None
    """Seconds after the first frame; None: the beginning."""
    end_s: float | None = None
    """Exclusive, seconds after the first frame; None: the end."""
    augmentation: Augmentation = Augmentation()
    seed: int | None = None
    """Seed for frames and augmentation, drawn once for the whole clip. None: nothing is random."""
    wants_facts: bool = False
    audio: AudioSampling | None = None
    """Segments of sound to decode with the frames; None: no sound."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, the inverse of `from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ClipRequest":
        """Rebuild from `to_dict` output or its JSON."""
        low, high = values["augmentation"]["crop_scale"]
        return cls(
            **{
                **values,
                "preprocessing": Preprocessing.from_dict(values["preprocessing"]),
                "sampling": Sampling.from_dict(values["sampling"]),
                "audio": None if values["audio"] is None else AudioSampling.from_dict(values["audio"]),
                "augmentation": Augmentation(**{**values["augmentation"], "crop_scale": (low, high)}),
            }
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class WaveformRequest:
    """Settings for decoding the sound of a file."""

    sample_rate_hz: int
    max_duration_s: float = MAX_DURATION_S
    """Limit for the video stream of the whole file."""
    start_s: float | None = None
    """Seconds after the first video frame; None: the beginning."""
    end_s: float | None = None
    """Exclusive, seconds after the first video frame; None: the end of the sound."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, the inverse of `WaveformRequest(**values)`."""
        return dataclasses.asdict(self)
