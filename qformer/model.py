"""The Q-Former: learned queries that cross-attend to image tokens, and a text branch that shares self-attention.

Dimensions: B batch, P image tokens, V encoder width, Q queries, T text tokens, D hidden width, H heads, K head width,
I images, R image-text pairs, N packed rows, M packed text tokens.
Rows are packed (see `attention`): padding is never computed, whatever length the text comes in.
Reference: BLIP-2 (arXiv:2301.12597), section 3.1; LAVIS `Qformer.py`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from qformer.attention import Attention, FeedForward, KeyValue, Part, Rows
from qformer.config import QFormerConfig
from qformer.masks import causal_mask_after_queries, joint_mask, padding_mask

INITIAL_STD = 0.02


@dataclass(frozen=True, slots=True)
class QueryOutput:
    """One image pass of the queries."""

    hidden_BQD: Tensor
    cache: list[KeyValue]
    """Self-attention keys and values of the queries, one per layer, for ITG."""


class PackedText(NamedTuple):
    """Real tokens alone, in order of item and position."""

    ids_M: Tensor
    item_M: Tensor
    position_M: Tensor
    is_text_BT: Tensor
    """Cut to the longest text."""


class Kept(NamedTuple):
    """The rows that are read of the last layer: it computes no others."""

    chosen: Tensor
    """Indexes into the packed rows."""
    rows: Rows


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
        hidden_ND: Tensor,
        rows: Rows,
        mask: Tensor | None,
        image: Sequence[Part],
        past: KeyValue | None,
        kept: Kept | None,
    ) -> tuple[Tensor, KeyValue]:
        """Run one layer over queries and text (either may be absent).

        Args:
            hidden_ND: All query rows, then all text rows.
            rows: Their layout.
            mask: Self-attention mask, True where allowed.
            image: What the query rows cross-attend to; empty where the layer has no cross-attention.
            past: Cached query keys and values that the rows also see (ITG).
            kept: Rows to compute; None computes all. All are attended to in any case.

        Returns:
            Hidden states [N, D] and this layer's self-attention keys and values (without `past`).
        """
        own = self.attention.packed_key_value(hidden_ND, rows)
        if kept is not None:
            hidden_ND, rows = hidden_ND.index_select(0, kept.chosen), kept.rows
        seen = own if past is None else past.concatenate(own, dim=2)
        hidden_ND = self.attention(hidden_ND, [Part(rows, seen, mask)])
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
    """All layers in turn: the part that does the work, and the region to compile.

    `layers.compile(fullgraph=True)` compiles it without graph breaks. What depends on the data (packing the text,
    drawing and fetching negatives) happens outside and comes in as tensors.
    """

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__(
            QFormerLayer(config, has_cross_attention=config.has_cross_attention(i)) for i in range(config.num_layers)
        )
        self.is_checkpointed = config.activation_checkpointing

    def __iter__(self) -> Iterator[QFormerLayer]:
        return cast(Iterator[QFormerLayer], super().__iter__())

    def forward(
        self,
        hidden_ND: Tensor,
        rows: Rows,
        mask: Tensor | None = None,
        image: Sequence[Sequence[Part]] | None = None,
        past: Sequence[KeyValue] | None = None,
        kept: Kept | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """As `QFormerLayer.forward`; `image` and `past` hold an entry a layer, `kept` concerns the last."""
        cache = []
        for i, layer in enumerate(self):
            arguments = (
                rows,
                mask,
                () if image is None else image[i],
                None if past is None else past[i],
                kept if i == len(self) - 1 else None,
            )
            if self.is_checkpointed and torch.is_grad_enabled():
                hidden_ND, own = checkpoint(layer, hidden_ND, *arguments, use_reentrant=False)
            else:
                hidden_ND, own = layer(hidden_ND, *arguments)
            cache.append(own)
        return hidden_ND, cache


class QFormer(nn.Module):
    """BLIP-2's Q-Former with the paths its objectives need, each computed once and shared.

    `config.vocab_size == 0` leaves out the text branch, as BLIP-2's stage 2 does.
    """

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_queries, config.hidden_size))
        self.embedding_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = QFormerLayers(config)
        if config.has_text_branch:
            self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=0)
            self.position_embeddings = nn.Embedding(config.max_positions, config.hidden_size)
        if config.has_text_branch and config.has_lm_head:
            self.lm_dense = nn.Linear(config.hidden_size, config.hidden_size)
            self.lm_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            self.lm_bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.apply(_initialise)
        nn.init.normal_(self.query_tokens, std=INITIAL_STD)
        for layer in self.layers:
            if layer.text_ffn is not None:
                # The paper starts both feed-forwards from the same BERT weights.
                layer.query_ffn.load_state_dict(layer.text_ffn.state_dict())

    def image_key_values(self, image_BPV: Tensor) -> list[KeyValue | None]:
        """Cross-attention keys and values of an image for every layer; they depend on the image alone.

        Raises:
            ValueError: If the image tokens are not of the configured encoder width.
        """
        self.check_width(image_BPV)
        return [
            layer.cross_attention.key_value(image_BPV) if layer.cross_attention is not None else None
            for layer in self.layers
        ]

    def check_width(self, image_V: Tensor) -> None:
        """Raise a ValueError if the last dimension is not the configured encoder width."""
        if image_V.shape[-1] != self.config.encoder_width:
            raise ValueError(
                f"image tokens are {image_V.shape[-1]} wide but the Q-Former was built for "
                f"encoder_width={self.config.encoder_width}; use the encoder it was trained with"
            )

    def forward_queries(self, image: Sequence[KeyValue | None]) -> QueryOutput:
        """Queries alone over an image (ITC, and the cache of ITG)."""
        num_queries = self.config.num_queries
        num_images = _num_images(image)
        hidden_ND = self._embed(self.query_tokens.expand(num_images, -1, -1).flatten(0, 1))
        rows = Rows(num_images, num_queries, num_queries)
        hidden_ND, cache = self.layers(hidden_ND, rows, image=_parts(image, rows))
        return QueryOutput(hidden_ND.unflatten(0, (-1, num_queries)), cache)

    @torch.no_grad()
    def cross_attention_maps(self, image: Sequence[KeyValue | None]) -> list[Tensor]:
        """What each query looks at: probabilities [I, H, Q, P] of every cross-attending layer, in order.

        The training paths never form them; this runs the queries once more for the purpose.
        """
        maps: list[Tensor] = []

        def keep(attention: nn.Module, inputs: tuple[Tensor, list[Part]]) -> None:
            maps.extend(cast(Attention, attention).probabilities(*inputs))

        blocks = [layer.cross_attention for layer in self.layers if layer.cross_attention is not None]
        handles = [block.register_forward_pre_hook(keep) for block in blocks]
        try:
            self.forward_queries(image)
        finally:
            for handle in handles:
                handle.remove()
        return maps

    def forward_text(self, input_ids_BT: Tensor, is_text_BT: Tensor, *, is_cls_only: bool = False) -> Tensor:
        """Text alone, bi-directional (ITC's text side).

        Args:
            input_ids_BT: Right-padded ids.
            is_text_BT: True at real tokens. The first token of a row always counts as one, so that a row that is all
                padding (a masked sample) has something to attend to.
            is_cls_only: Compute of the last layer only what ITC reads, the first token.

        Returns:
            [M, D], the real tokens in order; with `is_cls_only` [B, D].
        """
        text = self.pack_text(input_ids_BT, _with_first(is_text_BT))
        items, length = text.is_text_BT.shape
        rows = Rows(items, 0, length, text.item_M * length + text.position_M)
        first_B = (text.position_M == 0).nonzero().flatten()
        kept = Kept(first_B, Rows(items, 0, 1)) if is_cls_only else None
        hidden_ND = self._embed(self._embed_text(text))
        return self.layers(hidden_ND, rows, padding_mask(text.is_text_BT), kept=kept)[0]

    def forward_joint(
        self,
        image: Sequence[KeyValue | None],
        input_ids_RT: Tensor,
        is_text_RT: Tensor,
        other_image: Sequence[KeyValue | None] | None = None,
    ) -> Tensor:
        """Queries and text together, bi-directional (ITM).

        Args:
            image: Keys and values of I images.
            input_ids_RT: Right-padded ids, one text a pair: equally many texts for each image, image by image, then one
                for each of `other_image`. An image's texts share its keys and values without a copy.
            is_text_RT: True at real tokens; as in `forward_text`, the first of a row always counts.
            other_image: Keys and values of further images, of one text each.

        Returns:
            Hidden states of the queries [R, Q, D]; nothing reads the text's, and the last layer leaves them out.

        Raises:
            ValueError: If the texts cannot be shared out equally.
        """
        num_queries = self.config.num_queries
        text = self.pack_text(input_ids_RT, _with_first(is_text_RT))
        pairs, length = text.is_text_BT.shape
        num_images = _num_images(image)
        num_others = 0 if other_image is None else _num_images(other_image)
        if (pairs - num_others) % num_images:
            raise ValueError(
                f"{pairs - num_others} texts for {num_images} images: give every image equally many texts, in order"
            )
        queries_ND = self.query_tokens.expand(pairs, -1, -1).flatten(0, 1)
        hidden_ND = self._embed(torch.cat([queries_ND, self._embed_text(text)]))
        row_length = num_queries + length
        index_R = torch.arange(pairs, device=input_ids_RT.device)
        query_place_RQ = index_R[:, None] * row_length + torch.arange(num_queries, device=index_R.device)
        text_place_M = text.item_M * row_length + num_queries + text.position_M
        rows = Rows(pairs, num_queries, row_length, torch.cat([query_place_RQ.flatten(), text_place_M]))
        query_rows = Rows(pairs, num_queries, num_queries)
        kept = Kept(torch.arange(query_rows.num_rows, device=index_R.device), query_rows)
        texts_each = (pairs - num_others) // num_images
        parts = _parts(image, Rows(num_images, 0, texts_each * num_queries))
        if other_image is not None:
            others = _parts(other_image, Rows(num_others, 0, num_queries))
            parts = [[*own, *other] for own, other in zip(parts, others, strict=True)]
        mask = joint_mask(text.is_text_BT, num_queries)
        hidden_ND, _ = self.layers(hidden_ND, rows, mask, parts, kept=kept)
        return hidden_ND.unflatten(0, (-1, num_queries))

    def decode_text(self, input_ids_BT: Tensor, is_text_BT: Tensor, cache: Sequence[KeyValue]) -> Tensor:
        """Causal text over the queries' cached keys and values (ITG): next-token logits of the real tokens, [M, vocab].

        Cross-attention does not run here: text reaches the image only through the queries.
        """
        text = self.pack_text(input_ids_BT, is_text_BT)
        items, length = text.is_text_BT.shape
        rows = Rows(items, 0, length, text.item_M * length + text.position_M)
        mask = causal_mask_after_queries(text.is_text_BT, cache[0].keys_BHNK.shape[2])
        hidden_MD, _ = self.layers(self._embed(self._embed_text(text)), rows, mask, past=cache)
        hidden_MD = self.lm_norm(F.gelu(self.lm_dense(hidden_MD)))
        return F.linear(hidden_MD, self.word_embeddings.weight, self.lm_bias)

    def pack_text(self, input_ids_BT: Tensor, is_text_BT: Tensor) -> PackedText:
        """Leave out padding.

        Raises:
            ValueError: If a text is longer than the trained positions, or an id outside the vocabulary.
        """
        item_M, position_M = is_text_BT.nonzero(as_tuple=True)
        ids_M = input_ids_BT[item_M, position_M]
        length, highest = (int(position_M.max()) + 1, int(ids_M.max())) if len(ids_M) else (1, 0)
        if length > self.config.max_positions:
            raise ValueError(f"text of {length} tokens exceeds max_positions={self.config.max_positions}")
        if highest >= self.config.vocab_size:
            raise ValueError(
                f"token id {highest} is outside the Q-Former's vocabulary of vocab_size={self.config.vocab_size}; "
                "use the tokenizer it was built for"
            )
        return PackedText(ids_M, item_M, position_M, is_text_BT[:, :length])

    def _embed_text(self, text: PackedText) -> Tensor:
        return self.word_embeddings(text.ids_M) + self.position_embeddings(text.position_M)

    def _embed(self, embedded_ND: Tensor) -> Tensor:
        return self.dropout(self.embedding_norm(embedded_ND))


def _with_first(is_text_BT: Tensor) -> Tensor:
    is_first_T = torch.arange(is_text_BT.shape[1], device=is_text_BT.device) == 0
    return is_text_BT.bool() | is_first_T


def _num_images(image: Sequence[KeyValue | None]) -> int:
    return next(kv.keys_BHNK.shape[0] for kv in image if kv is not None)


def _parts(image: Sequence[KeyValue | None], rows: Rows) -> list[list[Part]]:
    return [[] if kv is None else [Part(rows, kv)] for kv in image]


def _initialise(module: nn.Module) -> None:
    """BERT's initialisation: normal(0, 0.02) weights, zero biases, zero padding row."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INITIAL_STD)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        elif module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()
