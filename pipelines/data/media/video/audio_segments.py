"""Segments of a clip's sound, without decoding what lies between. Runs only in the killable child."""

import numpy as np
from numpy.typing import NDArray

from pipelines.data.media.audio_sampling import AudioSampling
from pipelines.data.media.video.audio_track import AudioTrack, WaveformBuilder
from pipelines.data.media.video.probe import open_container

_MIN_SEEK_S = 2.0
"""Shorter gaps between segments are decoded: that takes no longer than a seek."""
_MAX_RUN_S = 60.0
"""Segments that are decoded in one go last no longer together, which bounds their memory; a longer one goes alone."""


def read_segments(
    path: str, sampling: AudioSampling, *, start_s: float, end_s: float, zero_s: float
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Decode segments of the first audio track to mono.

    Where the sound begins inside a segment or ends inside it, the rest is silence. A segment without one sample of
    sound is not valid; of several that are the same (in a clip no longer than a segment) the first alone is.

    Args:
        path: Local file with an audio track.
        sampling: Which segments.
        start_s: Beginning of the clip in seconds after the first video frame.
        end_s: Its exclusive end in the same seconds.
        zero_s: Time of the first video frame in the container.

    Returns:
        waveforms, float32 [segments, samples] within [-1, 1] and zero where not valid; and which segments are valid.

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
            # A segment may be longer than the clip, whose sound it does not leave.
            last_s = min(float(starts_s[run[-1]]) + sampling.segment_s, end_s)
            track = reader.read(first_s, round((last_s - first_s) * sampling.sample_rate_hz))
            whole = track.waveform()
            for segment in run:
                offset = round((float(starts_s[segment]) - first_s) * sampling.sample_rate_hz)
                if not is_repeated[segment] and track.has_samples(offset, offset + num_samples):
                    piece = whole[offset : offset + num_samples]
                    waveforms[segment, : len(piece)], is_valid[segment] = piece, True
        reader.sound.require_decodable()
    finally:
        reader.close()
    return waveforms, is_valid


def _runs(starts_s: NDArray[np.float64], segment_s: float) -> list[list[int]]:
    """Numbers of neighbouring segments that are decoded in one go."""
    runs = [[0]]
    for segment in range(1, len(starts_s)):
        gap_s = starts_s[segment] - starts_s[segment - 1] - segment_s
        length_s = starts_s[segment] + segment_s - starts_s[runs[-1][0]]
        if gap_s > _MIN_SEEK_S or length_s > _MAX_RUN_S:
            runs.append([])
        runs[-1].append(segment)
    return runs


class _Reader:
    """Parts of a file's sound in ascending order, by seeking where the file's index can be trusted."""

    def __init__(self, path: str, sample_rate_hz: int, zero_s: float) -> None:
        self._path, self._sample_rate_hz, self._zero_s = path, sample_rate_hz, zero_s
        self._is_index_right = False
        self._container = open_container(path)
        self._begin()

    def read(self, start_s: float, num_wanted: int) -> WaveformBuilder:
        """Decode a part; from the file's beginning where a seek leads behind the part's."""
        if start_s <= 0:
            return self.sound.read(start_s, num_wanted)
        is_sought = self.sound.seek(start_s)
        track = self.sound.read(start_s, num_wanted)
        if self._is_index_right or track.is_complete:
            return track
        self.close()
        self._container = open_container(self._path)
        self._begin()
        again = self.sound.read(start_s, num_wanted)
        # The sound begins there indeed, or has a gap.
        self._is_index_right = is_sought and again.beginning == track.beginning
        return again

    def close(self) -> None:
        self._container.close()

    def _begin(self) -> None:
        self.sound = AudioTrack(self._container, self._sample_rate_hz, self._zero_s)
