import random

import numpy as np
import pytest

from pipelines.data.media.frame_sampling import (
    ClipFrames,
    Sampling,
    capped_times,
    choose_frames,
    explicit_times,
    frames_at,
    head_tail_times,
    key_times,
    segment_times,
    uniform_times,
)

# A clip of variable frame rate: five quick frames, then three that each stay for a second; key frames 0, 4 and 6.
VFR_STARTS_S = np.array([0.0, 0.1, 0.2, 0.3, 0.4, 1.0, 2.0, 3.0])
VFR_KEYS = np.array([1, 0, 0, 0, 1, 0, 1, 0], dtype=bool)
# Ten frames a second for two seconds, a key frame every five.
CFR_STARTS_S = np.arange(20) / 10
CFR_KEYS = np.arange(20) % 5 == 0


def _vfr(start_s=0.0, end_s=4.0) -> ClipFrames:
    return ClipFrames(starts_s=VFR_STARTS_S, is_key=VFR_KEYS, start_s=start_s, end_s=end_s)


def _cfr(start_s=0.0, end_s=2.0) -> ClipFrames:
    return ClipFrames(starts_s=CFR_STARTS_S, is_key=CFR_KEYS, start_s=start_s, end_s=end_s)


@pytest.mark.parametrize(
    ("sampling", "frames", "count", "indexes", "valid"),
    [
        # Centres of four segments of half a second; a centre on a frame's start shows that frame.
        (Sampling(), _cfr(), 4, [2, 7, 12, 17], "1111"),
        # The same moments of a clip that is a part of the file.
        (Sampling(), _cfr(1.0, 1.4), 2, [11, 13], "11"),
        # By time, not by index: 0.5, 1.5, 2.5 and 3.5 s.
        (Sampling(), _vfr(), 4, [4, 5, 6, 7], "1111"),
        # Fewer frames than asked for: a repetition is not valid.
        (Sampling(), _vfr(1.0, 3.0), 4, [5, 5, 6, 6], "1010"),
        # Without seed, chance is left out.
        (Sampling(strategy="random_segment"), _cfr(), 4, [2, 7, 12, 17], "1111"),
        (Sampling(strategy="head_tail"), _cfr(), 4, [2, 7, 12, 17], "1111"),
        # An odd frame goes to the head: three centres of the first second, two of the other.
        (Sampling(strategy="head_tail"), _cfr(), 5, [1, 5, 8, 12, 17], "11111"),
        # By time in a variable frame rate too: 0.5, 1.5, 2.5 and 3.5 s; then 0.33, 1, 1.67, 2.5 and 3.5 s.
        (Sampling(strategy="random_segment"), _vfr(), 4, [4, 5, 6, 7], "1111"),
        (Sampling(strategy="head_tail"), _vfr(), 4, [4, 5, 6, 7], "1111"),
        (Sampling(strategy="head_tail"), _vfr(), 5, [3, 5, 5, 6, 7], "11011"),
        # Two a second for two seconds; the rest repeats the last.
        (Sampling(strategy="fps", fps=2.0), _cfr(), 6, [2, 7, 12, 17, 17, 17], "111100"),
        # The cap of the count comes first.
        (Sampling(strategy="fps", fps=10.0), _cfr(), 4, [2, 7, 12, 17], "1111"),
        # A clip shorter than one interval still gives a frame.
        (Sampling(strategy="fps", fps=0.1), _vfr(), 2, [6, 6], "10"),
        # All key frames, then repetition.
        (Sampling(strategy="key_frames"), _vfr(), 4, [0, 4, 6, 6], "1110"),
        # More key frames than wanted are thinned evenly.
        (Sampling(strategy="key_frames"), _cfr(), 2, [5, 15], "11"),
        # Key frames of a part: the end is exclusive.
        (Sampling(strategy="key_frames"), _cfr(0.5, 1.5), 3, [5, 10, 10], "110"),
        # A part without key frames gives its middle.
        (Sampling(strategy="key_frames"), _cfr(1.1, 1.5), 2, [13, 13], "10"),
        # Times count from the clip's start.
        (Sampling(strategy="times", times_s=(0.0, 0.35, 1.9)), _cfr(), 3, [0, 3, 19], "111"),
        (Sampling(strategy="times", times_s=(0.0, 0.35, 1.9)), _cfr(1.0, 2.0), 3, [10, 13, 13], "110"),
        (Sampling(strategy="times", times_s=(0.25, 2.99)), _vfr(), 2, [2, 6], "11"),
    ],
)
def test_chosen_frames(sampling, frames, count, indexes, valid):
    found, is_valid = choose_frames(sampling, frames, count, None)
    assert found.tolist() == indexes
    assert is_valid.tolist() == [mark == "1" for mark in valid]


