"""What is asked of one media file, and what comes back."""

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
"""Libraries that decode videos, in the order in which they are tried; see `video_backends`."""
MAX_DURATION_S = 7 * 24 * 3600.0
"""Of a video, unless told otherwise: frames that claim to last longer are damaged more often than not."""
SizeOf = Callable[[int, int], tuple[int, int]]
"""From a frame's shown width and height in pixels to those it is scaled to."""


@dataclass(frozen=True, slots=True)
class Clip:
    """One decoded sample. T frames, C channels, H height, W width; A segments of sound of N samples."""

    pixels: NDArray[np.uint8]
    """[T, C, H, W]; T is 1 for an image."""
    frame_valid: NDArray[np.bool_]
    """[T] False where a frame only repeats another, because the clip has fewer than were asked for."""
    facts: MediaFacts | None = None
    """Only where they were asked for."""
    waveforms: NDArray[np.float32] | None = None
    """[A, N] mono sound within [-1, 1], zero where it is not valid; None where none was asked for."""
    audio_valid: NDArray[np.bool_] | None = None
    """[A] False where there is no sound: an image, a file without audio track, a segment before the sound begins or
    behind its end; and where a segment only repeats another, for the clip is no longer than one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipRequest:
    """What to make of one video."""

    preprocessing: Preprocessing
    num_frames: int
    max_pixels: int
    max_duration_s: float = MAX_DURATION_S
    """Of the whole file, whatever part of it is wanted."""
    sampling: Sampling = Sampling()
    start_s: float | None = None
    """Seconds after the first frame; None: the beginning."""
    end_s: float | None = None
    """Exclusive, seconds after the first frame; None: the end."""
    augmentation: Augmentation = Augmentation()
    seed: int | None = None
    """Draws frames and augmentation, one draw for all frames of the clip. None: nothing is left to chance."""
    wants_facts: bool = False
    audio: AudioSampling | None = None
    """Sound to decode with the pictures; None: none."""

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
    """What to make of a file's sound."""

    sample_rate_hz: int
    max_duration_s: float = MAX_DURATION_S
    """Of the whole file's pictures."""
    start_s: float | None = None
    """Seconds after the first video frame; None: the beginning."""
    end_s: float | None = None
    """Exclusive, seconds after the first video frame; None: the end of the sound."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, the inverse of `WaveformRequest(**values)`."""
        return dataclasses.asdict(self)
