"""Multi-head attention of the Q-Former: keys and values are made apart from queries, so that both can be reused.

Dimensions: B batch, S attending rows, N attended rows, D width, H heads, K head width.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class KeyValue(NamedTuple):
    """Keys and values of one attention layer, each [B, H, N, K]."""

    keys_BHNK: Tensor
    values_BHNK: Tensor


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

    def forward(self, hidden_BSD: Tensor, key_value: KeyValue, mask: Tensor | None = None) -> Tensor:
        """Attend from `hidden_BSD` to `key_value`.

        Args:
            hidden_BSD: Attending rows; also the residual.
            key_value: What is attended to.
            mask: Boolean, True where attention is allowed, broadcastable to [B, H, S, N]; None allows all.

        Returns:
            Normalised hidden states [B, S, D].
        """
        attended_BHSK = F.scaled_dot_product_attention(
            self._heads(self.query(hidden_BSD)),
            key_value.keys_BHNK,
            key_value.values_BHNK,
            attn_mask=mask,
            dropout_p=self.dropout.p if self.training else 0.0,
        )
        attended_BSD = attended_BHSK.transpose(1, 2).flatten(2)
        return self.norm(self.dropout(self.output(attended_BSD)) + hidden_BSD)

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

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        """Apply the block: [B, S, D] to [B, S, D]."""
        return self.norm(self.dropout(self.down(F.gelu(self.up(hidden_BSD)))) + hidden_BSD)


def concatenate(first: KeyValue, second: KeyValue) -> KeyValue:
    """Join two key-value sets along the attended rows."""
    return KeyValue(
        torch.cat([first.keys_BHNK, second.keys_BHNK], dim=2),
        torch.cat([first.values_BHNK, second.values_BHNK], dim=2),
    )
