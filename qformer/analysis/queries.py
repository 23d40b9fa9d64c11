"""Similarity of a Q-Former's query outputs.

Queries with equal outputs have collapsed: the language model then reads the same soft prompt many times.

Dimensions: B samples, G their frames, Q queries, D width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from qformer.bridges.frames import mean_over_frames

COLLAPSED = 0.9
"""Mean pairwise cosine of query outputs from which they count as collapsed."""


def mean_cosine(hidden_GQD: Tensor) -> Tensor:
    """Mean cosine between different queries of the same frame: [G], fp32; 0 where there is only one query."""
    queries = hidden_GQD.shape[1]
    # The squared norm of the sum contains all pairs, so the Gram matrix is not needed.
    pairs_G = F.normalize(hidden_GQD.float(), dim=-1).sum(dim=1).square().sum(dim=-1) - queries
    return pairs_G / max(1, queries * (queries - 1))


def diversity_loss(hidden_GQD: Tensor, is_valid_B: Tensor, is_frame_BF: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean squared cosine between different queries of the same frame; 0 if they are orthogonal.

    Args:
        hidden_GQD: Query outputs of all frames of B samples.
        is_valid_B: Samples that count.
        is_frame_BF: False at frames that do not count in their sample's mean; None: all do.

    Returns:
        Sum and number of the samples that count, like the losses of `qformer.objectives`.
    """
    queries = hidden_GQD.shape[1]
    with torch.autocast(hidden_GQD.device.type, enabled=False):
        unit_GQD = F.normalize(hidden_GQD.float(), dim=-1)
        gram_GQQ = unit_GQD @ unit_GQD.transpose(1, 2)
        squares_G = (gram_GQQ.square().sum(dim=(1, 2)) - queries) / max(1, queries * (queries - 1))
        squares_B = mean_over_frames(squares_G.unflatten(0, (len(is_valid_B), -1)), is_frame_BF)
    return squares_B.masked_fill(~is_valid_B, 0.0).sum(), is_valid_B.sum()
