"""The sound of a video as a waveform. Runs only in the killable child."""

import contextlib
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from pipelines.data.clip import WaveformRequest
from pipelines.data.media import MediaError
from pipelines.data.video import media_error
from pipelines.data.video_survey import open_container, survey

_MAX_SAMPLES = 100_000_000
"""About 1.7 hours at 16 kHz, 400 MB; take long sound in parts."""
_MAX_FAILED_SHARE = 0.1
_TIME_TOLERANCE_S = 0.05
"""Smaller gaps between the times of consecutive pieces are rounding of the container."""


def read_waveform(path: str, request: WaveformRequest, max_pixels: int) -> NDArray[np.float32] | None:
    """Decode the first audio track to mono, the mean of its channels.

    Time zero is the first video frame, so that clip bounds mean the same for sound and picture (in a file without
    pictures it is the first sound). Where the sound begins later than the part that is asked for, or has gaps, there
    is silence; where it ends earlier, the waveform is shorter.

    Args:
        path: Local file.
        request: Sample rate and part.
        max_pixels: Limit of width x height of the video frames.

    Returns:
        float32 [samples] within [-1, 1], or None when there is no audio track.

    Raises:
        MediaError: If the sound cannot be used.
    """
    start_s, end_s = request.start_s or 0.0, request.end_s
    if start_s < 0 or (end_s is not None and end_s <= start_s):
        raise MediaError("config", f"start_s={start_s:g} and end_s={end_s} leave no sound", stage="manifest")
    try:
        with open_container(path) as container:
            if not container.streams.audio:
                return None
            has_video = len(container.streams.video) > 0
        zero_s = 0.0
        if has_video:
            found = survey(path, max_pixels)
            zero_s = float(found.starts[0]) * found.unit_s
        with open_container(path) as container:
            return _decode(container, request.sample_rate_hz, start_s, end_s, zero_s if has_video else None)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise media_error(error) from error


def _decode(
    container: Any, sample_rate_hz: int, start_s: float, end_s: float | None, zero_s: float | None
) -> NDArray[np.float32]:
    stream = container.streams.audio[0]
    stream.codec_context.thread_count = 1
    if start_s > 0 and zero_s is not None and stream.time_base:
        with contextlib.suppress(av.FFmpegError):  # not seekable: decode on to it
            container.seek(int((zero_s + start_s) / stream.time_base), stream=stream)
    # Channels are averaged here: FFmpeg's own way to mono makes equal channels louder, up to clipping.
    resampler = av.AudioResampler(format="fltp", rate=sample_rate_hz)
    track = _Track(None if end_s is None else round((end_s - start_s) * sample_rate_hz), sample_rate_hz)
    num_packets = num_failed = 0
    for packet in container.demux(stream):
        num_packets += packet.size > 0
        try:
            frames = packet.decode()
        except av.FFmpegError as error:
            if isinstance(error, MemoryError):
                raise
            num_failed += 1
            continue
        # The last packet is empty, and then the resampler is emptied too.
        for frame in frames if packet.size else [*frames, None]:
            for resampled in resampler.resample(frame):
                zero_s = resampled.time if zero_s is None else zero_s
                position = round((resampled.time - zero_s - start_s) * sample_rate_hz)
                track.add(position, resampled.to_ndarray().mean(axis=0, dtype=np.float32))
        if track.is_full:
            break
    if num_failed > _MAX_FAILED_SHARE * num_packets:
        raise MediaError("corrupt", f"{num_failed} of {num_packets} audio packets cannot be decoded")
    return track.waveform()


class _Track:
    """Resampled pieces of sound, each at its time.

    Args:
        num_wanted: Samples after which the rest does not matter; None: all are wanted.
        sample_rate_hz: Of the samples.
    """

    def __init__(self, num_wanted: int | None, sample_rate_hz: int) -> None:
        self._num_wanted, self._tolerance = num_wanted, round(_TIME_TOLERANCE_S * sample_rate_hz)
        self._pieces: list[NDArray[np.float32]] = []
        self._end = 0
        """Position of the next sample, counted from the part's beginning."""

    @property
    def is_full(self) -> bool:
        return self._num_wanted is not None and self._end >= self._num_wanted

    def add(self, position: int, samples: NDArray[np.float32]) -> None:
        """Put a piece at its place: silence before it where there is a gap, nothing of what lies before 0."""
        is_first = not self._pieces and self._end == 0
        if is_first and position < 0:
            self._end = position
        gap = position - self._end
        if gap > (0 if is_first else self._tolerance):
            self._require(gap)
            self._pieces.append(np.zeros(gap, dtype=np.float32))
            self._end += gap
        self._require(len(samples))
        self._pieces.append(samples[max(0, -self._end) :])
        self._end += len(samples)

    def waveform(self) -> NDArray[np.float32]:
        """All pieces as one."""
        whole = np.concatenate([np.zeros(0, dtype=np.float32), *self._pieces])
        return np.clip(whole[: self._num_wanted], -1.0, 1.0)

    def _require(self, num_more: int) -> None:
        if self._end + num_more > _MAX_SAMPLES:
            raise MediaError("too_large", f"more than {_MAX_SAMPLES} samples of sound; take a part of the clip")
