"""The Q-Former: learned queries that cross-attend to image tokens, and a text branch that shares self-attention.

Dimensions: B batch, P image tokens, V encoder width, Q queries, T text tokens, D hidden width, H heads, K head width,
I images, R image-text pairs, N packed rows, M packed text tokens.
Rows are packed (see `attention`): attention alone pads text, to the batch's longest; linear layers never see padding.
Reference: BLIP-2 (arXiv:2301.12597), section 3.1; LAVIS `Qformer.py`.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qformer.attention import Attention, KeyValue, Part, Rows
from qformer.config import QFormerConfig
from qformer.layers import QFormerLayers, SelectedRows
from qformer.masks import causal_mask_after_queries, image_mask, joint_mask, padding_mask

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
        check_image(image_BPV, self.config.encoder_width, self.query_tokens.dtype, "BPV")
        return [
            layer.cross_attention.key_value(image_BPV) if layer.cross_attention is not None else None
            for layer in self.layers
        ]

    def forward_queries(self, image: Sequence[KeyValue | None], is_image: Tensor | None = None) -> QueryOutput:
        """Queries alone over an image (ITC, and the cache of ITG).

        Args:
            image: Its keys and values.
            is_image: True at the image tokens that queries attend to, [B, P], or [B, Q, P] where every query has its
                own; at least one for each. None: to all.
        """
        num_queries = self.config.num_queries
        num_images = _num_images(image)
        hidden_ND = self._embed(self.query_tokens.expand(num_images, -1, -1).flatten(0, 1))
        rows = Rows(num_images, num_queries, num_queries)
        hidden_ND, cache = self.layers(hidden_ND, rows, image=_parts(image, rows, is_image))
        return QueryOutput(hidden_ND.unflatten(0, (-1, num_queries)), cache)

    @torch.no_grad()
    def cross_attention_maps(self, image: Sequence[KeyValue | None], is_image: Tensor | None = None) -> list[Tensor]:
        """Attention of each query over the image: probabilities [I, H, Q, P] of every cross-attending layer, in order.

        The training paths never form them; this runs the queries once more for the purpose.

        Args:
            image: Its keys and values.
            is_image: Mask of `forward_queries`; masked tokens have probability 0.
        """
        maps: list[Tensor] = []

        def keep(attention: nn.Module, inputs: tuple[Tensor, list[Part]]) -> None:
            hidden_ND, (part,) = inputs
            maps.append(cast(Attention, attention).probabilities(hidden_ND, part))

        with contextlib.ExitStack() as hooks:
            for layer in self.layers:
                if layer.cross_attention is not None:
                    hooks.callback(layer.cross_attention.register_forward_pre_hook(keep).remove)
            self.forward_queries(image, is_image)
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
        selected = SelectedRows(first_B, Rows(items, 0, 1)) if is_cls_only else None
        hidden_ND = self._embed(self._embed_text(text))
        return self.layers(hidden_ND, rows, padding_mask(text.is_text_BT), selected=selected)[0]

    def forward_joint(
        self,
        image: Sequence[KeyValue | None],
        input_ids_RT: Tensor,
        is_text_RT: Tensor,
        other_image: Sequence[KeyValue | None] | None = None,
        is_image: Tensor | None = None,
        is_other: Tensor | None = None,
    ) -> Tensor:
        """Queries and text together, bi-directional (ITM).

        Args:
            image: Keys and values of I images.
            input_ids_RT: Right-padded ids, one text a pair: equally many texts for each image, image by image, then one
                for each of `other_image`. An image's texts share its keys and values without a copy.
            is_text_RT: True at real tokens; as in `forward_text`, the first of a row always counts.
            other_image: Keys and values of further images, of one text each.
            is_image: Mask of `image`, as in `forward_queries`.
            is_other: Mask of `other_image`.

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
        selected = SelectedRows(torch.arange(query_rows.num_rows, device=index_R.device), query_rows)
        texts_each = (pairs - num_others) // num_images
        parts = _parts(image, Rows(num_images, 0, texts_each * num_queries), is_image)
        if other_image is not None:
            others = _parts(other_image, Rows(num_others, 0, num_queries), is_other)
            parts = [[*own, *other] for own, other in zip(parts, others, strict=True)]
        mask = joint_mask(text.is_text_BT, num_queries)
        hidden_ND, _ = self.layers(hidden_ND, rows, mask, parts, selected=selected)
        return hidden_ND.unflatten(0, (-1, num_queries))

    def decode_text(
        self,
        input_ids_BT: Tensor,
        is_text_BT: Tensor,
        cache: Sequence[KeyValue],
        is_query_BQ: Tensor | None = None,
    ) -> Tensor:
        """Causal text over the queries' cached keys and values (ITG): next-token logits of the real tokens, [M, vocab].

        Cross-attention does not run here: text reaches the image only through the queries. `is_query_BQ` is False at
        cached queries that it does not see.
        """
        text = self.pack_text(input_ids_BT, is_text_BT)
        items, length = text.is_text_BT.shape
        rows = Rows(items, 0, length, text.item_M * length + text.position_M)
        mask = causal_mask_after_queries(text.is_text_BT, cache[0].keys_BHNK.shape[2], is_query_BQ)
        hidden_MD, _ = self.layers(self._embed(self._embed_text(text)), rows, mask, past=cache)
        hidden_MD = self.lm_norm(F.gelu(self.lm_dense(hidden_MD)))
        return F.linear(hidden_MD, self.word_embeddings.weight, self.lm_bias)

    def pack_text(self, input_ids_BT: Tensor, is_text_BT: Tensor) -> PackedText:
        """Leave out padding.

        Raises:
            ValueError: If there is no text branch, a text is longer than the trained positions, or an id outside the
                vocabulary.
        """
        if not self.config.has_text_branch:
            raise ValueError("text for a Q-Former without text branch (vocab_size=0); build it with its vocabulary")
        item_M, position_M = is_text_BT.nonzero(as_tuple=True)
        ids_M = input_ids_BT[item_M, position_M]
        length = int(position_M.max()) + 1 if len(ids_M) else 1
        low, high = map(int, ids_M.aminmax()) if len(ids_M) else (0, 0)
        if length > self.config.max_positions:
            raise ValueError(
                f"text of {length} tokens exceeds max_positions={self.config.max_positions}; "
                "lower model.max_text_tokens"
            )
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(
                f"token ids reach from {low} to {high}, outside the Q-Former's vocabulary of "
                f"vocab_size={self.config.vocab_size}; use the tokenizer it was trained with (model.tokenizer)"
            )
        return PackedText(ids_M, item_M, position_M, is_text_BT[:, :length])

    def _embed_text(self, text: PackedText) -> Tensor:
        return self.word_embeddings(text.ids_M) + self.position_embeddings(text.position_M)

    def _embed(self, embedded_ND: Tensor) -> Tensor:
        return self.dropout(self.embedding_norm(embedded_ND))


