"""The spatio-temporal Q-Former: frames pooled over space and over time, and kinds of queries that read one or both.

Which feed-forward and which tokens a query has is decided by its kind alone; nothing routes it at run time.
What the paper leaves open is our choice: 32 spatial and 32 temporal queries; time positions on all tokens of a frame
before both poolings, as Video-LLaMA has them; and in the poolings, heads of the encoder's width divided, a key
projection folded into the learned query (with one query they are the same), and no projection of values: what is pooled
stays what an image's Q-Former has learned to read, and of a clip of one frame the spatial map is the image itself.

Dimensions: B batch, F frames, N tokens of a frame, V encoder width, H heads, K head width, Q queries, P = N + F tokens,
R rows of all items' queries, D hidden width.
Reference: Nie et al., "Video Q-Former: Multimodal Large Language Model with Spatio-Temporal Querying Transformer" (ICLR
2025 submission).
"""

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from qformer.bridges.config import BaseBridgeConfig
from qformer.bridges.positions import FramePositions
from qformer.bridges.protocol import Bridge, BridgeInput, Percept, WeightStart
from qformer.bridges.qformer_bridge import QFormerBridge
from qformer.config import QFormerConfig
from qformer.layers import QFormerLayers
from qformer.model import INITIAL_STD

_FFN = ".query_ffn."


@dataclass(frozen=True, kw_only=True, slots=True)
class SpatioTemporalConfig(BaseBridgeConfig):
    """One Q-Former over frames pooled over space and over time (Video Q-Former).

    The paper has 64 spatial and temporal queries together and leaves open how they are split.
    """

    kind: Literal["spatio_temporal"] = "spatio_temporal"
    max_frames: int = 32
    """Trained frame positions; longer clips stretch them."""
    freeze_attention: bool = False
    """Keep the Q-Former's attention as `init_from` has it, while poolings, queries, feed-forwards and heads are trained
    (the paper's first steps)."""
    num_spatial_queries: int = 32
    """Queries that read where things are."""
    num_temporal_queries: int = 32
    """Queries that read when things are."""
    num_summary_queries: int = 1
    """Queries that read both."""

    @property
    def keeps_loaded(self) -> str | None:
        """See `BaseBridgeConfig.keeps_loaded`."""
        return "freeze_attention" if self.freeze_attention else None

    @property
    def group_sizes(self) -> tuple[int, int, int]:
        """Queries by kind: spatial, temporal, summary."""
        return self.num_spatial_queries, self.num_temporal_queries, self.num_summary_queries

    def reader(self, qformer: QFormerConfig) -> QFormerConfig:
        """Shapes of the Q-Former: an image's, with the queries of all kinds."""
        return dataclasses.replace(qformer, num_queries=sum(self.group_sizes))