@pytest.mark.parametrize("strategy", ["random_segment", "head_tail"])
def test_chance_follows_the_seed_alone(strategy):
    sampling = Sampling(strategy=strategy)
    draws = {seed: choose_frames(sampling, _cfr(), 4, seed)[0].tolist() for seed in range(20)}
    assert draws[3] == choose_frames(sampling, _cfr(), 4, 3)[0].tolist()
    assert len({tuple(draw) for draw in draws.values()}) > 10
    assert all(draw == sorted(draw) for draw in draws.values())
    assert choose_frames(Sampling(), _cfr(), 4, 3)[0].tolist() == choose_frames(Sampling(), _cfr(), 4, 4)[0].tolist()


@pytest.mark.parametrize("clip", [_vfr(), _vfr(0.35, 2.2), _cfr(), _cfr(0.5, 1.7)])
def test_random_frames_are_those_shown_at_random_times(clip):
    """Of each segment, or each half, some moment is drawn, and a player shows the last frame that has started."""
    length_s = clip.end_s - clip.start_s
    quarters = [(clip.start_s + length_s * part / 4, clip.start_s + length_s * (part + 1) / 4) for part in range(4)]
    halves = [(clip.start_s, clip.start_s + length_s / 2)] * 2 + [(clip.start_s + length_s / 2, clip.end_s)] * 2
    for strategy, parts in (("random_segment", quarters), ("head_tail", halves)):
        seen = [set() for _ in parts]
        for seed in range(400):
            indexes = choose_frames(Sampling(strategy=strategy), clip, 4, seed)[0].tolist()
            for place, index in enumerate(indexes):
                seen[place].add(index)
        for place, (low_s, high_s) in enumerate(parts):
            times_s = np.arange(low_s + 0.0005, high_s - 0.0004, 0.001)
            shown = {max(index for index, start_s in enumerate(clip.starts_s) if start_s <= t) for t in times_s}
            assert seen[place] <= shown, (strategy, place)
            assert strategy == "head_tail" or seen[place] == shown, "every frame of the segment comes up"


def test_random_times_stay_in_their_parts():
    for seed in range(50):
        segments = segment_times(2.0, 10.0, 4, random.Random(seed))
        assert [int((time - 2.0) // 2.0) for time in segments] == [0, 1, 2, 3]
        times = head_tail_times(2.0, 10.0, 5, random.Random(seed))
        assert (np.diff(times) >= 0).all() and (times[:3] < 6.0).all() and (times[3:] >= 6.0).all()
        assert times[0] >= 2.0 and times[-1] <= 10.0


def test_times_are_segment_centres():
    assert uniform_times(0.0, 8.0, 4).tolist() == [1.0, 3.0, 5.0, 7.0]
    assert uniform_times(2.0, 3.0, 1).tolist() == [2.5]


def test_capped_times_keep_their_distance():
    assert capped_times(0.0, 3.0, 8, 1.0).tolist() == [0.5, 1.5, 2.5]
    assert capped_times(0.0, 0.3, 8, 10.0).tolist() == pytest.approx([0.05, 0.15, 0.25])  # 0.3 * 10 rounds to below 3


def test_key_times_are_those_of_the_codec():
    assert key_times(_cfr(), 8).tolist() == [0.0, 0.5, 1.0, 1.5]


def test_no_explicit_time_in_the_clip_is_refused():
    with pytest.raises(ValueError, match="none of the times"):
        explicit_times(1.0, 2.0, 2, (1.0, 5.0))


@pytest.mark.parametrize(
    "values",
    [
        {"strategy": "fps"},
        {"strategy": "fps", "fps": 0.0},
        {"fps": 1.0},
        {"strategy": "times"},
        {"strategy": "times", "times_s": (1.0, 1.0)},
        {"strategy": "times", "times_s": (-1.0, 1.0)},
        {"times_s": (1.0,)},
    ],
)
def test_values_that_do_not_go_together_are_refused(values):
    with pytest.raises(ValueError, match="sampling.strategy"):
        Sampling(**values)


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
