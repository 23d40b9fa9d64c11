"""Who may attend to whom: boolean masks, True where attention is allowed.

Dimensions: B batch, Q queries (cached or in front), T text tokens.
"""

import torch
from torch import Tensor


def padding_mask(is_text_BT: Tensor) -> Tensor:
    """All rows see every real token of a text or an image: [B, 1, 1, T]."""
    return is_text_BT.bool()[:, None, None, :]


def image_mask(is_image: Tensor, num_rows: int) -> Tensor:
    """What query rows see of their image: [B, 1, 1, P] of [B, P]; [B, 1, num_rows, P] of [B, Q, P], query by query.

    `num_rows` is a multiple of Q: of several texts with the same image, each has its queries.
    """
    if is_image.dim() == 2:
        return padding_mask(is_image)
    return is_image[:, None].repeat(1, 1, num_rows // is_image.shape[1], 1)


def joint_mask(is_text_BT: Tensor, num_queries: int) -> Tensor:
    """Bi-directional mask of ITM: queries and text all see each other, never padding: [B, 1, 1, Q+T]."""
    is_query_BQ = torch.ones(is_text_BT.shape[0], num_queries, dtype=torch.bool, device=is_text_BT.device)
    return torch.cat([is_query_BQ, is_text_BT.bool()], dim=1)[:, None, None, :]


def causal_mask_after_queries(is_text_BT: Tensor, num_queries: int, is_query_BQ: Tensor | None = None) -> Tensor:
    """Multimodal causal mask of ITG for the text rows: all queries and the text up to itself: [B, 1, T, Q+T].

    Queries never see text, which the two-pass schedule gives for free (their keys and values are cached before).
    `is_query_BQ` is False at queries that nobody sees; None where all are seen.
    """
    length = is_text_BT.shape[1]
    past_TT = torch.ones(length, length, dtype=torch.bool, device=is_text_BT.device).tril()
    text_B1TT = past_TT[None, None] & is_text_BT.bool()[:, None, None, :]
    queries_B1TQ = text_B1TT.new_ones(is_text_BT.shape[0], 1, length, num_queries)
    if is_query_BQ is not None:
        queries_B1TQ = queries_B1TQ & is_query_BQ[:, None, None, :]
    return torch.cat([queries_B1TQ, text_B1TT], dim=-1)
