"""Retrieval metrics: similarities in, recall out (BLIP-2 protocol, as LAVIS computes it).

Dimensions: R queries (images or texts), C candidates.
A text belongs to one image; an image may have several texts, and any of them counts as correct.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

RECALL_AT = (1, 5, 10)
# Ranks what the matching head did not score below all that it did: probability + similarity is at least -1.
NOT_CANDIDATE_PENALTY = 100.0


def top_candidates(similarity_RC: NDArray[np.float32], top_k: int) -> NDArray[np.bool_]:
    """Mark the `top_k` best columns of every row; ties go to the earlier column.

    Returns:
        is_candidate_RC, bool.
    """
    is_candidate = np.zeros(similarity_RC.shape, dtype=bool)
    best = np.argsort(-similarity_RC, axis=1, kind="stable")[:, :top_k]
    np.put_along_axis(is_candidate, best, True, axis=1)
    return is_candidate


def rerank(
    similarity_RC: NDArray[np.float32], match_RC: NDArray[np.float32], is_candidate_RC: NDArray[np.bool_]
) -> NDArray[np.float32]:
    """Rerank the candidates by the matching head.

    Args:
        similarity_RC: ITC similarities.
        match_RC: ITM probabilities; read at candidates only.
        is_candidate_RC: Output of `top_candidates`.

    Returns:
        score_RC: probability + similarity for candidates; all others below them, in the order of similarity.
    """
    return similarity_RC + np.where(is_candidate_RC, match_RC, -NOT_CANDIDATE_PENALTY).astype(similarity_RC.dtype)


def first_right_ranks(score_RC: NDArray[np.float32], is_right_RC: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Number of wrong columns that rank above each row's best correct one.

    A wrong column with an equal score counts as above, so that a model with constant scores gets no hits.

    Returns:
        rank_R, int64; 0 is a hit at 1.

    Raises:
        ValueError: If a row has no right column.
    """
    if not is_right_RC.any(axis=1).all():
        raise ValueError("every row needs a right answer")
    best_R1 = np.where(is_right_RC, score_RC, -np.inf).max(axis=1, keepdims=True)
    return ((score_RC >= best_R1) & ~is_right_RC).sum(axis=1)


def recall(ranks: NDArray[np.int64], recall_at: Sequence[int] = RECALL_AT) -> dict[str, float]:
    """Share of rows whose first correct column is among the first k: {"r1": ..., "r5": ..., "r10": ...}."""
    return {f"r{k}": float((ranks < k).mean()) for k in recall_at}