class AttentivePool(nn.Module):
    """One learned query that attends over a set of tokens and takes their weighted mean, head by head."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        heads = next(heads for heads in range(min(num_heads, width), 0, -1) if width % heads == 0)
        self.query_HV = nn.Parameter(torch.empty(heads, width))
        nn.init.normal_(self.query_HV, std=INITIAL_STD)

    def forward(self, tokens_BFNV: Tensor, dim: int, is_token: Tensor | None = None) -> Tensor:
        """Pool over the frames (`dim` 1) or the tokens of each (2); `is_token` is False at what has no weight."""
        scores_BFNH = tokens_BFNV @ self.query_HV.to(tokens_BFNV.dtype).T / tokens_BFNV.shape[-1] ** 0.5
        if is_token is not None:
            scores_BFNH = scores_BFNH.masked_fill(~is_token, float("-inf"))
        weight_BFNH = scores_BFNH.float().softmax(dim=dim).to(tokens_BFNV.dtype)
        values_BFNHK = tokens_BFNV.unflatten(-1, (len(self.query_HV), -1))
        output = "bnhk" if dim == 1 else "bfhk"
        return torch.einsum(f"bfnh,bfnhk->{output}", weight_BFNH, values_BFNHK).flatten(-2)


class SpatioTemporal(QFormerBridge):
    """A spatial map (each token's mean over time) and a temporal sequence (each frame's mean over space).

    Args:
        config: Config of this bridge.
        qformer: Shapes of the Q-Former of one image, and of its text branch if any.
    """

    def __init__(self, config: SpatioTemporalConfig, qformer: QFormerConfig) -> None:
        super().__init__(config, qformer, config.reader(qformer))
        self.group_sizes = config.group_sizes
        self.frames = Poolings(qformer, config.max_frames)
        give_experts(self.qformer.layers, self.group_sizes)
        if config.freeze_attention:
            freeze_attention(self.qformer.layers)

    def start_from(self, weights: Mapping[str, Tensor], source: BaseBridgeConfig) -> WeightStart | None:
        """An image's Q-Former: its weights are the shared ones.

        Its queries' feed-forward begins every kind's (the paper), and its queries are the first of every kind that has
        as many (our choice; the others begin anew).
        """
        if not source.is_image_qformer:
            return Bridge.start_from(self, weights, source)
        queries, kinds = "qformer.query_tokens", range(len(self.group_sizes))
        started = {name: tensor for name, tensor in weights.items() if _FFN not in name and name != queries}
        for name in weights.keys() - started.keys() - {queries}:
            before, after = name.split(_FFN)
            started |= {f"{before}{_FFN}experts.{kind}.{after}": weights[name] for kind in kinds}
        if queries in weights:
            own, theirs = self.qformer.query_tokens.detach().split(self.group_sizes, dim=1), weights[queries]
            started[queries] = torch.cat([theirs if part.shape == theirs.shape else part for part in own], dim=1)
        return WeightStart(started, [name for name in self.state_dict() if name.startswith("frames.")])

    def perceive(self, given: BridgeInput) -> Percept:
        """Pool both ways.

        Returns:
            The map, then the sequence; spatial queries attend to the one, temporal ones to the other, summary ones to
            both.
        """
        tokens_BFNV, is_frame_BF = self.normed(given), given.is_frame_BF
        batch, frames, patches = tokens_BFNV.shape[:3]
        if is_frame_BF is None:
            is_frame_BF = torch.ones(batch, frames, dtype=torch.bool, device=tokens_BFNV.device)
        map_BNV, sequence_BFV = self.frames(tokens_BFNV, is_frame_BF)
        is_map_BN, is_none_BF = is_frame_BF.new_ones(batch, patches), torch.zeros_like(is_frame_BF)
        by_group_BGP = torch.stack(
            [
                torch.cat([is_map_BN, is_none_BF], dim=1),
                torch.cat([~is_map_BN, is_frame_BF], dim=1),
                torch.cat([is_map_BN, is_frame_BF], dim=1),
            ],
            dim=1,
        )
        sizes = torch.tensor(self.group_sizes, device=is_frame_BF.device)
        is_token_BQP = by_group_BGP.repeat_interleave(sizes, dim=1, output_size=sum(self.group_sizes))
        return Percept(torch.cat([map_BNV, sequence_BFV], dim=1)[:, None], is_token_BQP)


class Poolings(nn.Module):
    """The two poolings, and the time positions before both."""

    def __init__(self, qformer: QFormerConfig, max_frames: int) -> None:
        super().__init__()
        self.positions = FramePositions(max_frames, qformer.encoder_width)
        self.over_frames = AttentivePool(qformer.encoder_width, qformer.num_heads)
        """The paper's q_t, whose means are its v_s."""
        self.over_space = AttentivePool(qformer.encoder_width, qformer.num_heads)
        """The paper's q_s, whose means are its v_t."""

    def forward(self, tokens_BFNV: Tensor, is_frame_BF: Tensor) -> tuple[Tensor, Tensor]:
        """The map [B, N, V] and the sequence [B, F, V]."""
        tokens_BFNV = tokens_BFNV + self.positions(is_frame_BF)[:, :, None]
        map_BNV = self.over_frames(tokens_BFNV, dim=1, is_token=is_frame_BF[:, :, None, None])
        return map_BNV, self.over_space(tokens_BFNV, dim=2)


class ExpertFeedForward(nn.Module):
    """A feed-forward for each kind of queries, in place of the one for all of them.

    Args:
        shared: What each starts as a copy of.
        group_sizes: Queries of each kind, in order.
    """

    def __init__(self, shared: nn.Module, group_sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(copy.deepcopy(shared) for _ in group_sizes)
        self.group_sizes = group_sizes

    def forward(self, hidden_RD: Tensor) -> Tensor:
        """Rows of all items' queries, [R, D] to [R, D]."""
        groups = hidden_RD.unflatten(0, (-1, sum(self.group_sizes))).split(self.group_sizes, dim=1)
        outputs = [
            expert(group.flatten(0, 1)).unflatten(0, (-1, size))
            for expert, group, size in zip(self.experts, groups, self.group_sizes, strict=True)
        ]
        return torch.cat(outputs, dim=1).flatten(0, 1)


def give_experts(layers: QFormerLayers, group_sizes: tuple[int, ...]) -> None:
    """Replace the queries' feed-forward of every layer by one for each kind of queries."""
    for layer in layers:
        layer.query_ffn = ExpertFeedForward(layer.query_ffn, group_sizes)


def freeze_attention(layers: QFormerLayers) -> None:
    """Leave self- and cross-attention of every layer as they are."""
    for layer in layers:
        for attention in (layer.attention, layer.cross_attention):
            if attention is not None:
                attention.requires_grad_(False)
