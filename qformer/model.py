"""The Q-Former: learned queries that cross-attend to image tokens, and a text branch that shares self-attention.

Dimensions: B batch, P image tokens, V encoder width, Q queries, T text tokens, D hidden width, H heads, K head width.
Reference: BLIP-2 (arXiv:2301.12597), section 3.1; LAVIS `Qformer.py`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qformer.attention import Attention, FeedForward, KeyValue, concatenate
from qformer.config import QFormerConfig
from qformer.masks import causal_mask_after_queries, joint_mask, padding_mask


@dataclass(frozen=True, slots=True)
class QueryOutput:
    """One image pass of the queries."""

    hidden_BQD: Tensor
    cache: list[KeyValue]
    """Self-attention keys and values of the queries, one per layer, for ITG."""


class QFormerLayer(nn.Module):
    """Self-attention (shared), cross-attention (queries only), and one feed-forward each for queries and text."""

    def __init__(self, config: QFormerConfig, *, has_cross_attention: bool) -> None:
        super().__init__()
        width, heads, dropout, eps = (
            config.hidden_size,
            config.num_heads,
            config.dropout,
            config.layer_norm_eps,
        )
        self.attention = Attention(width, heads, key_width=width, dropout=dropout, eps=eps)
        self.cross_attention = (
            Attention(width, heads, key_width=config.encoder_width, dropout=dropout, eps=eps)
            if has_cross_attention
            else None
        )
        self.query_ffn = FeedForward(width, config.intermediate_size, dropout=dropout, eps=eps)
        self.text_ffn = (
            FeedForward(width, config.intermediate_size, dropout=dropout, eps=eps) if config.has_text_branch else None
        )

    def forward(
        self,
        hidden_BSD: Tensor,
        *,
        num_queries: int,
        image: KeyValue | None,
        mask: Tensor | None,
        past: KeyValue | None = None,
    ) -> tuple[Tensor, KeyValue]:
        """Run one layer over [queries; text] (either may be absent).

        Args:
            hidden_BSD: `num_queries` query rows, then text rows.
            num_queries: Query rows at the front of `hidden_BSD`; 0 for text alone.
            image: This layer's cross-attention keys and values; None where the layer has no cross-attention.
            mask: Self-attention mask, True where allowed.
            past: Cached query keys and values that the rows also see (ITG).

        Returns:
            Hidden states [B, S, D] and this layer's self-attention keys and values (without `past`).
        """
        own = self.attention.key_value(hidden_BSD)
        hidden_BSD = self.attention(hidden_BSD, own if past is None else concatenate(past, own), mask)
        query_BQD, text_BTD = hidden_BSD[:, :num_queries], hidden_BSD[:, num_queries:]
        outputs = []
        if num_queries:
            if self.cross_attention is not None and image is not None:
                query_BQD = self.cross_attention(query_BQD, image)
            outputs.append(self.query_ffn(query_BQD))
        if text_BTD.shape[1]:
            assert self.text_ffn is not None, "text rows in a Q-Former without text branch"
            outputs.append(self.text_ffn(text_BTD))
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), own


class _Layers(nn.ModuleList):
    """A module list that knows what it holds."""

    def __iter__(self) -> Iterator[QFormerLayer]:
        return cast(Iterator[QFormerLayer], super().__iter__())


class QFormer(nn.Module):
    """BLIP-2's Q-Former with the paths its objectives need, each computed once and shared.

    `config.vocab_size == 0` leaves out the text branch, as stage 2 does.
    """

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_queries, config.hidden_size))
        self.embedding_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = _Layers(
            QFormerLayer(config, has_cross_attention=config.has_cross_attention(i)) for i in range(config.num_layers)
        )
        if config.has_text_branch:
            self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=0)
            self.position_embeddings = nn.Embedding(config.max_positions, config.hidden_size)
        if config.has_text_branch and config.has_lm_head:
            self.lm_dense = nn.Linear(config.hidden_size, config.hidden_size)
            self.lm_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            self.lm_bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.apply(_initialise)
        nn.init.normal_(self.query_tokens, std=0.02)
        for layer in self.layers:
            if layer.text_ffn is not None:
                # The paper starts both feed-forwards from the same BERT weights.
                layer.query_ffn.load_state_dict(layer.text_ffn.state_dict())

    def image_key_values(self, image_BPV: Tensor) -> list[KeyValue | None]:
        """Cross-attention keys and values of an image for every layer; they depend on the image alone.

        Raises:
            ValueError: If the image tokens are not of the configured encoder width.
        """
        if image_BPV.shape[-1] != self.config.encoder_width:
            raise ValueError(
                f"image tokens are {image_BPV.shape[-1]} wide but the Q-Former was built for "
                f"encoder_width={self.config.encoder_width}; use the encoder it was trained with"
            )
        return [
            layer.cross_attention.key_value(image_BPV) if layer.cross_attention is not None else None
            for layer in self.layers
        ]

    def forward_queries(self, image: Sequence[KeyValue | None]) -> QueryOutput:
        """Queries alone over an image (ITC, and the cache of ITG)."""
        batch = next(kv.keys_BHNK.shape[0] for kv in image if kv is not None)
        hidden_BSD = self.dropout(self.embedding_norm(self.query_tokens.expand(batch, -1, -1)))
        cache = []
        for layer, image_kv in zip(self.layers, image, strict=True):
            hidden_BSD, own = layer(hidden_BSD, num_queries=self.config.num_queries, image=image_kv, mask=None)
            cache.append(own)
        return QueryOutput(hidden_BSD, cache)

    def forward_text(self, input_ids_BT: Tensor, is_text_BT: Tensor) -> Tensor:
        """Text alone, bi-directional (ITC's text side): [B, T, D]."""
        hidden_BSD = self.dropout(self.embedding_norm(self._embed_text(input_ids_BT)))
        mask = padding_mask(is_text_BT)
        for layer in self.layers:
            hidden_BSD, _ = layer(hidden_BSD, num_queries=0, image=None, mask=mask)
        return hidden_BSD

    def forward_joint(self, image: Sequence[KeyValue | None], input_ids_BT: Tensor, is_text_BT: Tensor) -> Tensor:
        """Queries and text together, bi-directional (ITM): [B, Q+T, D], queries first."""
        num_queries = self.config.num_queries
        queries_BQD = self.query_tokens.expand(input_ids_BT.shape[0], -1, -1)
        hidden_BSD = torch.cat([queries_BQD, self._embed_text(input_ids_BT)], dim=1)
        hidden_BSD = self.dropout(self.embedding_norm(hidden_BSD))
        mask = joint_mask(is_text_BT, num_queries)
        for layer, image_kv in zip(self.layers, image, strict=True):
            hidden_BSD, _ = layer(hidden_BSD, num_queries=num_queries, image=image_kv, mask=mask)
        return hidden_BSD

    def decode_text(self, input_ids_BT: Tensor, is_text_BT: Tensor, cache: Sequence[KeyValue]) -> Tensor:
        """Causal text over the queries' cached keys and values (ITG): next-token logits [B, T, vocab].

        Cross-attention does not run here: text reaches the image only through the queries.
        """
        hidden_BSD = self.dropout(self.embedding_norm(self._embed_text(input_ids_BT)))
        mask = causal_mask_after_queries(is_text_BT, cache[0].keys_BHNK.shape[2])
        for layer, past in zip(self.layers, cache, strict=True):
            hidden_BSD, _ = layer(hidden_BSD, num_queries=0, image=None, mask=mask, past=past)
        hidden_BSD = self.lm_norm(F.gelu(self.lm_dense(hidden_BSD)))
        return F.linear(hidden_BSD, self.word_embeddings.weight, self.lm_bias)

    def _embed_text(self, input_ids_BT: Tensor) -> Tensor:
        length = input_ids_BT.shape[1]
        if length > self.config.max_positions:
            raise ValueError(f"text of {length} tokens exceeds max_positions={self.config.max_positions}")
        return self.word_embeddings(input_ids_BT) + self.position_embeddings.weight[:length]


def _initialise(module: nn.Module) -> None:
    """BERT's initialisation: normal(0, 0.02) weights, zero biases, zero padding row."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        elif module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()
