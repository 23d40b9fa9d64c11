"""Which of very many names came before, in 16 bytes a name."""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_KEY_BYTES = 16
"""At 10^9 names the chance that two share a key is below 10^-20."""


class NameSet:
    """A set of names, asked and filled a block at a time.

    Keys are kept in sorted runs that are merged when they are of like size, so that each key is moved only a
    logarithmic number of times.
    """

    def __init__(self) -> None:
        self._runs: list[NDArray[np.bytes_]] = []

    def add(self, names: Sequence[str]) -> NDArray[np.bool_]:
        """Add names.

        Returns:
            [len(names)] whether each is new: neither added before nor earlier in `names`.
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
            # A stable sort finds the two sorted halves and only merges them.
            self._runs.append(np.sort(np.concatenate([before, last]), kind="stable"))
        return is_new


def _key(name: str) -> bytes:
    # numpy's byte strings lose trailing zeros: a last byte that is never zero keeps keys apart.
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=_KEY_BYTES - 1).digest() + b"\x01"
