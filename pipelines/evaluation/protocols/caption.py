"""Captions of every row of a manifest, or answers to the rows' instructions, by a stage-2 checkpoint."""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch

from pipelines.data import schema
from pipelines.data.dataset import evaluation_datasets, map_blocks, to_batch
from pipelines.data.failures import Failure
from pipelines.data.media.samples import DecodeSettings
from pipelines.data.order.row_index import TableRows
from pipelines.data.storage.local_copies import local_folder
from pipelines.evaluation.protocols.row_results import collect, result_table
from pipelines.inference.decoding import waveforms_of
from pipelines.inference.models import load_captioner
from qformer.config import GenerationSettings

PREDICTION = "prediction"
REFERENCES = "references"
_IS_TRUNCATED = "is_truncated"


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionResult:
    """Result of captioning a manifest."""

    predictions: pa.Table
    """sample_id, kind, instruction, prediction, references (list of strings), in the manifest's order. The instruction
    is "" where the prompt of training was used."""
    failures: list[Failure]
    """Failures of the rows without a prediction."""
    num_truncated: int
    """Number of truncated instructions."""


class CaptionBlocks:
    """Actor that captions decoded blocks.

    Args:
        checkpoint: Folder or URI of a stage-2 checkpoint.
        device: Device of the model.
        generation: Generation settings.
    """

    def __init__(self, checkpoint: str, device: str, generation: GenerationSettings) -> None:
        self._captioner = load_captioner(local_folder(checkpoint), device=device)
        self._generation = generation

    def __call__(self, block: pa.Table) -> pa.Table:
        """Caption the valid rows of one block, or answer their instructions."""
        batch = to_batch(block)
        instructions = [text for text, valid in zip(batch.instructions, batch.is_valid, strict=True) if valid]
        captions: list[str] = []
        if batch.is_valid.any():
            pixels = torch.from_numpy(batch.images[batch.is_valid])
            frame_valid = torch.from_numpy(batch.frame_valid[batch.is_valid])
            captions = self._captioner.answer(
                pixels, instructions, self._generation, frame_valid=frame_valid, audio=waveforms_of(batch)
            )
        results = {schema.INSTRUCTION: instructions, PREDICTION: captions}
        columns = {name: pa.array(texts, pa.string()) for name, texts in results.items()}
        columns[_IS_TRUNCATED] = pa.array([self._captioner.num_truncated([t]) > 0 for t in instructions], pa.bool_())
        return result_table(batch, columns)


def caption_manifest(
    manifest: pa.Table,
    *,
    checkpoint: str,
    decode: DecodeSettings,
    batch_size: int,
    generation: GenerationSettings,
    workers: int,
    decode_workers: int,
    use_gpu: bool,
) -> CaptionResult:
    """Caption every row of `manifest` once.

    Args:
        manifest: Rows with unique sample ids.
        checkpoint: Folder or URI of a stage-2 checkpoint.
        decode: Decode settings.
        batch_size: Rows per pass.
        generation: Generation settings.
        workers: Number of model actors.
        decode_workers: Number of decode actors.
        use_gpu: Whether each model actor gets a GPU.
    """
    datasets = evaluation_datasets(
        TableRows(manifest), batch_size=batch_size, decode=decode, decode_workers=decode_workers
    )
    arguments: dict[str, Any] = {
        "checkpoint": checkpoint,
        "device": "cuda" if use_gpu else "cpu",
        "generation": generation,
    }
    tables = map_blocks(datasets, CaptionBlocks, arguments, workers=workers, use_gpu=use_gpu)
    results, failures = collect(tables, manifest.num_rows)
    found = {row[schema.SAMPLE_ID]: row for row in results.to_pylist()}
    used = manifest.filter(pa.array([name in found for name in manifest[schema.SAMPLE_ID].to_pylist()]))
    predictions = pa.table(
        {
            schema.SAMPLE_ID: used[schema.SAMPLE_ID],
            schema.KIND: used[schema.KIND],
            **{
                column: pa.array([found[name][column] for name in used[schema.SAMPLE_ID].to_pylist()], pa.string())
                for column in (schema.INSTRUCTION, PREDICTION)
            },
            REFERENCES: used[schema.CAPTIONS],
        }
    )
    assert used.num_rows + len(failures) == manifest.num_rows, "a row came back twice"
    num_truncated = sum(row[_IS_TRUNCATED] for row in found.values())
    return CaptionResult(predictions=predictions, failures=failures, num_truncated=num_truncated)
