import numpy as np
import pytest

from pipelines.data.sampling import frames_at, uniform_times


def test_times_are_segment_centres():
    assert uniform_times(0.0, 8.0, 4).tolist() == [1.0, 3.0, 5.0, 7.0]
    assert uniform_times(2.0, 3.0, 1).tolist() == [2.5]


@pytest.mark.parametrize(("start_s", "end_s", "count"), [(0, 0, 1), (3, 2, 4), (-1, 2, 4), (0, 1, 0)])
def test_empty_ranges_are_refused(start_s, end_s, count):
    with pytest.raises(ValueError, match="cannot take"):
        uniform_times(start_s, end_s, count)


@pytest.mark.parametrize(
    ("time_s", "frame"),
    [
        (-0.5, 0),  # before the first frame
        (0.0, 0),  # exactly the first
        (0.9, 0),  # still shown
        (1.0, 1),  # exactly the second
        (1.0 - 1e-12, 1),  # the same, after rounding
        (4.0, 2),  # in a long gap of a variable frame rate
        (99.0, 3),  # after the last
    ],
)
def test_a_frame_is_shown_until_the_next_one_starts(time_s, frame):
    assert frames_at(np.array([time_s]), np.array([0.0, 1.0, 2.0, 5.0])).tolist() == [frame]
