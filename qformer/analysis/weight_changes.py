"""Which tensors differ between two states of the same weights."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def changed_tensors(before: Mapping[str, Tensor], after: Mapping[str, Tensor], names: Iterable[str]) -> list[str]:
    """Names of the tensors that changed; tensors that one side lacks, or has in another shape, are not compared.

    Args:
        before: Earlier weights, converted to the dtype of `after` for the comparison.
        after: Later weights.
        names: Tensors to compare.
    """
    shared = sorted(name for name in set(names) & before.keys() & after.keys())
    return [
        name
        for name in shared
        if before[name].shape == after[name].shape and not _is_same(before[name].to(after[name].dtype), after[name])
    ]


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Equal everywhere, NaN to NaN."""
    return bool(torch.equal(one, other) or ((one == other) | (one.isnan() & other.isnan())).all())
