"""A set of very many names in 16 bytes a name."""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_KEY_BYTES = 16
"""Size of a key; for 10^9 names the probability of a collision is below 10^-20."""


class NameSet:
    """A set of names that is queried and extended in blocks.

    Keys are stored in sorted runs. Runs of similar size are merged, so that each key is moved a logarithmic number of
    times.
    """

    def __init__(self) -> None:
        self._runs: list[NDArray[np.bytes_]] = []

    def add(self, names: Sequence[str]) -> NDArray[np.bool_]:
        """Add names.

        Returns:
            [len(names)] True for new names: neither added before nor earlier in `names`.
        """
        keys = np.array([_key(name) for name in names], dtype=f"V{_KEY_BYTES}").view(f"S{_KEY_BYTES}")
        is_new = np.zeros(len(keys), dtype=np.bool_)
        is_new[np.unique(keys, return_index=True)[1]] = True
        for run in self._runs:
            place = np.minimum(np.searchsorted(run, keys), len(run) - 1)
            is_new &= run[place] != keys
        if is_new.any():
            self._runs.append(np.sort(keys[is_new]))
        while len(self._runs) > 1 and len(self._runs[-2]) <= 2 * len(self._runs[-1]):
            last, before = self._runs.pop(), self._runs.pop()
            # A stable sort detects the two sorted halves and only merges them.
            self._runs.append(np.sort(np.concatenate([before, last]), kind="stable"))
        return is_new


def _key(name: str) -> bytes:
    # numpy's byte strings lose trailing zeros, so the last byte of a key is never zero.
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=_KEY_BYTES - 1).digest() + b"\x01"
