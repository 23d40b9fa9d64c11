"""Segments of a clip's sound, without decoding the gaps between. Runs only in the child process."""

import numpy as np
from numpy.typing import NDArray

from pipelines.data.media.audio_sampling import AudioSampling
from pipelines.data.media.video.audio_track import AudioTrack, WaveformBuilder
from pipelines.data.media.video.probe import open_container

_MIN_SEEK_S = 2.0
"""Shorter gaps between segments are decoded, which takes no longer than a seek."""
_MAX_RUN_S = 60.0
"""Longest group of segments decoded together, which bounds memory; a longer segment is decoded alone."""


def read_segments(
    path: str, sampling: AudioSampling, *, start_s: float, end_s: float, zero_s: float
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Decode segments of the first audio track to mono.

    Where the sound starts or ends inside a segment, the rest of it is silence. A segment without any sample of sound is
    not valid. Of several equal segments (in a clip no longer than one), only the first is valid.

    Args:
        path: Local file with an audio part.
        sampling: Number, length and rate of the segments.
        start_s: Start of the clip in seconds after the first video frame.
        end_s: Exclusive end of the clip in the same seconds.
        zero_s: Time of the first video frame in the container.

    Returns:
        Waveforms, float32 [segments, samples] within [-1, 1], zero where not valid; and which segments are valid.

    Raises:
        MediaError: If the sound cannot be used.
        av.FFmpegError: If the file cannot be read.
    """
    starts_s, num_samples = sampling.starts_s(start_s, end_s), sampling.segment_samples
    waveforms, is_valid = sampling.silence()
    is_repeated = np.concatenate([[False], np.diff(starts_s) <= 0])
    reader = _Reader(path, sampling.sample_rate_hz, zero_s)
    try:
        for run in _runs(starts_s, sampling.segment_s):
            first_s = float(starts_s[run[0]])
            # A segment may be longer than the clip; sound after the clip is left out.
            last_s = min(float(starts_s[run[-1]]) + sampling.segment_s, end_s)
            part = reader.read(first_s, round((last_s - first_s) * sampling.sample_rate_hz))
            whole = part.waveform()
            for segment in run:
                offset = round((float(starts_s[segment]) - first_s) * sampling.sample_rate_hz)
                if not is_repeated[segment] and part.has_samples(offset, offset + num_samples):
                    piece = whole[offset : offset + num_samples]
                    waveforms[segment, : len(piece)], is_valid[segment] = piece, True
        reader.audio.require_decodable()
    finally:
        reader.close()
    return waveforms, is_valid


def _runs(starts_s: NDArray[np.float64], segment_s: float) -> list[list[int]]:
    """Group neighbouring segments that are decoded together."""
    runs = [[0]]
    for segment in range(1, len(starts_s)):
        gap_s = starts_s[segment] - starts_s[segment - 1] - segment_s
        length_s = starts_s[segment] + segment_s - starts_s[runs[-1][0]]
        if gap_s > _MIN_SEEK_S or length_s > _MAX_RUN_S:
            runs.append([])
        runs[-1].append(segment)
    return runs


class _Reader:
    """Reads parts of a file's sound in ascending order; seeks where the file's index is correct."""

    def __init__(self, path: str, sample_rate_hz: int, zero_s: float) -> None:
        self._path, self._sample_rate_hz, self._zero_s = path, sample_rate_hz, zero_s
        self._is_index_correct = False
        self._container = open_container(path)
        self._begin()

    def read(self, start_s: float, num_samples: int) -> WaveformBuilder:
        """Decode a part; from the start of the file where a seek ends after the start of the part."""
        if start_s <= 0:
            return self.audio.read(start_s, num_samples)
        is_seekable = self.audio.seek(start_s)
        part = self.audio.read(start_s, num_samples)
        if self._is_index_correct or part.is_complete:
            return part
        self.close()
        self._container = open_container(self._path)
        self._begin()
        again = self.audio.read(start_s, num_samples)
        # An equal result shows that the index is correct: the sound starts there, or has a gap.
        self._is_index_correct = is_seekable and again.beginning == part.beginning
        return again

    def close(self) -> None:
        self._container.close()

    def _begin(self) -> None:
        self.audio = AudioTrack(self._container, self._sample_rate_hz, self._zero_s)
