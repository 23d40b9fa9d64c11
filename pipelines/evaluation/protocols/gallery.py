"""Retrieval galleries: the images (or clips) of one kind with their texts.

Dimensions: I images (or clips), T texts.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.data import schema
from pipelines.evaluation.metrics.recall import first_right_ranks, recall, rerank, top_candidates


@dataclass(frozen=True, kw_only=True, slots=True)
class Gallery:
    """Images of one kind and their texts, with scores in both directions."""

    kind: str
    sample_ids: list[str]
    texts: list[str]
    text_index_T: NDArray[np.int64]
    """Index of each text among the texts of the whole manifest."""
    owner_T: NDArray[np.int64]
    """Index of the image that each text belongs to."""
    similarity_IT: NDArray[np.float32]
    """ITC similarities."""
    image_to_text_IT: NDArray[np.float32]
    """Scores for image-to-text retrieval."""
    text_to_image_IT: NDArray[np.float32]
    """Scores for text-to-image retrieval."""

    @property
    def is_right_IT(self) -> NDArray[np.bool_]:  # noqa: N802 - dimensions are a suffix
        """True where the text belongs to the image."""
        return np.arange(len(self.sample_ids))[:, None] == self.owner_T[None, :]

    @property
    def image_ranks(self) -> NDArray[np.int64]:
        """Rank of each image's best correct text, counted from 0."""
        return first_right_ranks(self.image_to_text_IT, self.is_right_IT)

    @property
    def text_ranks(self) -> NDArray[np.int64]:
        """Rank of each text's own image, counted from 0."""
        return first_right_ranks(self.text_to_image_IT.T, self.is_right_IT.T)

    def metrics(self) -> dict[str, Any]:
        """Recall in both directions, and the size of the gallery."""
        return {
            "images": len(self.sample_ids),
            "texts": len(self.texts),
            "image_to_text": recall(self.image_ranks),
            "text_to_image": recall(self.text_ranks),
        }

    def examples(self, num_texts: int) -> list[dict[str, Any]]:
        """Result rows: sample_id, kind, the own texts, the best `num_texts`, and the rank of the best own text.

        Ranks count from 0.
        """
        rows = []
        for row, (name, rank) in enumerate(zip(self.sample_ids, self.image_ranks.tolist(), strict=True)):
            best = np.argsort(-self.image_to_text_IT[row], kind="stable")[:num_texts]
            rows.append(
                {
                    schema.SAMPLE_ID: name,
                    schema.KIND: self.kind,
                    schema.CAPTIONS: [self.texts[column] for column in np.flatnonzero(self.owner_T == row)],
                    "found": [self.texts[column] for column in best],
                    "rank": rank,
                }
            )
        return rows

    def candidates(self, top_k: int) -> dict[str, NDArray[np.int32]]:
        """Texts to score with the matching head, as indices into the whole manifest, by sample id.

        These are the best texts of each image, and the texts for which the image is among the best.
        """
        chosen_IT = top_candidates(self.similarity_IT, top_k) | top_candidates(self.similarity_IT.T, top_k).T
        return {
            name: self.text_index_T[chosen_T].astype(np.int32)
            for name, chosen_T in zip(self.sample_ids, chosen_IT, strict=True)
        }

    def reranked(self, matches: Mapping[str, tuple[NDArray[np.int32], NDArray[np.float32]]], top_k: int) -> "Gallery":
        """Rerank the candidates by the matching head.

        Args:
            matches: Scored texts and their probabilities, by sample id, for the output of `candidates`. Missing
                images are dropped with their texts.
            top_k: Number of candidates, as given to `candidates`.
        """
        match_IT = np.zeros_like(self.similarity_IT)
        column_of = {index: column for column, index in enumerate(self.text_index_T.tolist())}
        for row, name in enumerate(self.sample_ids):
            for index, probability in zip(*matches.get(name, ((), ())), strict=True):
                match_IT[row, column_of[int(index)]] = probability
        text_side_TI = rerank(self.similarity_IT.T, match_IT.T, top_candidates(self.similarity_IT.T, top_k))
        scored = dataclasses.replace(
            self,
            image_to_text_IT=rerank(self.similarity_IT, match_IT, top_candidates(self.similarity_IT, top_k)),
            text_to_image_IT=text_side_TI.T,
        )
        return scored.select([name in matches for name in self.sample_ids])

    def select(self, is_selected: list[bool]) -> "Gallery":
        """Return the gallery of a subset of the images, with their texts."""
        rows = np.flatnonzero(is_selected)
        columns = np.flatnonzero(np.isin(self.owner_T, rows))
        square = np.ix_(rows, columns)
        return Gallery(
            kind=self.kind,
            sample_ids=[self.sample_ids[row] for row in rows],
            texts=[self.texts[column] for column in columns],
            text_index_T=self.text_index_T[columns],
            owner_T=np.searchsorted(rows, self.owner_T[columns]),
            similarity_IT=self.similarity_IT[square],
            image_to_text_IT=self.image_to_text_IT[square],
            text_to_image_IT=self.text_to_image_IT[square],
        )


def build_galleries(manifest: pa.Table, similarity: Mapping[str, NDArray[np.float32]]) -> list[Gallery]:
    """Split a manifest's rows by kind.

    Args:
        manifest: Rows with captions.
        similarity: ITC similarities with all captions of the manifest, in its order, by sample id. Missing rows are
            left out.

    Returns:
        A gallery for each kind that has a row, scored by ITC.
    """
    captions = manifest[schema.CAPTIONS].to_pylist()
    names, kinds = manifest[schema.SAMPLE_ID].to_pylist(), manifest[schema.KIND].to_pylist()
    texts = np.array([text for own in captions for text in own], dtype=object)
    owner = np.repeat(np.arange(len(names)), [len(own) for own in captions])
    galleries = []
    for kind in schema.KINDS:
        rows = [row for row, name in enumerate(names) if kinds[row] == kind and name in similarity]
        if not rows:
            continue
        columns = np.flatnonzero(np.isin(owner, rows))
        scores_IT = np.stack([similarity[names[row]] for row in rows])[:, columns]
        galleries.append(
            Gallery(
                kind=kind,
                sample_ids=[names[row] for row in rows],
                texts=texts[columns].tolist(),
                text_index_T=columns,
                owner_T=np.searchsorted(rows, owner[columns]),
                similarity_IT=scores_IT,
                image_to_text_IT=scores_IT,
                text_to_image_IT=scores_IT,
            )
        )
    return galleries
