"""Keys and values of running requests: one block of memory a layer, one row a request, written in place.

Tokens come before heads, as in the projections' outputs, so that writing is one copy without a transposition.

Dimensions: R rows, T tokens of a row, B rows of a pass, S new tokens of a pass, H heads, K head width.
"""

from typing import Protocol

import torch
from torch import Tensor


class SlotMemory(Protocol):
    """Interface of slots for a batch: those of a decoder, or of an encoder-decoder."""

    @property
    def num_rows(self) -> int:
        """Number of requests that the memory holds."""

    @property
    def capacity(self) -> int:
        """Number of tokens of each request."""

    @property
    def bytes_per_token(self) -> int:
        """Bytes of a token in all layers; 0 before the first pass."""

    def resize(self, num_rows: int, capacity: int, num_used: int) -> None:
        """Allocate new memory and copy the first `num_used` rows into it.

        If memory runs out, some layers have the new size and others not; the caller must then `reset`.
        """

    def reset(self) -> None:
        """Free all memory, as at the start."""

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of a row over another row's."""

    def clear(self, row: int) -> None:
        """Zero the values of a row: masked values are multiplied by zero, which leaves NaN."""


class Slots:
    """Memory for `num_rows` requests of `capacity` tokens, allocated in the first pass, which gives the shapes."""

    def __init__(self) -> None:
        self.version = 0
        """Changes with every new allocation."""
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
        """Move the tokens of all rows to the front by a number of columns, over the first ones."""
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
    """The part of the slots that one pass reads and writes, in place of a Hugging Face cache.

    Args:
        slots: Memory of keys and values.
        rows: Rows of the pass.
        columns: Tokens of each row that the pass attends to, including the new ones.
        target: Positions of the new tokens: row * capacity + column.
        source: Indexes of the new tokens among the pass's B * S tokens; None: all.
        num_past: Number of earlier tokens, for models that ask.
    """

    def __init__(
        self, slots: Slots, rows: slice, columns: slice, target: Tensor, source: Tensor | None = None, num_past: int = 0
    ) -> None:
        self._slots, self._rows, self.columns = slots, rows, columns
        self._target, self._source, self._num_past = target, source, num_past

    def update(
        self, keys_BHSK: Tensor, values_BHSK: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values, and return all that the pass attends to."""
        memory = self._slots.layer(layer_idx, keys_BHSK)
        for whole_RTHK, new_BHSK in zip(memory, (keys_BHSK, values_BHSK), strict=True):
            new = new_BHSK.transpose(1, 2).flatten(0, 1)
            whole_RTHK.flatten(0, 1).index_copy_(0, self._target, new if self._source is None else new[self._source])
        return self.read(layer_idx)

    def read(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Stored keys and values [B, H, T, K] of a layer."""
        keys_RTHK, values_RTHK = self._slots.layers[layer_idx]
        return (
            keys_RTHK[self._rows, self.columns].transpose(1, 2),
            values_RTHK[self._rows, self.columns].transpose(1, 2),
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens before those of the pass."""
        return self._num_past
