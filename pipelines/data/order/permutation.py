"""Pseudo-random permutations of [0, n) that answer for one index at a time, whatever n is.

A Feistel network on a rectangle of about sqrt(n) x sqrt(n) cells permutes a domain a little larger than [0, n); an
index that leaves [0, n) is sent through again until it is back ("cycle walking"), which keeps the map one to one.
Memory and time depend on the number of indexes asked for alone. Not for secrets.
"""

import math

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_HALF_BITS = np.uint64(32)
MAX_SIZE = 2**62
"""Sides of the rectangle then fit 32 bits."""


def permute(indexes: NDArray[np.int64], size: int, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where permutations of range(size) send indexes.

    Not numpy's Generator: its streams may change between numpy versions, and a resumed run must see the same order.

    Args:
        indexes: Any shape; each in [0, size).
        size: n.
        keys: Which permutation; one for all indexes, or of a shape that broadcasts to theirs.

    Returns:
        Of the shape of `indexes`. For one key the map is a bijection of range(size).

    Raises:
        ValueError: If `size` is not in [1, MAX_SIZE], or an index lies outside.
    """
    if not 1 <= size <= MAX_SIZE:
        raise ValueError(f"size={size} must lie in [1, {MAX_SIZE}]")
    if indexes.size and not (indexes.min() >= 0 and indexes.max() < size):
        raise ValueError(f"indexes reach from {indexes.min()} to {indexes.max()}, outside [0, {size})")
    num_rows = math.isqrt(size - 1) + 1
    num_columns = -(-size // num_rows)
    keys = np.ascontiguousarray(np.broadcast_to(keys, indexes.shape)).ravel()
    values = indexes.astype(np.uint64).ravel()
    outside = np.arange(values.size)
    while outside.size:
        walked = _network(values[outside], np.uint64(num_rows), np.uint64(num_columns), keys[outside])
        values[outside] = walked
        outside = outside[walked >= np.uint64(size)]
    return values.astype(np.int64).reshape(indexes.shape)


def derive_keys(key: int, counters: NDArray[np.int64]) -> NDArray[np.uint64]:
    """One key for each counter (an epoch, say), all from one 64-bit key."""
    with np.errstate(over="ignore"):  # of a single counter numpy would warn, of many it does not
        return _mixed(np.uint64(key) + (counters.astype(np.uint64) + np.uint64(1)) * _GOLDEN)


def _network(
    values: NDArray[np.uint64], num_rows: np.uint64, num_columns: np.uint64, keys: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """Permute [0, num_rows * num_columns) once."""
    row, column = np.divmod(values, num_columns)
    for turn in range(0, _ROUNDS, 2):
        row = _shifted(row, column, num_rows, keys, turn)
        column = _shifted(column, row, num_columns, keys, turn + 1)
    return row * num_columns + column


def _shifted(
    moved: NDArray[np.uint64], by: NDArray[np.uint64], size: np.uint64, keys: NDArray[np.uint64], turn: int
) -> NDArray[np.uint64]:
    """Add a hash of the other coordinate, modulo `size`."""
    hashed = _mixed((keys ^ _TURNS[turn]) + by * _GOLDEN) >> _HALF_BITS
    moved = moved + ((hashed * size) >> _HALF_BITS)
    return np.where(moved >= size, moved - size, moved)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser; arithmetic is modulo 2^64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


_TURNS = derive_keys(0, np.arange(_ROUNDS))
"""Makes the rounds differ."""
