"""Score a checkpoint on a split: retrieval after stage 1, captions after stage 2."""

import json
import logging
from typing import Any

import pyarrow as pa

from jobs.cluster.session import ray_session
from jobs.folders.checkpoint import checkpoint_name, open_checkpoint
from jobs.folders.output import SETTINGS_FILE, SUMMARY_FILE, require_unused
from jobs.settings.data import DataSettings
from jobs.settings.evaluate import EvaluateSettings
from jobs.settings.loading import resolved_yaml
from pipelines.data import schema, storage
from pipelines.data.corpus import quarantine
from pipelines.data.corpus.manifest import read_manifest, write_table
from pipelines.data.failures import Failure
from pipelines.data.media.samples import DecodeSettings
from pipelines.inference.decoding import decoding_of
from qformer.conversion.checkpoint import BridgeInfo
from qformer.errors import UserError

logger = logging.getLogger(__name__)

TOP_TEXTS = 5
"""Number of texts per image in retrieval.parquet."""


def main(settings: EvaluateSettings) -> dict[str, Any]:
    """Evaluate, and write into `output`: settings.yaml, the results, quarantine.parquet and summary.json.

    Stage 1 writes retrieval.json (recall by kind) and retrieval.parquet (one row an image); stage 2 writes
    predictions.parquet (sample_id, kind, instruction, prediction, references).

    Returns:
        The summary: stage, checkpoint, rows_in, rows_used, rows_quarantined, texts_truncated (to the checkpoint's
        max_text_tokens), and "retrieval" after stage 1.

    Raises:
        UserError: If the output folder is in use, or checkpoint or manifest cannot be read.
    """
    require_unused(settings.output, "output")
    checkpoint, info = open_checkpoint(settings.checkpoint)
    data = settings.data
    manifest = read_manifest(data.manifest, data.split, needs_captions=info.stage == 1, kind=data.kind)
    storage.write_text(storage.join(settings.output, SETTINGS_FILE), resolved_yaml(settings))
    with ray_session(settings.ray):
        # The session sets Ray's environment, which must precede the import of Ray Data.
        failures, more = (_retrieve if info.stage == 1 else _caption)(settings, checkpoint, info, manifest)
    if more["texts_truncated"]:
        logger.warning("%d texts cut to max_text_tokens=%d", more["texts_truncated"], info.max_text_tokens)
    write_table(quarantine.to_table(failures), storage.join(settings.output, quarantine.QUARANTINE_FILE))
    line = quarantine.accounting_line(manifest.num_rows, manifest.num_rows - len(failures), len(failures))
    summary = {
        "stage": info.stage,
        "checkpoint": checkpoint_name(checkpoint),
        "split": settings.data.split,
        "rows_in": manifest.num_rows,
        "rows_used": manifest.num_rows - len(failures),
        "rows_quarantined": len(failures),
        "accounting": line,
        **more,
    }
    storage.write_text(storage.join(settings.output, SUMMARY_FILE), json.dumps(summary, indent=2) + "\n")
    print(line)
    return summary


def decode_settings(data: DataSettings, info: BridgeInfo) -> DecodeSettings:
    """Decode settings of training, overridden by the user's settings of frames, sampling and segments.

    Raises:
        UserError: If the settings contradict the checkpoint (`decoding_of`).
    """
    chosen = data.model_fields_set
    return decoding_of(
        info,
        data.limits,
        num_frames=data.num_frames if "num_frames" in chosen else None,
        sampling=data.sampling if "sampling" in chosen else None,
        segments=data.audio.model_dump(exclude_unset=True),
    )


def _caption(
    settings: EvaluateSettings, checkpoint: str, info: BridgeInfo, manifest: pa.Table
) -> tuple[list[Failure], dict[str, Any]]:
    from pipelines.evaluation.protocols.caption import caption_manifest

    require_one_instruction(manifest, "data.manifest")
    result = caption_manifest(
        manifest,
        checkpoint=checkpoint,
        decode=decode_settings(settings.data, info),
        batch_size=settings.batch_size,
        generation=settings.generation,
        workers=settings.workers,
        decode_workers=settings.decode_workers,
        use_gpu=settings.use_gpu,
    )
    write_table(result.predictions, storage.join(settings.output, "predictions.parquet"))
    return result.failures, {"texts_truncated": result.num_truncated}


def require_one_instruction(manifest: pa.Table, setting: str) -> None:
    """Check that each row asks a single question, because a row gets a single answer.

    Args:
        manifest: Rows to check.
        setting: Name of the setting that holds the manifest, for the message.

    Raises:
        UserError: If a row asks several questions.
    """
    columns = (manifest[name].to_pylist() for name in (schema.SAMPLE_ID, schema.INSTRUCTIONS))
    several = [(name, texts) for name, texts in zip(*columns, strict=True) if len(set(texts)) > 1]
    if several:
        name, texts = several[0]
        raise UserError(
            f"{setting}: {len(several)} rows ask more than one question, first {name!r} with {len(texts)}; "
            "write a row for each question, with a sample_id of its own"
        )


def _retrieve(
    settings: EvaluateSettings, checkpoint: str, info: BridgeInfo, manifest: pa.Table
) -> tuple[list[Failure], dict[str, Any]]:
    from pipelines.evaluation.protocols.retrieval import retrieve

    result = retrieve(
        manifest,
        checkpoint=checkpoint,
        decode=decode_settings(settings.data, info),
        batch_size=settings.batch_size,
        rerank_top_k=settings.rerank_top_k,
        workers=settings.workers,
        decode_workers=settings.decode_workers,
        use_gpu=settings.use_gpu,
    )
    kinds = {kind: gallery.metrics() for kind, gallery in result.galleries.items()}
    metrics = {"rerank_top_k": settings.rerank_top_k, "kinds": kinds}
    storage.write_text(storage.join(settings.output, "retrieval.json"), json.dumps(metrics, indent=2) + "\n")
    rows = [row for gallery in result.galleries.values() for row in gallery.examples(TOP_TEXTS)]
    write_table(pa.Table.from_pylist(rows), storage.join(settings.output, "retrieval.parquet"))
    for kind, found in kinds.items():
        logger.info("%s: %s", kind, json.dumps(found))
    return result.failures, {"texts_truncated": result.num_truncated, "retrieval": metrics}
