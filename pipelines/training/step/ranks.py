"""What ranks tell each other beside tensors."""

from typing import TypeVar

from torch import distributed

from qformer.distributed import world_size

ItemT = TypeVar("ItemT")


def of_all_ranks(items: list[ItemT]) -> list[ItemT]:
    """The items of all ranks in rank order; every rank must call."""
    if world_size() == 1:
        return items
    parts: list[list[ItemT]] = [[] for _ in range(world_size())]
    distributed.all_gather_object(parts, items)
    return [item for part in parts for item in part]
