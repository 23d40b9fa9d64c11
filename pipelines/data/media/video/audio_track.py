"""Decoding of an audio track to one waveform. Runs only in the child process."""

from collections.abc import Iterator
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from pipelines.data.failures import MediaError

_MAX_SAMPLES = 100_000_000
"""Limit of about 1.7 hours at 16 kHz, 400 MB; longer sound is decoded in parts."""
_MAX_FAILED_SHARE = 0.1
_TIME_TOLERANCE_S = 0.05
"""Gaps up to this between consecutive pieces are rounding of the container."""
_PREROLL_S = 0.25
"""Time decoded before the requested part and dropped: decoders need some packets to become exact (Opus 80 ms)."""


class AudioTrack:
    """The first audio track of an open container, decoded to mono.

    Args:
        container: Open container with at least one audio track.
        sample_rate_hz: Sample rate of the result.
        zero_s: Time in the container that counts as 0; None: the time of the first sound.
    """

    def __init__(self, container: Any, sample_rate_hz: int, zero_s: float | None) -> None:
        self._container, self._stream = container, container.streams.audio[0]
        self._stream.codec_context.thread_count = 1
        self._sample_rate_hz, self._zero_s = sample_rate_hz, zero_s
        self._num_packets = self._num_failed = 0

    def seek(self, to_s: float) -> bool:
        """Seek to shortly before a time; False where the container does not support it."""
        if self._zero_s is None or not self._stream.time_base:
            return False
        ticks = int((self._zero_s + to_s - _PREROLL_S) / self._stream.time_base)
        try:
            self._container.seek(ticks, stream=self._stream)
        except av.FFmpegError:
            return False
        return True

    def read(self, start_s: float, num_samples: int | None) -> "WaveformBuilder":
        """Decode from the current position of the container.

        Args:
            start_s: Time before which sound is dropped.
            num_samples: Number of samples after it; None: all.

        Raises:
            MediaError: "too_large".
        """
        waveform = WaveformBuilder(num_samples, self._sample_rate_hz)
        for time_s, samples in self._pieces():
            if self._zero_s is None:
                self._zero_s = time_s or 0.0
            seconds = None if time_s is None else time_s - self._zero_s - start_s
            waveform.add(None if seconds is None else round(seconds * self._sample_rate_hz), samples)
            if waveform.is_full:
                break
        return waveform

    def require_decodable(self) -> None:
        """Raise MediaError ("corrupt") if too many packets could not be decoded."""
        if self._num_failed > _MAX_FAILED_SHARE * self._num_packets:
            raise MediaError("corrupt", f"{self._num_failed} of {self._num_packets} audio packets cannot be decoded")

    def _pieces(self) -> Iterator[tuple[float | None, NDArray[np.float32]]]:
        """Yield the time in the container and the samples from there; the time is None where it is damaged."""
        # Channels are averaged here: FFmpeg's own mono conversion makes equal channels louder, up to clipping.
        resampler = av.AudioResampler(format="fltp", rate=self._sample_rate_hz)
        for packet in self._container.demux(self._stream):
            self._num_packets += packet.size > 0
            try:
                frames = packet.decode()
            except av.FFmpegError as error:
                if isinstance(error, MemoryError):
                    raise
                self._num_failed += 1
                continue
            # The last packet is empty; then the resampler is flushed, too.
            for frame in frames if packet.size else [*frames, None]:
                for resampled in resampler.resample(frame):
                    yield resampled.time, resampled.to_ndarray().mean(axis=0, dtype=np.float32)


class WaveformBuilder:
    """Joins resampled pieces of sound, each at its time, into one waveform.

    Args:
        num_samples: Length of the waveform in samples; None: all sound.
        sample_rate_hz: Sample rate of the pieces.
    """

    def __init__(self, num_samples: int | None, sample_rate_hz: int) -> None:
        self._num_samples, self._tolerance = num_samples, round(_TIME_TOLERANCE_S * sample_rate_hz)
        self._pieces: list[NDArray[np.float32]] = []
        self._end = 0
        """Position of the next sample, counted from the start of the part."""
        self._first: int | None = None
        self._gaps: list[tuple[int, int]] = []

    @property
    def is_full(self) -> bool:
        """Whether the waveform is complete."""
        return self._num_samples is not None and self._end >= self._num_samples

    def add(self, position: int | None, samples: NDArray[np.float32]) -> None:
        """Add a piece at a position; a gap before it becomes silence, samples before position 0 are dropped.

        Without a position it follows the previous piece.
        """
        position = self._end if position is None else position
        if self._num_samples is not None and position > self._num_samples:
            position, samples = self._num_samples, samples[:0]
        is_first = not self._pieces and self._end == 0
        self._first = position if self._first is None else self._first
        if is_first and position < 0:
            self._end = position
        gap = position - self._end
        if gap > (0 if is_first else self._tolerance):
            self._require_room(gap)
            self._gaps.append((self._end, self._end + gap))
            self._pieces.append(np.zeros(max(0, position) - max(0, self._end), dtype=np.float32))
            self._end += gap
        self._require_room(len(samples))
        self._pieces.append(samples[max(0, -self._end) :])
        self._end += len(samples)

    @property
    def is_complete(self) -> bool:
        """Whether the added sound covers the start of the part."""
        return self._first is not None and self._first <= 0

    @property
    def beginning(self) -> int | None:
        """Position of the first added sample inside the part."""
        if self._first is None or self._end <= 0:
            return None
        begin = max(0, self._first)
        return next((high for low, high in self._gaps if low <= begin < high), begin)

    def has_samples(self, start: int, end: int) -> bool:
        """Whether any position from `start` to `end` (exclusive) has an added sample."""
        begin, end = max(start, 0), min(end, self._end)
        return begin < end and not any(low <= begin and end <= high for low, high in self._gaps)

    def waveform(self) -> NDArray[np.float32]:
        """All pieces joined."""
        whole = np.concatenate([np.zeros(0, dtype=np.float32), *self._pieces])
        return np.clip(whole[: self._num_samples], -1.0, 1.0)

    def _require_room(self, num_added: int) -> None:
        if self._end + num_added > _MAX_SAMPLES:
            raise MediaError("too_large", f"more than {_MAX_SAMPLES} samples of sound; take a part of the clip")
