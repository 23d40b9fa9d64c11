"""Similarity of a Q-Former's query outputs.

Queries with equal outputs have collapsed: the language model then reads the same soft prompt many times.

Dimensions: B samples, G their frames, Q queries, D width.
"""

from torch import Tensor
from torch.nn import functional as F

COLLAPSED = 0.9
"""Mean pairwise cosine of query outputs from which they count as collapsed."""


def mean_cosine(hidden_GQD: Tensor) -> Tensor:
    """Mean cosine between different queries of the same frame: [G], fp32; 0 where there is only one query."""
    queries = hidden_GQD.shape[1]
    # The squared norm of the sum contains all pairs, so the Gram matrix is not needed.
    pairs_G = F.normalize(hidden_GQD.float(), dim=-1).sum(dim=1).square().sum(dim=-1) - queries
    return pairs_G / max(1, queries * (queries - 1))
