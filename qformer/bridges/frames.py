"""What a Q-Former reads of a clip: its frames one by one, here, or joined (`cascaded`, `spatio_temporal`).

Dimensions: B batch, F frames (1 once they are joined), P tokens of a frame, V their width, Q queries, D hidden width,
G = B * F.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from qformer.model import QFormer


class Seen(NamedTuple):
    """A clip as the Q-Former reads it, without what its padding holds."""

    tokens_BFPV: Tensor
    """F is 1 where the frames were joined."""
    is_token: Tensor | None = None
    """Of joined frames: the tokens that queries see, [B, P], or [B, Q, P] where each has its own."""
    is_frame_BF: Tensor | None = None
    """Of separate frames: False at padding; None where there is none."""


class SeparateFrames(nn.Module):
    """Every frame is read alone."""

    def forward(self, tokens_BFPV: Tensor, is_frame_BF: Tensor | None) -> Seen:
        """The frames as they are."""
        return Seen(tokens_BFPV, is_frame_BF=is_frame_BF)

    def reader_of_encoder(self, qformer: QFormer) -> QFormer:
        """The Q-Former that takes the encoder's tokens; `qformer` is the one whose outputs are read."""
        return qformer


def without_padding(hidden_BFQD: Tensor, is_frame_BF: Tensor | None) -> Tensor:
    """The same with each padding frame replaced by its clip's first real one, which changes no maximum over frames."""
    if is_frame_BF is None:
        return hidden_BFQD
    clips_B = torch.arange(len(is_frame_BF), device=is_frame_BF.device)
    first_BQD = hidden_BFQD[clips_B, is_frame_BF.long().argmax(dim=1)]
    return torch.where(is_frame_BF[:, :, None, None], hidden_BFQD, first_BQD[:, None])


def mean_over_frames(values_BFX: Tensor, is_frame_BF: Tensor | None) -> Tensor:
    """Mean over each clip's real frames, [B, ...]."""
    if is_frame_BF is None:
        return values_BFX.mean(dim=1)
    weight_BF = is_frame_BF.to(values_BFX.dtype)
    weight_BF = weight_BF / weight_BF.sum(dim=1, keepdim=True).clamp(min=1.0)
    return torch.einsum("bf,bf...->b...", weight_BF, values_BFX)
