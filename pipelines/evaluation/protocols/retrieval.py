"""Retrieval over a manifest by a stage-1 checkpoint, in two passes of Ray Data.

The first pass compares every image with every text (ITC). The second decodes the images again and scores each image's
candidates with the matching head (ITM). Decoding twice keeps the encoder's tokens, by far the largest tensors here, out
of the object store, which holds similarities only.

Images and clips are evaluated separately, each against the texts of their own kind.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from pipelines.data import schema
from pipelines.data.dataset import evaluation_datasets, map_blocks, to_batch
from pipelines.data.failures import Failure
from pipelines.data.media.samples import DecodeSettings
from pipelines.data.order.row_index import TableRows
from pipelines.data.storage.local_copies import local_folder
from pipelines.evaluation.protocols.gallery import Gallery, build_galleries
from pipelines.evaluation.protocols.row_results import collect, result_table
from pipelines.inference.models import load_retriever
from qformer.objectives import similarity

SIMILARITY = "similarity"
TEXT_INDEX = "text_index"
MATCH = "match"
_NUM_TRUNCATED = "num_truncated"
_TEXTS_PER_PASS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrievalResult:
    """Result of retrieval over a manifest."""

    galleries: dict[str, Gallery]
    """Galleries by kind; kinds without a usable row are absent."""
    failures: list[Failure]
    num_truncated: int
    """Number of truncated texts."""


class CompareBlocks:
    """Actor of the first pass: ITC similarity of every image with all texts.

    Args:
        checkpoint: Folder or URI of a stage-1 checkpoint.
        device: Device of the model.
        texts: All texts of the manifest.
    """

    def __init__(self, checkpoint: str, device: str, texts: list[str]) -> None:
        self._retriever = load_retriever(local_folder(checkpoint), device=device)
        # Each actor embeds all texts itself: cheap compared with images, and it saves a pass over the data.
        parts = [
            self._retriever.embed_text(texts[start : start + _TEXTS_PER_PASS])
            for start in range(0, len(texts), _TEXTS_PER_PASS)
        ]
        self._text_embeds_TE = torch.cat(parts)
        self._num_truncated = self._retriever.tokenizer.encode(texts).num_truncated

    def __call__(self, block: pa.Table) -> pa.Table:
        """Compare the valid rows of one block."""
        batch = to_batch(block)
        num_texts = len(self._text_embeds_TE)
        similarity_IT = np.zeros((0, num_texts), dtype=np.float32)
        if batch.is_valid.any():
            pixels, is_frame = (torch.from_numpy(x[batch.is_valid]) for x in (batch.images, batch.frame_valid))
            embeds_INE, _ = self._retriever.embed_image(pixels, is_frame)
            similarity_IT = similarity(embeds_INE, self._text_embeds_TE).cpu().numpy()
        flat = pa.array(similarity_IT.ravel(), pa.float32())
        results = {
            SIMILARITY: pa.FixedSizeListArray.from_arrays(flat, num_texts),
            _NUM_TRUNCATED: pa.array([self._num_truncated] * len(similarity_IT), pa.int64()),
        }
        return result_table(batch, results)


class MatchBlocks:
    """Actor of the second pass: ITM probability of every image with its candidates.

    Args:
        checkpoint: Folder or URI of a stage-1 checkpoint.
        device: Device of the model.
        texts: All texts of the manifest.
        candidates: Indices of the texts to score, by sample id.
    """

    def __init__(
        self, checkpoint: str, device: str, texts: list[str], candidates: Mapping[str, NDArray[np.int32]]
    ) -> None:
        self._retriever = load_retriever(local_folder(checkpoint), device=device)
        self._device, self._texts, self._candidates = device, texts, candidates

    def __call__(self, block: pa.Table) -> pa.Table:
        """Match the valid rows of one block."""
        batch = to_batch(block)
        names = [name for name, valid in zip(batch.sample_ids, batch.is_valid, strict=True) if valid]
        found: list[NDArray[np.float32]] = []
        if names:
            pixels, is_frame_IF = (torch.from_numpy(x[batch.is_valid]) for x in (batch.images, batch.frame_valid))
            tokens_IFPV = self._retriever.encoder.features(pixels.to(self._device))
            found = [
                self._match(tokens_FPV, is_frame_F, self._candidates[name])
                for name, tokens_FPV, is_frame_F in zip(names, tokens_IFPV, is_frame_IF, strict=True)
            ]
        return result_table(
            batch,
            {
                TEXT_INDEX: pa.array([self._candidates[name] for name in names], pa.list_(pa.int32())),
                MATCH: pa.array(found, pa.list_(pa.float32())),
            },
        )

    def _match(
        self, tokens_FPV: torch.Tensor, is_frame_F: torch.Tensor, text_index: NDArray[np.int32]
    ) -> NDArray[np.float32]:
        parts = [np.zeros(0, dtype=np.float32)]
        for start in range(0, len(text_index), _TEXTS_PER_PASS):
            texts = [self._texts[index] for index in text_index[start : start + _TEXTS_PER_PASS]]
            tokens_BFPV = tokens_FPV[None].expand(len(texts), -1, -1, -1)
            is_frame_BF = is_frame_F[None].expand(len(texts), -1)
            parts.append(self._retriever.match(tokens_BFPV, texts, is_frame_BF).cpu().numpy())
        return np.concatenate(parts)


def retrieve(
    manifest: pa.Table,
    *,
    checkpoint: str,
    decode: DecodeSettings,
    batch_size: int,
    rerank_top_k: int,
    workers: int,
    decode_workers: int,
    use_gpu: bool,
) -> RetrievalResult:
    """Score all images and texts of `manifest` against each other.

    Args:
        manifest: Rows with unique sample ids and at least one caption each.
        checkpoint: Folder or URI of a stage-1 checkpoint.
        decode: Decode settings.
        batch_size: Images per pass.
        rerank_top_k: Candidates of each image and each text that ITM reranks; 0 ranks by ITC alone.
        workers: Number of model actors.
        decode_workers: Number of decode actors.
        use_gpu: Whether each model actor gets a GPU.
    """
    texts = [text for captions in manifest[schema.CAPTIONS].to_pylist() for text in captions]
    arguments: dict[str, Any] = {
        "checkpoint": checkpoint,
        "device": "cuda" if use_gpu else "cpu",
        "texts": texts,
    }

    def answer(rows: pa.Table, model: type, more: dict[str, Any]) -> tuple[pa.Table, list[Failure]]:
        datasets = evaluation_datasets(
            TableRows(rows), batch_size=batch_size, decode=decode, decode_workers=decode_workers
        )
        tables = map_blocks(datasets, model, arguments | more, workers=workers, use_gpu=use_gpu)
        return collect(tables, rows.num_rows)

    compared, failures = answer(manifest, CompareBlocks, {})
    galleries = build_galleries(manifest, _similarities(compared))
    if rerank_top_k > 0 and galleries:
        wanted = {name: index for gallery in galleries for name, index in gallery.candidates(rerank_top_k).items()}
        is_wanted = pa.array([name in wanted for name in manifest[schema.SAMPLE_ID].to_pylist()])
        matched, late_failures = answer(manifest.filter(is_wanted), MatchBlocks, {"candidates": wanted})
        failures += late_failures
        galleries = [gallery.reranked(_matches(matched), rerank_top_k) for gallery in galleries]
    num_truncated = max(compared[_NUM_TRUNCATED].to_pylist(), default=0)  # counts all texts; the same in every row
    return RetrievalResult(
        galleries={gallery.kind: gallery for gallery in galleries}, failures=failures, num_truncated=num_truncated
    )


def _similarities(compared: pa.Table) -> dict[str, NDArray[np.float32]]:
    names, rows = compared[schema.SAMPLE_ID].to_pylist(), compared[SIMILARITY].combine_chunks()
    similarity_IT = rows.flatten().to_numpy().reshape(len(names), -1 if names else 0)
    return dict(zip(names, similarity_IT, strict=True))


def _matches(matched: pa.Table) -> dict[str, tuple[NDArray[np.int32], NDArray[np.float32]]]:
    columns = (matched[name].to_numpy() for name in (TEXT_INDEX, MATCH))
    names = matched[schema.SAMPLE_ID].to_pylist()
    return {name: (index, match) for name, index, match in zip(names, *columns, strict=True)}
