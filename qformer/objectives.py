"""ITC, ITM and ITG: the three objectives of stage 1, one function a concept.

Dimensions: B local batch, N global batch, Q queries (of all frames), E joint embedding width, M predicted tokens,
R pairs.
Every function takes validity masks: a masked sample is no row, no column and no negative of any other.
Reference: BLIP-2 (arXiv:2301.12597), section 3.2; LAVIS `blip2_qformer.py`.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from qformer.distributed import mean_over_ranks

LABEL_SMOOTHING = 0.1


def similarity(queries_BQE: Tensor, text_NE: Tensor) -> Tensor:
    """Image-text similarity, the maximum over the image's queries: [B, N], fp32 also under autocast."""
    with torch.autocast(queries_BQE.device.type, enabled=False):
        return torch.einsum("bqe,ne->bqn", queries_BQE.float(), text_NE.float()).amax(dim=1)


def itc_loss(scores_BN: Tensor, is_positive_BN: Tensor, is_valid_B: Tensor, is_valid_N: Tensor) -> Tensor:
    """Cross-entropy of one direction with label smoothing over the valid columns.

    Args:
        scores_BN: Similarities divided by the temperature.
        is_positive_BN: Matching pairs; with image ids, all texts of an image share the target mass.
        is_valid_B: Rows that count.
        is_valid_N: Columns that exist, those of the rows that count among them.

    Returns:
        This rank's share of the mean over all ranks' rows (`mean_over_ranks`): NaN if a row that counts holds one,
        whatever masked rows and columns hold.
    """
    valid_B = is_valid_B.to(scores_BN.dtype)
    # Masked before the softmax: a NaN behind it would come back in its gradient.
    scores_BN = scores_BN.masked_fill(~is_valid_N[None], float("-inf")).masked_fill(~is_valid_B[:, None], 0.0)
    log_probability_BN = scores_BN.log_softmax(dim=1).masked_fill(~is_valid_N[None], 0.0)  # 0 * -inf would be NaN
    target_BN = (is_positive_BN & is_valid_N[None]).to(scores_BN.dtype)
    target_BN = target_BN / target_BN.sum(dim=1, keepdim=True).clamp(min=1.0)
    uniform_N = is_valid_N.to(scores_BN.dtype) / is_valid_N.sum().clamp(min=1)
    target_BN = (1.0 - LABEL_SMOOTHING) * target_BN + LABEL_SMOOTHING * uniform_N[None]
    loss_B = -(target_BN * log_probability_BN).sum(dim=1)
    return mean_over_ranks((loss_B * valid_B).sum(), valid_B.sum())


class Negatives(NamedTuple):
    """Hard negatives as indexes into the global batch."""

    image_B: Tensor
    """For each local text, an image that does not match it."""
    text_B: Tensor
    """For each local image, a text that does not match it."""
    has_negative_B: Tensor
    """False where the global batch holds no candidate."""


def sample_negatives(
    scores_i2t_BN: Tensor,
    scores_t2i_BN: Tensor,
    is_positive_BN: Tensor,
    is_valid_N: Tensor,
    generator: torch.Generator | None = None,
) -> Negatives:
    """Draw one hard negative image per text and one text per image, likelier the more similar (section 3.2, ITM)."""
    is_candidate_BN = is_valid_N[None] & ~is_positive_BN
    has_negative_B = is_candidate_BN.any(dim=1)

    def draw(scores_BN: Tensor) -> Tensor:
        weights_BN = scores_BN.detach().float().masked_fill(~is_candidate_BN, float("-inf")).softmax(dim=1)
        # Rows without a candidate are NaN here, and so are all rows of a run that diverged. Any index serves: the
        # former are masked by has_negative_B, the latter stop at the loop's own check, which names the samples.
        weights_BN = torch.where(weights_BN.isfinite(), weights_BN, torch.ones_like(weights_BN))
        # A candidate's weight may underflow to zero, which would make the whole row undrawable.
        weights_BN = weights_BN + is_candidate_BN * torch.finfo(weights_BN.dtype).tiny
        return torch.multinomial(weights_BN, 1, generator=generator).flatten()

    return Negatives(draw(scores_t2i_BN), draw(scores_i2t_BN), has_negative_B)


def itm_loss(logits_R2: Tensor, is_match_R: Tensor, is_valid_R: Tensor) -> Tensor:
    """Two-way cross-entropy over matching and non-matching pairs; class 1 is "match".

    Returns:
        This rank's share of the mean over all ranks' valid pairs; NaN as in `itc_loss`.
    """
    logits_R2 = logits_R2.float().masked_fill(~is_valid_R[:, None], 0.0)
    loss_R = F.cross_entropy(logits_R2, is_match_R.long(), reduction="none")
    valid_R = is_valid_R.to(loss_R.dtype)
    return mean_over_ranks((loss_R * valid_R).sum(), valid_R.sum())


def itg_loss(logits_MV: Tensor, labels_M: Tensor, *, per_rank: bool = False) -> Tensor:
    """Next-token cross-entropy with label smoothing.

    Args:
        logits_MV: Logits of the tokens that predict another.
        labels_M: The predicted ids.
        per_rank: Average over this rank's tokens, as LAVIS does, instead of over all ranks'.

    Returns:
        The mean over this rank's tokens, or this rank's share of the mean over all.
    """
    total = F.cross_entropy(logits_MV.float(), labels_M, label_smoothing=LABEL_SMOOTHING, reduction="sum")
    count = torch.tensor(len(labels_M), device=labels_M.device)
    return total / count.clamp(min=1) if per_rank else mean_over_ranks(total, count)
