"""`qformer caption --manifest …`: captions of all rows of a manifest, or answers to its instructions; resumable."""

import hashlib
import json
import logging
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from jobs.cluster.session import ray_session
from jobs.data.shard_progress import ShardProgress
from jobs.evaluate.job import require_one_instruction
from jobs.folders.checkpoint import checkpoint_name, open_checkpoint
from jobs.folders.output import SETTINGS_FILE, SUMMARY_FILE, require_unused
from jobs.settings.evaluate import CaptionSettings
from jobs.settings.loading import resolved_yaml
from pipelines.data import schema, storage
from pipelines.data.batches.stage_report import WorkerPool
from pipelines.data.corpus import quarantine
from pipelines.data.corpus.manifest import read_manifest
from pipelines.data.corpus.quarantine import QUARANTINE_FILE
from pipelines.data.features.files import read_table, rows_file
from pipelines.data.features.shards import RETRYABLE_ERRORS, write_quarantine
from pipelines.data.media.samples import DecodeSettings
from pipelines.data.media.stage_costs import sum_costs
from pipelines.data.storage.checkpoint_folders import COMPLETE_MARKER
from pipelines.inference.decoding import decoding_of
from qformer.conversion.checkpoint import BridgeInfo
from qformer.errors import UserError
from qformer.generation.requests.request import RequestSettings

logger = logging.getLogger(__name__)

ORIGIN_FILE = "captions.json"
"""File with all that decides the texts; a folder with another content of it is an error."""
_MAX_JSON_BYTES = 2**20


def caption_corpus(settings: CaptionSettings) -> dict[str, Any]:
    """Write or complete shard-*.parquet (see `caption_shards.SHARD_SCHEMA`), quarantine.parquet and summary.json.

    Returns:
        The summary: checkpoint, rows_in, rows_used, rows_quarantined, texts_truncated, tokens, and under "stages" the
        costs of the new rows.

    Raises:
        UserError: If the folder holds other files or other texts, checkpoint or manifest cannot be used, or more rows
            are quarantined than `max_quarantine_share` allows; finished captions stay.
    """
    assert settings.manifest is not None and settings.output is not None, "CaptionSettings requires both"
    RequestSettings.of(settings.generation)  # refuses beam search before anything is loaded
    checkpoint, info = open_checkpoint(settings.checkpoint)
    manifest = read_manifest(settings.manifest, settings.split)
    require_one_instruction(manifest, "manifest")
    # The actors have other working directories.
    output = storage.local_path(settings.output) if storage.is_local(settings.output) else settings.output
    decode = decoding_of(info, settings.limits, num_frames=settings.num_frames)
    _claim(output, _origin(settings, checkpoint, info, decode))
    storage.write_text(storage.join(output, SETTINGS_FILE), resolved_yaml(settings))
    progress, num_shards = _caption_missing(settings, output, checkpoint, manifest, decode)
    quarantined = write_quarantine(output, num_shards)
    _require_few(len(quarantined), len(manifest), settings)
    sums = _sums(output, num_shards)
    print(quarantine.accounting_line(len(manifest), sums["rows_used"], sums["rows_quarantined"]))
    summary = {"checkpoint": checkpoint_name(checkpoint), **sums, "stages": progress.stages()}
    passing = pc.sum(pc.is_in(quarantined[schema.ERROR_CLASS], pa.array(RETRYABLE_ERRORS))).as_py() or 0
    if passing:
        logger.warning("%d rows failed for reasons that may pass; the same command tries them again", passing)
    if sums["texts_truncated"]:
        logger.warning("%d instructions cut to max_text_tokens=%d", sums["texts_truncated"], info.max_text_tokens)
    storage.write_text(storage.join(output, SUMMARY_FILE), json.dumps(summary, indent=2) + "\n")
    logger.info("next: read %s, for example with pyarrow.dataset", storage.join(settings.output, "shard-*.parquet"))
    return summary


def _origin(settings: CaptionSettings, checkpoint: str, info: BridgeInfo, decode: DecodeSettings) -> dict[str, Any]:
    """All that decides the texts besides the rows; the checkpoint by its content, not its path."""
    marker = storage.read_bytes(storage.join(checkpoint, COMPLETE_MARKER), _MAX_JSON_BYTES)
    return {
        "checkpoint": hashlib.sha256(marker + info.to_json().encode()).hexdigest(),
        "generation": settings.model_dump(mode="json")["generation"],
        "num_frames": decode.num_frames,
    }


