"""Where the segments of a clip's sound lie."""

import numpy as np
import pytest

from pipelines.data.media.audio_sampling import AudioSampling

SAMPLING = AudioSampling(sample_rate_hz=16_000, num_segments=4, segment_s=2.0)


@pytest.mark.parametrize(
    ("start_s", "end_s", "expected"),
    [
        (0.0, 20.0, [0, 6, 12, 18]),  # the first begins with the clip, the last ends with it
        (10.0, 30.0, [10, 16, 22, 28]),  # a part of the file
        (0.0, 8.0, [0, 2, 4, 6]),  # one after the other
        (0.0, 5.0, [0, 1, 2, 3]),  # overlapping
        (3.0, 5.0, [3, 3, 3, 3]),  # exactly one
        (3.0, 3.5, [3, 3, 3, 3]),  # shorter than one
    ],
)
def test_segments_are_evenly_spread(start_s, end_s, expected):
    np.testing.assert_allclose(SAMPLING.starts_s(start_s, end_s), expected)


def test_a_single_segment_begins_with_the_clip():
    assert AudioSampling(sample_rate_hz=8000, num_segments=1).starts_s(3.0, 60.0).tolist() == [3.0]


@pytest.mark.parametrize(
    "wrong", [{"num_segments": 0}, {"segment_s": 0.0}, {"segment_s": -1.0}, {"sample_rate_hz": 0}, {"segment_s": 1e-6}]
)
def test_nothing_to_hear_is_refused(wrong):
    with pytest.raises(ValueError, match="holds nothing; give positive num_segments"):
        AudioSampling(**{"sample_rate_hz": 16_000, **wrong})


def test_more_than_memory_is_refused():
    with pytest.raises(ValueError, match="is more than 50000000 samples a clip; lower num_segments"):
        AudioSampling(sample_rate_hz=48_000, num_segments=1000, segment_s=3600.0)
