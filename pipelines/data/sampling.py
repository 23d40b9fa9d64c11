"""Which moments of a clip are looked at."""

import numpy as np
from numpy.typing import NDArray

_ROUNDING_S = 1e-6
"""A time that falls on a frame's start shows that frame, also when a division rounded it down."""


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


def frames_at(times_s: NDArray[np.float64], frame_starts_s: NDArray[np.float64]) -> NDArray[np.int64]:
    """Index of the frame that a player shows at each time.

    Args:
        times_s: Wanted moments.
        frame_starts_s: Ascending presentation times; gaps may vary (variable frame rate).

    Returns:
        For each time the last frame that has started; the first frame before any has.
    """
    shown = np.searchsorted(frame_starts_s, times_s + _ROUNDING_S, side="right") - 1
    return np.maximum(shown, 0).astype(np.int64)
