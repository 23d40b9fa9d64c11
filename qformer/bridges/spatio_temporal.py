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

import torch
from torch import Tensor, nn

from qformer.bridges.config import VideoConfig
from qformer.bridges.frames import Seen
from qformer.bridges.positions import FramePositions
from qformer.config import QFormerConfig
from qformer.layers import QFormerLayers
from qformer.model import INITIAL_STD, QFormer


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
        kept = "bnhk" if dim == 1 else "bfhk"
        return torch.einsum(f"bfnh,bfnhk->{kept}", weight_BFNH, values_BFNHK).flatten(-2)


class SpatioTemporalFrames(nn.Module):
    """A spatial map (each token's mean over time) and a temporal sequence (each frame's mean over space).

    Args:
        config: Of the Q-Former.
        video: See `VideoConfig`.
    """

    def __init__(self, config: QFormerConfig, video: VideoConfig) -> None:
        super().__init__()
        self.positions = FramePositions(video.max_frames, config.encoder_width)
        self.over_frames = AttentivePool(config.encoder_width, config.num_heads)
        """The paper's q_t, whose means are its v_s."""
        self.over_space = AttentivePool(config.encoder_width, config.num_heads)
        """The paper's q_s, whose means are its v_t."""
        self.group_sizes = video.group_sizes

    def reader_of_encoder(self, qformer: QFormer) -> QFormer:
        """The one Q-Former that there is."""
        return qformer

    def forward(self, tokens_BFNV: Tensor, is_frame_BF: Tensor | None) -> Seen:
        """Pool both ways.

        Args:
            tokens_BFNV: Encoder tokens behind the norm.
            is_frame_BF: False at padding; None where there is none.

        Returns:
            The map, then the sequence; spatial queries see the one, temporal ones the other, summary ones both.
        """
        batch, frames, patches = tokens_BFNV.shape[:3]
        if is_frame_BF is None:
            is_frame_BF = torch.ones(batch, frames, dtype=torch.bool, device=tokens_BFNV.device)
        tokens_BFNV = tokens_BFNV + self.positions(is_frame_BF)[:, :, None]
        map_BNV = self.over_frames(tokens_BFNV, dim=1, is_token=is_frame_BF[:, :, None, None])
        sequence_BFV = self.over_space(tokens_BFNV, dim=2)
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
        return Seen(torch.cat([map_BNV, sequence_BFV], dim=1)[:, None], is_token_BQP)


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