def _claim(output: str, origin: dict[str, Any]) -> None:
    """Claim a new folder, or check that an old one has the same origin; remove its summary, which marks it finished."""
    path = storage.join(output, ORIGIN_FILE)
    if not storage.exists(path):
        require_unused(output, "output")
        storage.write_text(path, json.dumps(origin, indent=2) + "\n")
    found = json.loads(storage.read_bytes(path, _MAX_JSON_BYTES))
    if other := [key for key in origin if found.get(key) != origin[key]]:
        raise UserError(
            f"output={output} holds captions of another {' and '.join(other)} (see {ORIGIN_FILE}); choose another "
            "folder"
        )
    if storage.exists(summary := storage.join(output, SUMMARY_FILE)):
        storage.remove_file(summary)


def _caption_missing(
    settings: CaptionSettings, output: str, checkpoint: str, manifest: pa.Table, decode: DecodeSettings
) -> tuple[ShardProgress, int]:
    """Caption the missing shards; returns the progress and the number of shards."""
    with ray_session(settings.ray):
        # Imports Ray, whose environment the session sets first.
        from pipelines.data.dataset import write_shards
        from pipelines.evaluation.protocols.caption_shards import (
            CaptionShards,
            caption_blocks,
            is_shard_current,
            remove_other_shards,
        )
        from pipelines.training.records.data_metrics import DataMetrics

        shards = caption_blocks(manifest, decode, settings.instruction)
        remove_other_shards(output, len(shards))
        missing = [block for shard, block in enumerate(shards) if not is_shard_current(output, shard, block)]
        progress = ShardProgress("captioned", len(manifest), sum(map(len, missing)))
        if not missing:
            return progress, len(shards)
        arguments = {
            "checkpoint": checkpoint,
            "folder": output,
            "generation": settings.generation,
            **settings.engine.model_dump(),
        }
        pools: dict[str, Any] = {"decode_workers": settings.decode_workers, "workers": settings.workers}
        metrics = DataMetrics("caption")
        for done in write_shards(missing, CaptionShards, arguments, decode=decode, use_gpu=settings.use_gpu, **pools):
            progress.add(done)
            rows, failed = pc.sum(done["rows"]).as_py(), pc.sum(done["failed"]).as_py()
            metrics.count_batch(sum_costs(done), rows_used=rows - failed, rows_quarantined=failed)
            if _is_too_many(progress.num_failed, len(manifest), settings):
                break  # the job fails in any case
    decoding = WorkerPool(name="decode workers", setting="decode_workers", workers=settings.decode_workers, seconds={})
    captioning = WorkerPool(name="model workers", setting="workers", workers=settings.workers, seconds={})
    print(progress.table(decoding, captioning))
    return progress, len(shards)


def _sums(output: str, num_shards: int) -> dict[str, int]:
    """Totals over all shards, including those of earlier runs."""
    from pipelines.evaluation.protocols.caption_shards import IS_TRUNCATED, NUM_TOKENS

    columns = [schema.SAMPLE_ID, schema.ERROR_CLASS, NUM_TOKENS, IS_TRUNCATED]
    table = pa.concat_tables(
        read_table(storage.join(output, rows_file(shard))).select(columns) for shard in range(num_shards)
    )
    num_failed = len(table) - table[schema.ERROR_CLASS].null_count
    return {
        "rows_in": len(table),
        "rows_used": len(table) - num_failed,
        "rows_quarantined": num_failed,
        "texts_truncated": pc.sum(table[IS_TRUNCATED]).as_py() or 0,
        "tokens": pc.sum(table[NUM_TOKENS]).as_py() or 0,
    }


def _is_too_many(num_quarantined: int, num_rows: int, settings: CaptionSettings) -> bool:
    return num_quarantined > settings.max_quarantine_share * num_rows


def _require_few(num_quarantined: int, num_rows: int, settings: CaptionSettings) -> None:
    if _is_too_many(num_quarantined, num_rows, settings):
        raise UserError(
            f"{num_quarantined} of {num_rows} rows are quarantined, more than max_quarantine_share="
            f"{settings.max_quarantine_share:g} allows; see {storage.join(str(settings.output), QUARANTINE_FILE)}, "
            "fix them or raise the share, and run the same command again; finished captions stay"
        )
