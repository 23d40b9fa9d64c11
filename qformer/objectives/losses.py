"""The losses of ITC, ITM, ITG and of diverse queries, one function a concept.

Dimensions: B local batch, N global batch, Q queries (of all frames), E joint embedding width, M predicted tokens,
R pairs.
Every function takes validity masks: a masked sample is no row, no column and no negative of any other. Losses come as
a sum over this rank's items and their number, which `distributed.mean_over_ranks` makes a mean.
Reference: BLIP-2 (arXiv:2301.12597), section 3.2; LAVIS `blip2_qformer.py`.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from qformer.bridges.frames import mean_over_frames

LABEL_SMOOTHING = 0.1
DIVERSITY = "diversity"
"""Term of every stage: mean squared cosine between a sample's query outputs."""


def similarity(queries_BQE: Tensor, text_NE: Tensor) -> Tensor:
    """Image-text similarity, the maximum over the image's queries: [B, N], fp32 also under autocast."""
    with torch.autocast(queries_BQE.device.type, enabled=False):
        return torch.einsum("bqe,ne->bqn", queries_BQE.float(), text_NE.float()).amax(dim=1)


def itc_loss(
    scores_BN: Tensor, is_positive_BN: Tensor, is_valid_B: Tensor, is_valid_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of one direction with label smoothing over the valid columns.

    Args:
        scores_BN: Similarities divided by the temperature.
        is_positive_BN: Matching pairs; with image ids, all texts of an image share the target mass.
        is_valid_B: Rows that count.
        is_valid_N: Columns that exist, those of the rows that count among them.

    Returns:
        Sum and number of the rows that count. The sum is NaN if one of them holds a NaN, whatever others hold.
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
    return (loss_B * valid_B).sum(), valid_B.sum()


def itm_loss(logits_R2: Tensor, is_match_R: Tensor, is_valid_R: Tensor) -> tuple[Tensor, Tensor]:
    """Two-way cross-entropy over matching and non-matching pairs; class 1 is "match".

    Returns:
        Sum and number of the valid pairs; NaN as in `itc_loss`.
    """
    logits_R2 = logits_R2.float().masked_fill(~is_valid_R[:, None], 0.0)
    loss_R = F.cross_entropy(logits_R2, is_match_R.long(), reduction="none")
    valid_R = is_valid_R.to(loss_R.dtype)
    return (loss_R * valid_R).sum(), valid_R.sum()


def itg_loss(logits_MV: Tensor, labels_M: Tensor) -> tuple[Tensor, Tensor]:
    """Next-token cross-entropy with label smoothing.

    Args:
        logits_MV: Logits of the tokens that predict another.
        labels_M: The predicted ids.

    Returns:
        Sum and number of the tokens.
    """
    total = F.cross_entropy(logits_MV.float(), labels_M, label_smoothing=LABEL_SMOOTHING, reduction="sum")
    return total, torch.tensor(len(labels_M), device=labels_M.device)


def diversity_loss(hidden_GQD: Tensor, is_valid_B: Tensor, is_frame_BF: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean squared cosine between different queries of the same frame; 0 if they are orthogonal.

    Args:
        hidden_GQD: Query outputs of all frames of B samples.
        is_valid_B: Samples that count.
        is_frame_BF: False at frames that do not count in their sample's mean; None: all do.

    Returns:
        Sum and number of the samples that count.
    """
    queries = hidden_GQD.shape[1]
    with torch.autocast(hidden_GQD.device.type, enabled=False):
        unit_GQD = F.normalize(hidden_GQD.float(), dim=-1)
        gram_GQQ = unit_GQD @ unit_GQD.transpose(1, 2)
        squares_G = (gram_GQQ.square().sum(dim=(1, 2)) - queries) / max(1, queries * (queries - 1))
        squares_B = mean_over_frames(squares_G.unflatten(0, (len(is_valid_B), -1)), is_frame_BF)
    return squares_B.masked_fill(~is_valid_B, 0.0).sum(), is_valid_B.sum()
