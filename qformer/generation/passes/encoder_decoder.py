"""Passes of an encoder-decoder of the T5 family over slots.

Its decoder has relative positions only. So all rows write the same column in a step, and a row that joins later starts
at a later column; when the last column is full, all rows move to the front. The encoder's keys and values are in
slots of their own.

Dimensions: B rows of the pass, S encoder tokens, T decoder tokens, L width, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qformer.generation.passes.slots import CacheWindow, Slots
from qformer.generation.requests.active_request import ActiveRequest
from qformer.generation.requests.token_selection import start_id
from qformer.language import LanguageModel


class EncoderDecoderSlots:
    """Memory of the encoder's (`cross`) and the decoder's (`own`) keys and values, of the same size."""

    def __init__(self) -> None:
        self.own, self.cross = Slots(), Slots()
        self.reset()

    def reset(self) -> None:
        """See `SlotMemory`."""
        self.own.reset()
        self.cross.reset()
        self.start: list[int] = []
        """Column of each row's first decoder token."""
        self.num_inputs: list[int] = []
        """Number of encoder tokens of each row."""
        self.next_column = 0
        """Next decoder column, the same for all rows."""

    @property
    def num_rows(self) -> int:
        """See `SlotMemory`."""
        return self.own.num_rows

    @property
    def capacity(self) -> int:
        """Capacity of a row in encoder tokens, and in decoder tokens."""
        return self.own.capacity

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one encoder and one decoder token."""
        return self.own.bytes_per_token + self.cross.bytes_per_token

    def resize(self, num_rows: int, capacity: int, num_used: int) -> None:
        """See `SlotMemory`."""
        self.to_front(num_used)
        for slots in (self.own, self.cross):
            slots.resize(num_rows, capacity, num_used)
        self.start = (self.start + [0] * num_rows)[:num_rows]
        self.num_inputs = (self.num_inputs + [1] * num_rows)[:num_rows]

    def to_front(self, num_used: int) -> None:
        """Move the decoder tokens of the first rows to the first columns."""
        columns = min(self.start[:num_used], default=self.next_column)
        if columns:
            self.own.shift(columns)
            self.start = [max(0, start - columns) for start in self.start]
            self.next_column -= columns

    def move(self, source: int, target: int, length: int) -> None:
        """See `SlotMemory`."""
        self.own.move(source, target, self.next_column)
        self.cross.move(source, target, self.num_inputs[source])
        self.start[target], self.num_inputs[target] = self.start[source], self.num_inputs[source]

    def clear(self, row: int) -> None:
        """See `SlotMemory`."""
        self.own.clear(row)
        self.cross.clear(row)


class EncoderDecoderPasses:
    """Prefill and decode passes of one encoder-decoder model.

    Args:
        language: Encoder-decoder model.
    """

    is_chunked = False
    """False: the encoder reads a prompt in one pass."""

    def __init__(self, language: LanguageModel) -> None:
        model: Any = language.model
        self._model, self._joint_cache = model, _joint_cache_type()
        self._weight: Tensor = model.get_input_embeddings().weight
        self._start_id = start_id(self._model)
        self.slots = EncoderDecoderSlots()

    def tokens_needed(self, num_inputs: int, max_new_tokens: int) -> int:
        """Columns of a request at its longest, in the larger of its two slots."""
        return max(num_inputs, max_new_tokens)

    def prefill(self, first: int, rows: Sequence[ActiveRequest]) -> Tensor:
        """Run the encoder over prompts, and the decoder over its start token; see `DecoderPasses.prefill`."""
        slots, device = self.slots, self._weight.device
        if first == 0:
            slots.next_column = 1
        for place, row in enumerate(rows, first):
            slots.start[place], slots.num_inputs[place] = slots.next_column - 1, row.num_inputs
        inputs_BSL = pad_sequence([cast(Tensor, row.inputs_SL).to(self._weight) for row in rows], batch_first=True)
        count_B1 = torch.tensor([[row.num_inputs] for row in rows], device=device)
        is_input_BS = torch.arange(inputs_BSL.shape[1], device=device) < count_B1
        hidden_BSL = self._model.get_encoder()(inputs_embeds=inputs_BSL, attention_mask=is_input_BS)[0]
        origin_B1 = torch.arange(first, first + len(rows), device=device)[:, None] * slots.capacity
        source = is_input_BS.flatten().nonzero()[:, 0]
        target = (origin_B1 + torch.arange(inputs_BSL.shape[1], device=device)).flatten()[source]
        columns = slice(inputs_BSL.shape[1])
        cross = CacheWindow(slots.cross, slice(first, first + len(rows)), columns, target, source)
        start_ids_B = torch.full((len(rows),), self._start_id, device=device)
        return self._decode(first, rows, start_ids_B, slots.next_column - 1, cross, hidden_BSL)

    def decode(self, first: int, rows: Sequence[ActiveRequest]) -> Tensor:
        """Read the last token of each row; see `DecoderPasses.decode`."""
        slots = self.slots
        column = slots.start[first] + rows[0].num_cached - rows[0].num_inputs + 1
        if column == slots.capacity:
            before = slots.next_column
            slots.to_front(first + len(rows))
            column -= before - slots.next_column
        slots.next_column = column + 1
        ids_B = torch.tensor([row.ids[-1] for row in rows], device=self._weight.device)
        longest = max(slots.num_inputs[first : first + len(rows)])
        cross = CacheWindow(slots.cross, slice(first, first + len(rows)), slice(longest), ids_B)
        return self._decode(first, rows, ids_B, column, cross, None)

    def _decode(
        self,
        first: int,
        rows: Sequence[ActiveRequest],
        ids_B: Tensor,
        column: int,
        cross: CacheWindow,
        hidden_BSL: Tensor | None,
    ) -> Tensor:
        """One decoder token of each row, at `column`: logits [B, V].

        Args:
            first: Slot of `rows[0]`.
            rows: Requests of the pass.
            ids_B: Tokens to read.
            column: Column of these tokens.
            cross: Keys and values of the encoder.
            hidden_BSL: Encoder output from which they are computed; None: they are stored already.
        """
        slots, device, end = self.slots, ids_B.device, first + len(rows)
        start_B1 = torch.tensor(slots.start[first:end], device=device)[:, None]
        begin = min(slots.start[first:end])
        target = torch.arange(first, end, device=device) * slots.capacity + column
        own = CacheWindow(slots.own, slice(first, end), slice(begin, column + 1), target, num_past=column - begin)
        count_B1 = torch.tensor(slots.num_inputs[first:end], device=device)[:, None]
        is_late_BS = torch.arange(cross.columns.stop, device=device) >= count_B1
        is_early_BT = torch.arange(begin, column + 1, device=device) < start_B1
        hidden = self._weight.new_empty(len(rows), 0, self._weight.shape[1]) if hidden_BSL is None else hidden_BSL
        logits_B1V: Tensor = self._model(
            encoder_outputs=(hidden,),
            attention_mask=self._additive(is_late_BS),
            decoder_input_ids=ids_B[:, None],
            decoder_attention_mask=self._additive(is_early_BT),
            past_key_values=self._joint_cache(own, cross, len(slots.own.layers) if hidden_BSL is None else 0),
            use_cache=True,
            return_dict=True,
        ).logits
        return logits_B1V[:, -1]

    def _additive(self, is_hidden_BT: Tensor) -> Tensor:
        mask_BT = torch.zeros(is_hidden_BT.shape, dtype=self._weight.dtype, device=is_hidden_BT.device)
        return mask_BT.masked_fill_(is_hidden_BT, torch.finfo(mask_BT.dtype).min)[:, None, None]


class _Layer:
    """A layer of a cache, with the attributes that the model reads."""

    def __init__(self, pair: tuple[Tensor, Tensor]) -> None:
        self.keys, self.values = pair


def _joint_cache_type() -> Any:
    """The class of a cache made of two windows; the model requires a subclass of its own cache class.

    Its arguments: the decoder's window, the encoder's, and the number of the encoder's layers that are stored already.
    """
    from transformers import EncoderDecoderCache

    class JointCache(EncoderDecoderCache):  # type: ignore[misc]
        def __init__(self, own: CacheWindow, cross: CacheWindow, stored_layers: int) -> None:
            # The parent's constructor is not called, because it allocates memory.
            cast(Any, cross).layers = [_Layer(cross.read(layer)) for layer in range(stored_layers)]
            self.self_attention_cache, self.cross_attention_cache = own, cross
            self.is_updated = dict.fromkeys(range(stored_layers), True)

    return JointCache