def check_image(image_V: Tensor, width: int, dtype: torch.dtype, dimensions: str) -> None:
    """Refuse image tokens of other `dimensions` ("BPV", "BFPV"), another width, or a dtype the weights cannot meet.

    Raises:
        ValueError: Naming both sides.
    """
    is_cast = dtype == torch.float32 and torch.is_autocast_enabled(image_V.device.type)
    taken = (dtype, torch.float16, torch.bfloat16) if is_cast else (dtype,)
    if image_V.dim() != len(dimensions) or image_V.shape[-1] != width or image_V.dtype not in taken:
        raise ValueError(
            f"image tokens are {image_V.dtype} {tuple(image_V.shape)} but the Q-Former takes floating {dtype} "
            f"[{', '.join(dimensions[:-1])}, {width}] (encoder_width={width}); use the encoder it was trained with "
            f"(model.vision), give an image one frame, convert tokens with .to({dtype}) or run under torch.autocast"
        )


def check_text(input_ids_BT: Tensor, is_text_BT: Tensor) -> None:
    """Refuse text that is not integer ids [B, T] with a mask of the same shape.

    Raises:
        ValueError: Naming both sides.
    """
    ids, mask = input_ids_BT, is_text_BT
    if ids.is_floating_point() or ids.dim() != 2 or ids.shape != mask.shape:
        raise ValueError(
            f"text ids are {ids.dtype} {tuple(ids.shape)} and their mask is {tuple(mask.shape)}; both must be "
            "[B, T], the ids integers"
        )


def _with_first(is_text_BT: Tensor) -> Tensor:
    is_first_T = torch.arange(is_text_BT.shape[1], device=is_text_BT.device) == 0
    return is_text_BT.bool() | is_first_T


def _num_images(image: Sequence[KeyValue | None]) -> int:
    return next(kv.keys_BHNK.shape[0] for kv in image if kv is not None)


def _parts(image: Sequence[KeyValue | None], rows: Rows, is_image: Tensor | None = None) -> list[list[Part]]:
    mask = None if is_image is None else image_mask(is_image, rows.length)
    return [[] if kv is None else [Part(rows, kv, mask)] for kv in image]


def _initialise(module: nn.Module) -> None:
    """BERT's initialisation: normal(0, 0.02) weights, zero biases, zero padding row."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INITIAL_STD)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        elif module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()
