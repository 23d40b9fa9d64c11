"""Retrieval metrics and galleries against tables computed by hand."""

import numpy as np
import pyarrow as pa
import pytest

from pipelines.data import schema
from pipelines.evaluation.metrics.recall import first_right_ranks, recall, rerank, top_candidates
from pipelines.evaluation.protocols.gallery import build_galleries


def scores(rows):
    return np.array(rows, dtype=np.float32)


@pytest.mark.parametrize(
    ("row", "right", "rank"),
    [
        ([0.9, 0.1, 0.5], [1, 0, 0], 0),  # first
        ([0.9, 0.1, 0.5], [0, 0, 1], 1),  # one wrong before
        ([0.9, 0.1, 0.5], [0, 1, 0], 2),  # last
        ([0.9, 0.1, 0.5], [0, 1, 1], 1),  # the best of several right ones counts
        ([0.5, 0.5, 0.5], [1, 0, 0], 2),  # a tie is no hit
    ],
)
def test_first_right_rank(row, right, rank):
    assert first_right_ranks(scores([row]), np.array([right], dtype=bool)).tolist() == [rank]


def test_a_row_without_right_answer_is_refused():
    with pytest.raises(ValueError, match="right answer"):
        first_right_ranks(scores([[0.1]]), np.array([[False]]))


def test_recall_counts_ranks_below_k():
    assert recall(np.array([0, 0, 1, 4, 5, 9, 10, 50])) == {"r1": 2 / 8, "r5": 4 / 8, "r10": 6 / 8}


def test_top_candidates_prefer_the_earlier_of_a_tie_and_accept_a_large_k():
    similarity = scores([[0.3, 0.3, 0.3], [0.1, 0.2, 0.3]])
    assert top_candidates(similarity, 2).tolist() == [[True, True, False], [False, True, True]]
    assert top_candidates(similarity, 9).all()


def test_rerank_puts_all_candidates_before_the_rest():
    similarity = scores([[0.9, 0.8, 0.7, 0.6]])
    candidates = np.array([[True, True, False, False]])
    score = rerank(similarity, scores([[0.1, 0.6, 1.0, 1.0]]), candidates)
    # 0.8 + 0.6 > 0.9 + 0.1; the others stay below in the order of their similarity, whatever ITM says.
    assert np.argsort(-score[0]).tolist() == [1, 0, 2, 3]


@pytest.fixture
def galleries():
    """Two images with 2 and 1 captions around a clip with 1; texts 0 1 | 2 | 3."""
    manifest = pa.table(
        {
            schema.SAMPLE_ID: ["a", "clip", "b", "broken"],
            schema.KIND: ["image", "video", "image", "image"],
            schema.CAPTIONS: [["a0", "a1"], ["c0"], ["b0"], ["x0"]],
        }
    )
    similarity = {
        # texts:         a0   a1   c0   b0   x0
        "a": scores([0.2, 0.4, 0.9, 0.5, 0.9]),
        "clip": scores([0.9, 0.9, 0.1, 0.9, 0.9]),
        "b": scores([0.1, 0.6, 0.9, 0.3, 0.9]),
    }
    return {gallery.kind: gallery for gallery in build_galleries(manifest, similarity)}


def test_kinds_are_scored_apart_and_failed_rows_stay_out(galleries):
    images = galleries["image"]
    assert images.sample_ids == ["a", "b"] and images.texts == ["a0", "a1", "b0"]
    assert images.text_index_T.tolist() == [0, 1, 3] and images.owner_T.tolist() == [0, 0, 1]
    # Image a: b0 (0.5) before a1 (0.4); image b: a1 (0.6) before b0 (0.3).
    assert images.image_ranks.tolist() == [1, 1]
    # a0: a 0.2 > b 0.1; a1: b 0.6 > a 0.4; b0: a 0.5 > b 0.3.
    assert images.text_ranks.tolist() == [0, 1, 1]
    assert galleries["video"].metrics() == {
        "images": 1,
        "texts": 1,
        "image_to_text": {"r1": 1.0, "r5": 1.0, "r10": 1.0},
        "text_to_image": {"r1": 1.0, "r5": 1.0, "r10": 1.0},
    }


def test_candidates_of_both_directions_and_reranking(galleries):
    images = galleries["image"]
    wanted = images.candidates(1)
    # a: its best text b0 (3), and it is the best image of a0 (0) and b0 (3). b: best a1 (1), best image of a1.
    assert {name: index.tolist() for name, index in wanted.items()} == {"a": [0, 3], "b": [1]}
    matches = {"a": (wanted["a"], scores([0.8, 0.1])), "b": (wanted["b"], scores([0.2]))}
    reranked = images.reranked(matches, 1)
    # Top 1 only: the order cannot change, but the scores of the chosen do.
    assert np.allclose(reranked.image_to_text_IT, [[0.2 - 100, 0.4 - 100, 0.6], [0.1 - 100, 0.8, 0.3 - 100]])
    assert np.allclose(reranked.text_to_image_IT, [[1.0, 0.4 - 100, 0.6], [0.1 - 100, 0.8, 0.3 - 100]])


def test_matching_head_can_repair_every_rank(galleries):
    images = galleries["image"]
    right = {"a": [0.9, 0.9, 0.0], "b": [0.0, 0.0, 0.9]}
    wanted = images.candidates(3)
    reranked = images.reranked({name: (wanted[name], scores(right[name])) for name in wanted}, 3)
    assert reranked.metrics()["image_to_text"]["r1"] == reranked.metrics()["text_to_image"]["r1"] == 1.0


def test_an_image_that_fails_in_the_second_pass_leaves_with_its_texts(galleries):
    images = galleries["image"]
    wanted = images.candidates(3)
    kept = images.reranked({"b": (wanted["b"], scores([0.1, 0.1, 0.1]))}, 3)
    assert kept.sample_ids == ["b"] and kept.texts == ["b0"] and kept.owner_T.tolist() == [0]
    assert kept.metrics()["text_to_image"]["r1"] == 1.0


def test_a_split_whose_files_all_failed_has_no_gallery():
    from pipelines.evaluation.protocols.retrieval import SIMILARITY, _similarities

    nothing = pa.table(
        {schema.SAMPLE_ID: pa.array([], pa.string()), SIMILARITY: pa.array([], pa.list_(pa.float32(), 3))}
    )
    assert _similarities(nothing) == {}
