"""Passes of a decoder-only model over slots: rows of any lengths, each at its own position.

Every pass gives the model embeddings or ids, positions, an additive mask, and a `CacheWindow` in place of a cache. That
is all that Hugging Face's decoder-only models need.

Dimensions: B rows of the pass, S new tokens, T attended tokens, L width, V vocabulary.
"""

import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qformer.errors import UserError
from qformer.generation.passes.graphs import DecodeGraphs
from qformer.generation.passes.slots import CacheWindow, Slots
from qformer.generation.requests.active_request import ActiveRequest
from qformer.generation.requests.request import TooLongError
from qformer.language import LanguageModel

_ATTENTIONS = ("sdpa", "eager")
"""Attention implementations that take an additive mask."""


class DecoderPasses:
    """Prefill and decode passes of one decoder-only model.

    Args:
        language: Decoder-only model.

    Raises:
        UserError: If the model's state is not keys and values of all positions, or it takes no positions.
    """

    is_chunked = True
    """True: a prompt may be read in several passes."""

    def __init__(self, language: LanguageModel) -> None:
        model: Any = language.model
        config, taken = model.config, inspect.signature(model.forward).parameters
        self._model, name = model, type(model).__name__
        if "position_ids" not in taken or "past_key_values" not in taken:
            raise UserError(f"{name} takes no position_ids; the engine cannot run rows of different lengths with it")
        kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        if kinds:
            raise UserError(f"{name} has layers of {sorted(kinds)}, which keep no keys and values of every position")
        if config._attn_implementation not in _ATTENTIONS:
            raise UserError(
                f"{name} runs {config._attn_implementation!r} attention; load it with one of {list(_ATTENTIONS)}"
            )
        self._picks_logits = "logits_to_keep" in taken
        self.slots = Slots()
        windows = [getattr(config, key, None) for key in ("max_position_embeddings", "window_size", "sliding_window")]
        if getattr(config, "use_sliding_window", True) is False:
            windows.pop()
        self.max_tokens = min((int(size) for size in windows if size), default=None)
        """Largest number of positions of a request; None: the model has no limit."""
        self._weight: Tensor = model.get_input_embeddings().weight
        device = self._weight.device
        self._graphs = DecodeGraphs(self.slots, device) if device.type == "cuda" else None

    def tokens_needed(self, num_inputs: int, max_new_tokens: int) -> int:
        """Number of positions of a request at its longest; its last token is never read.

        Raises:
            TooLongError: If the model has fewer positions.
        """
        needed = num_inputs + max_new_tokens - 1
        if self.max_tokens is not None and needed > self.max_tokens:
            raise TooLongError(
                f"{num_inputs} input rows and max_new_tokens={max_new_tokens} need {needed} positions, the language "
                f"model has {self.max_tokens}; shorten the prompt, use fewer images or frames, or lower max_new_tokens",
                self.max_tokens,
            )
        return needed

    def prefill(self, first: int, rows: Sequence[ActiveRequest]) -> Tensor:
        """Read `num_reading` more input rows of some prompts.

        Args:
            first: Slot of `rows[0]`; the others follow.
            rows: Requests of any lengths; each continues at the end of its slot.

        Returns:
            Logits [B, V] after the last of them.
        """
        parts = [cast(Tensor, row.inputs_SL)[row.num_cached :][: row.num_reading] for row in rows]
        inputs_BSL = pad_sequence([part.to(self._weight) for part in parts], batch_first=True)
        packed_3B1 = torch.tensor(
            [
                [[row.num_cached] for row in rows],
                [[row.num_reading] for row in rows],
                [[place * self.slots.capacity] for place in range(first, first + len(rows))],
            ],
            device=self._weight.device,
        )
        start_B1, count_B1, origin_B1 = packed_3B1
        step_S = torch.arange(inputs_BSL.shape[1], device=start_B1.device)
        position_BS = start_B1 + step_S
        target, source = (origin_B1 + position_BS).flatten(), None
        if len({row.num_reading for row in rows}) > 1:
            # Padding is not written.
            source = (step_S < count_B1).flatten().nonzero()[:, 0]
            target = target[source]
        length = max(row.num_cached + row.num_reading for row in rows)
        window = CacheWindow(self.slots, slice(first, first + len(rows)), slice(length), target, source)
        # The positions of padding must not exceed the model's last position.
        position_BS = position_BS.minimum(start_B1 + count_B1 - 1)
        return self._forward(window, position_BS, count_B1[:, 0] - 1, inputs_embeds=inputs_BSL)

    def decode(self, first: int, rows: Sequence[ActiveRequest]) -> Tensor:
        """Read the last token of each row.

        Args:
            first: Slot of `rows[0]`; the others follow.
            rows: Requests with fully read prompts.

        Returns:
            Logits [B, V].
        """
        capacity, lengths = self.slots.capacity, [row.num_cached for row in rows]
        targets = [(first + place) * capacity + length for place, length in enumerate(lengths)]
        packed_3B, columns = torch.tensor([[row.ids[-1] for row in rows], lengths, targets]), max(lengths) + 1
        if self._graphs is not None and first == 0:
            logits_BV = self._graphs.run(self._read, packed_3B, columns)
            if logits_BV is not None:
                return logits_BV
        return self._read(packed_3B.to(self._weight.device), slice(first, first + len(rows)), columns)

    def _read(self, packed_3B: Tensor, rows: slice, columns: int) -> Tensor:
        """See `DecodePass`."""
        ids_B, position_B, target_B = packed_3B
        window = CacheWindow(self.slots, rows, slice(columns), target_B)
        return self._forward(window, position_B[:, None], None, input_ids=ids_B[:, None])

    def _forward(self, window: CacheWindow, position_BS: Tensor, last_B: Tensor | None, **inputs: Tensor) -> Tensor:
        """Logits [B, V] of each row's new token `last_B`; None: each row has one new token."""
        is_hidden_BST = torch.arange(window.columns.stop, device=position_BS.device) > position_BS[:, :, None]
        mask_BST = torch.zeros(is_hidden_BST.shape, dtype=self._weight.dtype, device=position_BS.device)
        mask_BST.masked_fill_(is_hidden_BST, torch.finfo(mask_BST.dtype).min)
        options: dict[str, Any] = {}
        if last_B is not None and self._picks_logits:
            # The logits of other prompt tokens are not needed.
            options["logits_to_keep"], last_B = last_B.unique(return_inverse=True)
        logits_BSV: Tensor = self._model(
            **inputs,
            attention_mask=mask_BST[:, None],
            position_ids=position_BS,
            past_key_values=window,
            use_cache=True,
            return_dict=True,
            **options,
        ).logits
        return logits_BSV[:, -1] if last_B is None else logits_BSV[torch.arange(len(last_B)), last_B]
