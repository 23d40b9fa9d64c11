"""Keys and values of running requests in one block of memory a layer, a row each, written in place.

Tokens come first and heads second, as the projections give them, so that writing is one copy and no transposition.

Dimensions: R rows, T tokens of a row, B rows of a pass, S new tokens of a pass, H heads, K head width.
"""

from typing import Protocol

import torch
from torch import Tensor


class SlotMemory(Protocol):
    """What a batch does with slots, be they of one kind or two."""

    @property
    def num_rows(self) -> int:
        """Requests that there is memory for."""

    @property
    def capacity(self) -> int:
        """Tokens of each."""

    @property
    def bytes_per_token(self) -> int:
        """Of all layers; 0 before the first pass."""

    def resize(self, num_rows: int, capacity: int, num_used: int) -> None:
        """Take other memory and copy the first `num_used` rows into it.

        Where there is not enough of it, some layers have their new size and others not: only `reset` helps then.
        """

    def reset(self) -> None:
        """Give all memory back, as at the beginning."""

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of a row over another row's."""

    def clear(self, row: int) -> None:
        """Forget the values of a row: what is masked is multiplied by zero, and NaN stays NaN then."""


class Slots:
    """Memory for `num_rows` requests of `capacity` tokens; it is taken when the model's first pass tells the shapes."""

    def __init__(self) -> None:
        self.version = 0
        """Changes whenever the memory is another."""
        self.reset()

    def reset(self) -> None:
        """See `SlotMemory`."""
        self.version += 1
        self.num_rows = self.capacity = 0
        self.layers: list[tuple[Tensor, Tensor]] = []
        """Keys and values [R, T, H, K]."""

    @property
    def bytes_per_token(self) -> int:
        """See `SlotMemory`."""
        return sum(t.shape[2:].numel() * t.element_size() for pair in self.layers for t in pair)

    def resize(self, num_rows: int, capacity: int, num_used: int) -> None:
        """See `SlotMemory`; layer by layer."""
        self.version += 1
        tokens = min(capacity, self.capacity)
        for layer, pair in enumerate(self.layers):
            fresh = tuple(t.new_zeros(num_rows, capacity, *t.shape[2:]) for t in pair)
            for old, new in zip(pair, fresh, strict=True):
                new[:num_used, :tokens] = old[:num_used, :tokens]
            self.layers[layer] = (fresh[0], fresh[1])
        self.num_rows, self.capacity = num_rows, capacity

    @torch.inference_mode()
    def move(self, source: int, target: int, length: int) -> None:
        """See `SlotMemory`."""
        for pair in self.layers:
            for tensor in pair:
                tensor[target, :length] = tensor[source, :length]

    def shift(self, columns: int) -> None:
        """Move the tokens of all rows so many columns to the front, over the first ones."""
        for pair in self.layers:
            for tensor in pair:
                tensor[:, : self.capacity - columns] = tensor[:, columns:].clone()

    @torch.inference_mode()
    def clear(self, row: int) -> None:
        """See `SlotMemory`."""
        for pair in self.layers:
            for tensor in pair:
                tensor[row].zero_()

    def layer(self, index: int, like_BHSK: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [R, T, H, K] of a layer."""
        while len(self.layers) <= index:
            heads, width = like_BHSK.shape[1], like_BHSK.shape[3]
            shape = (self.num_rows, self.capacity, heads, width)
            self.layers.append((like_BHSK.new_zeros(shape), like_BHSK.new_zeros(shape)))
        return self.layers[index]


class CacheWindow:
    """What one pass sees of the slots, in the place of a Hugging Face cache.

    Args:
        slots: The memory.
        rows: Of the pass.
        columns: Tokens of each row that the pass may look at, the new ones with them.
        target: Where the new tokens go: row * capacity + column.
        source: Which of the pass's B * S tokens these are; None: all.
        num_seen: Tokens before the new ones, for models that ask.
    """

    def __init__(
        self, slots: Slots, rows: slice, columns: slice, target: Tensor, source: Tensor | None = None, num_seen: int = 0
    ) -> None:
        self._slots, self._rows, self.columns = slots, rows, columns
        self._target, self._source, self._num_seen = target, source, num_seen

    def update(
        self, keys_BHSK: Tensor, values_BHSK: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values, and return all that the pass may look at."""
        memory = self._slots.layer(layer_idx, keys_BHSK)
        for whole_RTHK, new_BHSK in zip(memory, (keys_BHSK, values_BHSK), strict=True):
            new = new_BHSK.transpose(1, 2).flatten(0, 1)
            whole_RTHK.flatten(0, 1).index_copy_(0, self._target, new if self._source is None else new[self._source])
        return self.seen(layer_idx)

    def seen(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, T, K] of a layer that was written before."""
        keys_RTHK, values_RTHK = self._slots.layers[layer_idx]
        return (
            keys_RTHK[self._rows, self.columns].transpose(1, 2),
            values_RTHK[self._rows, self.columns].transpose(1, 2),
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before those of the pass."""
        return self._num_seen
