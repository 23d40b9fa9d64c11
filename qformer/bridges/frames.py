"""Means and places over the frames of a clip.

Dimensions: B batch, F frames, S sets of query outputs, Q queries of a set, E any width.
"""

import torch
from torch import Tensor


def without_unread(values_BSQE: Tensor, is_read_BSQ: Tensor | None) -> Tensor:
    """The same with each output that is not read replaced by one of its clip that is, which changes no maximum.

    That is the same query's of the first set where any is read, or else the first that is read.
    """
    if is_read_BSQ is None:
        return values_BSQE
    clips_B = torch.arange(len(is_read_BSQ), device=is_read_BSQ.device)
    first_B = is_read_BSQ.any(dim=2).long().argmax(dim=1)
    first_BQE, is_first_BQ = values_BSQE[clips_B, first_B], is_read_BSQ[clips_B, first_B]
    row_BE = first_BQE[clips_B, is_first_BQ.long().argmax(dim=1)]
    first_BQE = torch.where(is_first_BQ[..., None], first_BQE, row_BE[:, None])
    return torch.where(is_read_BSQ[..., None], values_BSQE, first_BQE[:, None])


def mean_over_frames(values_BFX: Tensor, is_frame_BF: Tensor | None) -> Tensor:
    """Mean over each clip's real frames, [B, ...]."""
    if is_frame_BF is None:
        return values_BFX.mean(dim=1)
    weight_BF = is_frame_BF.to(values_BFX.dtype)
    weight_BF = weight_BF / weight_BF.sum(dim=1, keepdim=True).clamp(min=1.0)
    return torch.einsum("bf,bf...->b...", weight_BF, values_BFX)


def join_frames(cached_GHQK: Tensor, frames: int) -> Tensor:
    """[B*F, H, Q, K] to [B, H, F*Q, K], frames in time order."""
    return cached_GHQK.unflatten(0, (-1, frames)).transpose(1, 2).flatten(2, 3)
