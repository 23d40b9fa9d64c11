"""Pseudo-random permutations of [0, n), computed for single indexes, whatever n is.

A Feistel network on a rectangle of about sqrt(n) x sqrt(n) cells permutes a domain slightly larger than [0, n). An
index that leaves [0, n) is permuted again until it returns ("cycle walking"), which keeps the map one to one. Memory
and time depend on the number of requested indexes alone. Not for cryptography.
"""

import math

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8
_GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)
_HALF_BITS = np.uint64(32)
MAX_SIZE = 2**62
"""Largest n for which the sides of the rectangle fit into 32 bits."""


def permute(indexes: NDArray[np.int64], size: int, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Images of indexes under permutations of range(size).

    This does not use numpy's Generator, whose streams may change between versions: a resumed run must see the same
    order.

    Args:
        indexes: Indexes in [0, size), in any shape.
        size: Size n of the domain.
        keys: Keys of the permutations: one for all indexes, or a shape that broadcasts to theirs.

    Returns:
        Permuted indexes in the same shape. For one key the map is a bijection of range(size).

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
    """Derive one key for each counter (such as an epoch) from one 64-bit key."""
    with np.errstate(over="ignore"):  # numpy warns for a single counter, not for many
        return _mix(np.uint64(key) + (counters.astype(np.uint64) + np.uint64(1)) * _GOLDEN_RATIO)


def _network(
    values: NDArray[np.uint64], num_rows: np.uint64, num_columns: np.uint64, keys: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """Permute [0, num_rows * num_columns) once by the Feistel network."""
    row, column = np.divmod(values, num_columns)
    for network_round in range(0, _ROUNDS, 2):
        row = _shift(row, column, num_rows, keys, network_round)
        column = _shift(column, row, num_columns, keys, network_round + 1)
    return row * num_columns + column


def _shift(
    values: NDArray[np.uint64], by: NDArray[np.uint64], size: np.uint64, keys: NDArray[np.uint64], network_round: int
) -> NDArray[np.uint64]:
    """Add a hash of the other coordinate, modulo `size`."""
    hashed = _mix((keys ^ _ROUND_KEYS[network_round]) + by * _GOLDEN_RATIO) >> _HALF_BITS
    values = values + ((hashed * size) >> _HALF_BITS)
    return np.where(values >= size, values - size, values)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser; arithmetic is modulo 2^64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


_ROUND_KEYS = derive_keys(0, np.arange(_ROUNDS))
"""Keys that make the rounds differ."""
