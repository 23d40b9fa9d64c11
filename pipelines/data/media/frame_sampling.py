"""Which frames of a clip are decoded."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Strategy = Literal["uniform", "random_segment", "head_tail", "fps", "key_frames", "times"]

_ROUNDING_S = 1e-6
"""Tolerance: a time on a frame's start selects that frame, also when a division rounded it down."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """Strategy for the choice of a clip's frames. Random strategies need a seed, which training has."""

    strategy: Strategy = "uniform"
    """uniform: centres of equal segments. random_segment: a random time in each (TSN); without seed uniform.
    head_tail: half of the frames at random times in the clip's first half, the others in the second (Video-LLaMA);
    without seed the centres of equal segments of each. fps: uniform, at most `fps` a second. key_frames: the codec's
    key frames, which are cheapest to decode. times: at `times_s`."""
    fps: float | None = None
    """Frame rate of the strategy "fps"."""
    times_s: tuple[float, ...] = ()
    """Times of the strategy "times": ascending seconds after the clip's start."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ValueError: If strategy and values contradict each other.
        """
        if (self.strategy == "fps") != (self.fps is not None) or (self.fps is not None and not self.fps > 0):
            raise ValueError(f"sampling.strategy={self.strategy!r} with fps={self.fps}; give fps > 0 with 'fps' alone")
        is_ascending = all(a < b for a, b in zip(self.times_s, self.times_s[1:], strict=False))
        if (self.strategy == "times") != bool(self.times_s) or not is_ascending or min(self.times_s, default=0) < 0:
            raise ValueError(
                f"sampling.strategy={self.strategy!r} with times_s={list(self.times_s)}; "
                "give ascending times from 0 on with 'times' alone"
            )

    @property
    def is_random(self) -> bool:
        """Whether a seed changes the choice."""
        return self.strategy in ("random_segment", "head_tail")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, the inverse of `from_dict`."""
        return {"strategy": self.strategy, "fps": self.fps, "times_s": list(self.times_s)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Sampling":
        """Rebuild from `dataclasses.asdict` output or its JSON; absent values have their defaults."""
        return cls(**{**values, "times_s": tuple(values.get("times_s", ()))})


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipFrames:
    """The frames of a file, and the part of it that is the clip."""

    starts_s: NDArray[np.float64]
    """Ascending presentation times of all frames of the file, the first at 0; gaps may vary."""
    is_key: NDArray[np.bool_]
    """[frames] True at key frames."""
    start_s: float
    """Start of the clip."""
    end_s: float
    """Exclusive end of the clip."""


def choose_frames(
    sampling: Sampling, frames: ClipFrames, count: int, seed: int | None
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Choose `count` frames.

    Where the clip has fewer, frames are repeated; a repeated frame is valid once.

    Args:
        sampling: Strategy.
        frames: Frames of the file.
        count: Number of frames to choose.
        seed: Seed that decides all random choices; None makes none.

    Returns:
        Ascending frame indexes [count], and which of them are valid.

    Raises:
        ValueError: If the clip is empty, or none of the requested times lies in it.
    """
    times_s = _times(sampling, frames, count, seed)
    indexes = frames_at(times_s, frames.starts_s)
    indexes = np.concatenate([indexes, np.repeat(indexes[-1:], count - len(indexes))])
    is_valid = np.concatenate([[True], np.diff(indexes) > 0])
    return indexes, is_valid


def _times(sampling: Sampling, frames: ClipFrames, count: int, seed: int | None) -> NDArray[np.float64]:
    start_s, end_s = frames.start_s, frames.end_s
    rng = None if seed is None else random.Random(f"{seed}/frames")
    match sampling.strategy:
        case "uniform":
            return uniform_times(start_s, end_s, count)
        case "random_segment":
            return segment_times(start_s, end_s, count, rng)
        case "head_tail":
            return head_tail_times(start_s, end_s, count, rng)
        case "fps":
            return capped_times(start_s, end_s, count, sampling.fps or 1.0)
        case "key_frames":
            return key_times(frames, count)
        case "times":
            return explicit_times(start_s, end_s, count, sampling.times_s)


def uniform_times(start_s: float, end_s: float, count: int) -> NDArray[np.float64]:
    """Centres of `count` equal segments of [start_s, end_s].

    Centres, not edges: the first and last frames of clips are often black or cut.

    Raises:
        ValueError: If the range is empty or negative, or `count` is not positive.
    """
    if count < 1 or not 0 <= start_s < end_s:
        raise ValueError(f"cannot take {count} times from {start_s} s to {end_s} s")
    centres = np.arange(count, dtype=np.float64) + 0.5
    return np.asarray(start_s + centres * ((end_s - start_s) / count), dtype=np.float64)


def segment_times(start_s: float, end_s: float, count: int, rng: random.Random | None) -> NDArray[np.float64]:
    """A random time in each of `count` equal segments (TSN, arXiv:1608.00859); their centres without `rng`."""
    centres_s = uniform_times(start_s, end_s, count)
    if rng is None:
        return centres_s
    offsets = np.array([rng.random() - 0.5 for _ in range(count)])
    return np.asarray(centres_s + offsets * ((end_s - start_s) / count), dtype=np.float64)


def head_tail_times(start_s: float, end_s: float, count: int, rng: random.Random | None) -> NDArray[np.float64]:
    """Half of the times from the first half of the clip, the rest from the second; an odd one belongs to the first."""
    middle_s, num_head = (start_s + end_s) / 2, (count + 1) // 2
    parts = [(start_s, middle_s, num_head), (middle_s, end_s, count - num_head)]
    if rng is None:
        return np.concatenate([uniform_times(*part) for part in parts if part[2]])
    return np.array([time for low, high, n in parts for time in sorted(rng.uniform(low, high) for _ in range(n))])


def capped_times(start_s: float, end_s: float, count: int, fps: float) -> NDArray[np.float64]:
    """Uniform times, at most `count` and at most `fps` a second; at least one."""
    wanted = int((end_s - start_s) * fps + _ROUNDING_S)
    return uniform_times(start_s, end_s, max(1, min(count, wanted)))


def key_times(frames: ClipFrames, count: int) -> NDArray[np.float64]:
    """Starts of the clip's key frames, evenly thinned to `count`; the clip's middle where it has none."""
    is_inside = (frames.starts_s >= frames.start_s - _ROUNDING_S) & (frames.starts_s < frames.end_s - _ROUNDING_S)
    keys_s = frames.starts_s[frames.is_key & is_inside]
    if len(keys_s) == 0:
        return uniform_times(frames.start_s, frames.end_s, 1)
    if len(keys_s) <= count:
        return keys_s
    return keys_s[((np.arange(count) + 0.5) * len(keys_s) / count).astype(np.int64)]


def explicit_times(start_s: float, end_s: float, count: int, times_s: tuple[float, ...]) -> NDArray[np.float64]:
    """The first `count` of the given times after `start_s` that lie in the clip.

    Raises:
        ValueError: If none does.
    """
    inside = [start_s + time for time in times_s if start_s + time < end_s][:count]
    if not inside:
        raise ValueError(f"none of the times {list(times_s)} lies in a clip from {start_s:g} s to {end_s:g} s")
    return np.array(inside, dtype=np.float64)


def frames_at(times_s: NDArray[np.float64], frame_starts_s: NDArray[np.float64]) -> NDArray[np.int64]:
    """Index of the frame that a player shows at each time.

    Args:
        times_s: Requested times.
        frame_starts_s: Ascending presentation times; gaps may vary (variable frame rate).

    Returns:
        For each time the last frame that has started, or the first frame.
    """
    shown = np.searchsorted(frame_starts_s, times_s + _ROUNDING_S, side="right") - 1
    return np.maximum(shown, 0).astype(np.int64)
