"""Who may attend to whom: boolean masks, True where attention is allowed.

Dimensions: B batch, Q queries (cached or in front), T text tokens.
"""

import torch
from torch import Tensor


def padding_mask(is_text_BT: Tensor) -> Tensor:
    """All rows see every real token of a text or an image: [B, 1, 1, T]."""
    return is_text_BT.bool()[:, None, None, :]


def joint_mask(is_text_BT: Tensor, num_queries: int) -> Tensor:
    """Bi-directional mask of ITM: queries and text all see each other, never padding: [B, 1, 1, Q+T]."""
    is_query_BQ = torch.ones(is_text_BT.shape[0], num_queries, dtype=torch.bool, device=is_text_BT.device)
    return torch.cat([is_query_BQ, is_text_BT.bool()], dim=1)[:, None, None, :]


def causal_mask_after_queries(is_text_BT: Tensor, num_queries: int) -> Tensor:
    """Multimodal causal mask of ITG for the text rows: all queries and the text up to itself: [B, 1, T, Q+T].

    Queries never see text, which the two-pass schedule gives for free (their keys and values are cached before).
    """
    length = is_text_BT.shape[1]
    past_TT = torch.ones(length, length, dtype=torch.bool, device=is_text_BT.device).tril()
    text_B1TT = past_TT[None, None] & is_text_BT.bool()[:, None, None, :]
    queries_B1TQ = text_B1TT.new_ones(is_text_BT.shape[0], 1, length, num_queries)
    return torch.cat([queries_B1TQ, text_B1TT], dim=-1)
