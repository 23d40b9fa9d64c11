"""Multi-head attention of the Q-Former over packed rows; keys and values are made apart from queries, to be reused.

Hidden states lie packed: [N, D] without padding, so that linear layers never run on it. Attention alone needs the
padded form, and `Rows` goes from one to the other.

Dimensions: N packed rows, B items of a pass, S rows of an item when padded, A attended rows, D width, H heads,
K head width.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import qformer.torch_build.vector_math  # noqa: F401  # for its one call


class KeyValue(NamedTuple):
    """Keys and values of one attention layer, each [B, H, A, K]."""

    keys_BHNK: Tensor
    values_BHNK: Tensor

    def take(self, index_E: Tensor) -> "KeyValue":
        """Those of some items, one copy for each."""
        return KeyValue(self.keys_BHNK.index_select(0, index_E), self.values_BHNK.index_select(0, index_E))

    def concatenate(self, other: "KeyValue", dim: int) -> "KeyValue":
        """Both along the items (0) or the attended rows (2)."""
        keys = torch.cat([self.keys_BHNK, other.keys_BHNK], dim=dim)
        return KeyValue(keys, torch.cat([self.values_BHNK, other.values_BHNK], dim=dim))


class Rows(NamedTuple):
    """Where packed rows lie in the padded form: every item's queries first, then its text."""

    items: int
    num_queries: int
    """Queries of each item; packed rows begin with all items' queries."""
    length: int
    """S, queries and longest text."""
    place_N: Tensor | None = None
    """Place of each packed row in the padded form, flattened to B*S; None where both forms are equal."""

    @property
    def num_query_rows(self) -> int:
        """How many packed rows, from the first, are queries."""
        return self.items * self.num_queries

    @property
    def num_rows(self) -> int:
        """N."""
        return self.items * self.length if self.place_N is None else self.place_N.shape[0]

    def pad(self, packed_ND: Tensor) -> Tensor:
        """[N, D] to [B, S, D], zeros in between."""
        if self.place_N is not None:
            padded = packed_ND.new_zeros(self.items * self.length, packed_ND.shape[1])
            packed_ND = padded.index_copy(0, self.place_N, packed_ND)
        return packed_ND.view(self.items, self.length, packed_ND.shape[1])

    def pack(self, padded_BSD: Tensor) -> Tensor:
        """Inverse of `pad`."""
        flat = padded_BSD.flatten(0, 1)
        return flat if self.place_N is None else flat.index_select(0, self.place_N)


class Part(NamedTuple):
    """Consecutive packed rows and what they attend to."""

    rows: Rows
    key_value: KeyValue
    mask: Tensor | None = None
    """Boolean, True where attention is allowed, broadcastable to [B, H, S, A]; None allows all."""


class Attention(nn.Module):
    """Post-layer-norm attention block of BERT: attend, project, drop, add the residual, normalise.

    Reference: LAVIS `Qformer.py` (BertAttention); goldens' README, "Q-Former facts".
    """

    def __init__(self, hidden_size: int, num_heads: int, *, key_width: int, dropout: float, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(key_width, hidden_size)
        self.value = nn.Linear(key_width, hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def key_value(self, source_BND: Tensor) -> KeyValue:
        """Keys and values of `source_BND`, whose width is the layer's key width."""
        return KeyValue(self._heads(self.key(source_BND)), self._heads(self.value(source_BND)))

    def packed_key_value(self, source_ND: Tensor, rows: Rows) -> KeyValue:
        """Keys and values of packed rows, padded after the projection; padding is for the mask to hide."""
        return KeyValue(self._heads(rows.pad(self.key(source_ND))), self._heads(rows.pad(self.value(source_ND))))

    def forward(self, hidden_ND: Tensor, parts: Sequence[Part]) -> Tensor:
        """Attend from `hidden_ND`, part by part.

        Args:
            hidden_ND: Attending rows, packed; also the residual.
            parts: In order, together all rows of `hidden_ND`.

        Returns:
            Normalised hidden states [N, D].
        """
        queries = self.query(hidden_ND).split([part.rows.num_rows for part in parts])
        attended = [self._attend(part, query_ND) for part, query_ND in zip(parts, queries, strict=True)]
        attended_ND = attended[0] if len(attended) == 1 else torch.cat(attended)
        return self.norm(self.dropout(self.output(attended_ND)) + hidden_ND)

    def probabilities(self, hidden_ND: Tensor, part: Part) -> Tensor:
        """Attention probabilities without dropout, 0 behind the mask: [B, H, S, A]; to look at, not to train with."""
        query_BHSK = self._heads(part.rows.pad(self.query(hidden_ND)))
        scores_BHSA = query_BHSK @ part.key_value.keys_BHNK.transpose(2, 3) / query_BHSK.shape[-1] ** 0.5
        if part.mask is not None:
            scores_BHSA = scores_BHSA.masked_fill(~part.mask, float("-inf"))
        return scores_BHSA.float().softmax(dim=-1)

    def _attend(self, part: Part, query_ND: Tensor) -> Tensor:
        query_BHSK = self._heads(part.rows.pad(query_ND))
        dropout = self.dropout.p if self.training else 0.0
        arguments = (query_BHSK, *part.key_value, part.mask, dropout)
        if dropout and query_BHSK.device.type == "cpu":
            # No fused kernel of the CPU knows dropout: probabilities and their dropout would be kept for the backward.
            attended_BHSK = _recomputed(F.scaled_dot_product_attention, *arguments, is_random=True)
        else:
            attended_BHSK = F.scaled_dot_product_attention(*arguments)
        return part.rows.pack(attended_BHSK.transpose(1, 2).flatten(2))

    def _heads(self, projected_BND: Tensor) -> Tensor:
        batch, rows, width = projected_BND.shape
        return projected_BND.view(batch, rows, self.num_heads, width // self.num_heads).transpose(1, 2)


class FeedForward(nn.Module):
    """Post-layer-norm feed-forward block of BERT with the exact (erf) GELU."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, dropout: float, eps: float) -> None:
        super().__init__()
        self.up = nn.Linear(hidden_size, intermediate_size)
        self.down = nn.Linear(intermediate_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_ND: Tensor) -> Tensor:
        """Apply the block: [N, D] to [N, D]."""
        down_ND = _recomputed(self._activate, self.up(hidden_ND), is_random=False)
        return self.norm(self.dropout(down_ND) + hidden_ND)

    def _activate(self, up_NI: Tensor) -> Tensor:
        return self.down(F.gelu(up_NI))


def _recomputed(function: Callable[..., Tensor], *arguments: Any, is_random: bool) -> Tensor:
    """Call `function` and let the backward compute again what is cheap to compute but large to keep.

    The second computation stops where the last kept tensor is known: before the final matrix product. Where the
    function draws random numbers, it draws the same again.
    """
    if not torch.is_grad_enabled():
        return function(*arguments)
    return cast(Tensor, checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=is_random))
