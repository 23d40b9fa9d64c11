"""Images and texts of one kind that are searched for each other.

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
    """The images of one kind with their texts, scored both ways."""

    kind: str
    sample_ids: list[str]
    texts: list[str]
    text_index_T: NDArray[np.int64]
    """Place of each text among the texts of the whole manifest."""
    owner_T: NDArray[np.int64]
    """Row of the image that each text belongs to."""
    similarity_IT: NDArray[np.float32]
    """ITC."""
    image_to_text_IT: NDArray[np.float32]
    """Scores by which an image finds texts."""
    text_to_image_IT: NDArray[np.float32]
    """Scores by which a text finds images."""

    @property
    def is_right_IT(self) -> NDArray[np.bool_]:  # noqa: N802 - dimensions are a suffix
        """True where the text belongs to the image."""
        return np.arange(len(self.sample_ids))[:, None] == self.owner_T[None, :]

    @property
    def image_ranks(self) -> NDArray[np.int64]:
        """For each image, how many wrong texts stand before its best right one."""
        return first_right_ranks(self.image_to_text_IT, self.is_right_IT)

    @property
    def text_ranks(self) -> NDArray[np.int64]:
        """For each text, how many wrong images stand before its own."""
        return first_right_ranks(self.text_to_image_IT.T, self.is_right_IT.T)

    def metrics(self) -> dict[str, Any]:
        """Recall both ways, and how large the gallery is."""
        return {
            "images": len(self.sample_ids),
            "texts": len(self.texts),
            "image_to_text": recall(self.image_ranks),
            "text_to_image": recall(self.text_ranks),
        }

    def examples(self, num_texts: int) -> list[dict[str, Any]]:
        """For each image: sample_id, kind, its own texts, the best `num_texts` found, and the rank of the first right.

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
        """Texts (places in the whole manifest) that the matching head must score, by sample id.

        They are the best of each image, and the images that are among the best of a text.
        """
        chosen_IT = top_candidates(self.similarity_IT, top_k) | top_candidates(self.similarity_IT.T, top_k).T
        return {
            name: self.text_index_T[chosen_T].astype(np.int32)
            for name, chosen_T in zip(self.sample_ids, chosen_IT, strict=True)
        }

    def reranked(self, matches: Mapping[str, tuple[NDArray[np.int32], NDArray[np.float32]]], top_k: int) -> "Gallery":
        """Let the matching head decide among the candidates.

        Args:
            matches: By sample id the texts scored and their probabilities, for what `candidates` asked. Images
                that are missing leave the gallery with their texts.
            top_k: As in `candidates`.
        """
        match_IT = np.zeros_like(self.similarity_IT)
        place = {index: column for column, index in enumerate(self.text_index_T.tolist())}
        for row, name in enumerate(self.sample_ids):
            for index, probability in zip(*matches.get(name, ((), ())), strict=True):
                match_IT[row, place[int(index)]] = probability
        text_side_TI = rerank(self.similarity_IT.T, match_IT.T, top_candidates(self.similarity_IT.T, top_k))
        scored = dataclasses.replace(
            self,
            image_to_text_IT=rerank(self.similarity_IT, match_IT, top_candidates(self.similarity_IT, top_k)),
            text_to_image_IT=text_side_TI.T,
        )
        return scored.keep([name in matches for name in self.sample_ids])

    def keep(self, is_kept: list[bool]) -> "Gallery":
        """Return the gallery of some of its images and their texts."""
        rows = np.flatnonzero(is_kept)
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
    """Part a manifest's rows by kind.

    Args:
        manifest: Rows with captions.
        similarity: By sample id, the ITC similarity with every caption of the manifest in its order. Rows that are
            missing stay out.

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
