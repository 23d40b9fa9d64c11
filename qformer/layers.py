"""The Q-Former's layers: one self-attention for queries and text, cross-attention for queries, a feed-forward each.

Dimensions: N packed rows, M packed text rows, S rows of an item when padded, D hidden width.
Reference: BLIP-2 (arXiv:2301.12597), section 3.1; LAVIS `Qformer.py` (BertLayer).
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qformer.attention import Attention, FeedForward, KeyValue, Part, Rows
from qformer.config import QFormerConfig


class SelectedRows(NamedTuple):
    """The rows that are read of the last layer: it computes no others."""

    chosen: Tensor
    """Indexes into the packed rows."""
    rows: Rows


class QFormerLayer(nn.Module):
    """Self-attention (shared), cross-attention (queries only), and one feed-forward each for queries and text."""

    def __init__(self, config: QFormerConfig, *, has_cross_attention: bool) -> None:
        super().__init__()
        width, heads, inner = config.hidden_size, config.num_heads, config.intermediate_size
        common = {"dropout": config.dropout, "eps": config.layer_norm_eps}
        self.attention = Attention(width, heads, key_width=width, **common)
        self.cross_attention = (
            Attention(width, heads, key_width=config.encoder_width, **common) if has_cross_attention else None
        )
        self.query_ffn: nn.Module = FeedForward(width, inner, **common)
        self.text_ffn = FeedForward(width, inner, **common) if config.has_text_branch else None

    def forward(
        self,
        hidden_ND: Tensor,
        rows: Rows,
        mask: Tensor | None,
        image: Sequence[Part],
        past: KeyValue | None,
        selected: SelectedRows | None,
    ) -> tuple[Tensor, KeyValue]:
        """Run one layer over queries and text (either may be absent).

        Args:
            hidden_ND: All query rows, then all text rows.
            rows: Their layout.
            mask: Self-attention mask, True where allowed.
            image: What the query rows cross-attend to; empty where the layer has no cross-attention.
            past: Cached query keys and values that the rows also see (ITG).
            selected: Rows to compute; None computes all. All are attended to in any case.

        Returns:
            Hidden states [N, D] and this layer's self-attention keys and values (without `past`).
        """
        own = self.attention.packed_key_value(hidden_ND, rows)
        if selected is not None:
            hidden_ND, rows = hidden_ND.index_select(0, selected.chosen), selected.rows
        context = own if past is None else past.concatenate(own, dim=2)
        hidden_ND = self.attention(hidden_ND, [Part(rows, context, mask)])
        query_ND, text_MD = hidden_ND[: rows.num_query_rows], hidden_ND[rows.num_query_rows :]
        outputs = []
        if rows.num_queries:
            if self.cross_attention is not None and image:
                query_ND = self.cross_attention(query_ND, image)
            outputs.append(self.query_ffn(query_ND))
        if rows.length > rows.num_queries:
            assert self.text_ffn is not None, "text rows in a Q-Former without text branch"
            outputs.append(self.text_ffn(text_MD))
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)), own


class QFormerLayers(nn.ModuleList):
    """All layers in turn: the part that does the work.

    `layers.compile(fullgraph=True)` compiles each of them without graph breaks: what depends on the data (packing the
    text, drawing and fetching negatives) happens outside and comes in as tensors. Layers share what is compiled, which
    takes far less time than all of them in one graph would.
    """

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__(
            QFormerLayer(config, has_cross_attention=config.has_cross_attention(i)) for i in range(config.num_layers)
        )
        self.is_checkpointed = config.activation_checkpointing

    def __iter__(self) -> Iterator[QFormerLayer]:
        return cast(Iterator[QFormerLayer], super().__iter__())

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile layer by layer; arguments of `nn.Module.compile`."""
        # With and without cross-attention, each pass, images and clips, with and without gradient: all of one code.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
        for layer in self:
            layer.compile(*args, **kwargs)

    def forward(
        self,
        hidden_ND: Tensor,
        rows: Rows,
        mask: Tensor | None = None,
        image: Sequence[Sequence[Part]] | None = None,
        past: Sequence[KeyValue] | None = None,
        selected: SelectedRows | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """Run all layers; `image` and `past` hold an entry a layer, `selected` concerns the last."""
        cache = []
        for i, layer in enumerate(self):
            parts, cached = () if image is None else image[i], None if past is None else past[i]
            arguments = (rows, mask, parts, cached, selected if i == len(self) - 1 else None)
            if self.is_checkpointed and torch.is_grad_enabled():
                hidden_ND, own = checkpoint(layer, hidden_ND, *arguments, use_reentrant=False)
            else:
                hidden_ND, own = layer(hidden_ND, *arguments)
            cache.append(own)
        return hidden_ND, cache
