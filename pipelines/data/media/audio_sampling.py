"""Which segments of a clip's sound are encoded."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MAX_SAMPLES = 50_000_000
"""Samples of all segments of a clip together: 200 MB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioSegments:
    """Number and length of the segments of a clip's sound that a user chooses."""

    num_segments: int = 8
    segment_s: float = 2.0
    """Length of a segment in seconds; Video-LLaMA takes 8 segments of 2 s."""

    def at(self, sample_rate_hz: int) -> "AudioSampling":
        """The same segments at an encoder's sample rate.

        Raises:
            ValueError: If the segments would hold no sound, or more than fits into memory.
        """
        count, length_s = self.num_segments, self.segment_s
        return AudioSampling(sample_rate_hz=sample_rate_hz, num_segments=count, segment_s=length_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioSampling(AudioSegments):
    """Equally long segments of a clip's sound, evenly spread over it."""

    sample_rate_hz: int
    """Sample rate of the audio encoder; other sound is resampled to it."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ValueError: If the segments would hold no sound, or more than fits into memory.
        """
        if self.sample_rate_hz < 1 or self.num_segments < 1 or self.segment_samples < 1:
            raise ValueError(f"audio of {self} holds nothing; give positive num_segments, segment_s and rate")
        if self.num_segments * self.segment_samples > _MAX_SAMPLES:
            raise ValueError(
                f"audio of {self} is more than {_MAX_SAMPLES} samples a clip; lower num_segments or segment_s"
            )

    def __str__(self) -> str:
        return f"{self.num_segments} segments of {self.segment_s:g} s at {self.sample_rate_hz} Hz"

    @property
    def segment_samples(self) -> int:
        """Samples of one segment."""
        return round(self.segment_s * self.sample_rate_hz)

    @property
    def shape(self) -> tuple[int, int]:
        """[segments, samples] of one clip's waveforms."""
        return self.num_segments, self.segment_samples

    def starts_s(self, start_s: float, end_s: float) -> NDArray[np.float64]:
        """Start times of the segments of a clip.

        The first segment starts with the clip, the last ends with it, and the others are evenly spaced between, as
        ImageBind cuts sound for Video-LLaMA. They overlap where the clip is shorter than their total length. A single
        segment starts with the clip. In a clip shorter than a segment, all segments start with it.

        Args:
            start_s: Start of the clip.
            end_s: Exclusive end of the clip.

        Returns:
            Ascending seconds [segments].
        """
        last_s = max(end_s - self.segment_s, start_s)
        return np.linspace(start_s, last_s, self.num_segments, dtype=np.float64)

    def silence(self) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Waveforms of a sample without sound, and a mask that marks all as not valid."""
        return np.zeros(self.shape, dtype=np.float32), np.zeros(self.num_segments, dtype=np.bool_)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "AudioSampling":
        """Rebuild from `dataclasses.asdict` output or its JSON."""
        return cls(**values)
