"""`qformer features`: run the frozen vision and audio encoders once over a manifest and store their outputs."""

import json
import logging
import shutil
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from jobs.cluster.session import ray_session
from jobs.data.shard_progress import ShardProgress
from jobs.folders.backbones import with_absolute_name
from jobs.folders.output import SETTINGS_FILE, SUMMARY_FILE, require_unused
from jobs.settings.corpus import FeaturesSettings
from jobs.settings.loading import resolved_yaml
from pipelines.data import schema, storage
from pipelines.data.batches.stage_report import WorkerPool, format_bytes
from pipelines.data.corpus import quarantine
from pipelines.data.corpus.manifest import read_manifest
from pipelines.data.features.forecast import Forecast, forecast, measured_blocks
from pipelines.data.features.shards import (
    RETRYABLE_ERRORS,
    is_shard_finished,
    mark_unfinished,
    shard_blocks,
    write_index,
    write_quarantine,
)
from pipelines.data.features.spec import FeatureSpec, read_spec, write_spec
from pipelines.data.media.samples import DecodeSettings
from pipelines.data.media.stage_costs import sum_costs
from qformer.errors import UserError

if TYPE_CHECKING:
    from pipelines.data.features.shard_encoder import EncoderChoice

logger = logging.getLogger(__name__)


def main(settings: FeaturesSettings) -> dict[str, Any]:
    """Write or complete the cache, with settings.yaml and summary.json in the same folder.

    Returns:
        The summary: fingerprint, rows_in, rows_used, rows_quarantined, quarantine_rate, and under "stages" what the
        new rows took: seconds, how long the encoders waited (wait_s), and how many shards waited for them on average
        (queue_depth).

    Raises:
        UserError: If the folder holds something else or another encoder's features, the manifest cannot be read, or
            more rows are quarantined than `max_quarantine_share` allows; quarantine.parquet is written in any case.
    """
    data = settings.data
    manifest = read_manifest(data.manifest, data.split, needs_captions=False, kind=data.kind)
    # The actors run in other working directories.
    output = storage.local_path(settings.output) if storage.is_local(settings.output) else settings.output
    choice = _choice(settings)
    spec = choice.load()[1]
    decode = DecodeSettings(
        preprocessing=spec.preprocessing,
        num_frames=data.num_frames,
        sampling=choice.sampling,
        limits=data.limits,
        audio=spec.audio,
    )
    spec.require_decoding(decode)
    _claim_folder(output, spec)
    storage.write_text(storage.join(output, SETTINGS_FILE), resolved_yaml(settings))
    shards = shard_blocks(manifest, decode)
    missing = [block for shard, block in enumerate(shards) if not is_shard_finished(output, shard, block)]
    progress = ShardProgress("encoded", len(manifest), sum(map(len, missing)))
    try:
        if missing:
            mark_unfinished(output)
            _encode(settings, output, choice, spec, decode, missing, progress)
    finally:
        quarantined = write_quarantine(output, len(shards))
    _require_few(quarantined, len(manifest), settings)
    index = write_index(output, len(shards))
    failed = pc.sum(pc.is_valid(index[schema.ERROR_CLASS])).as_py() or 0
    print(quarantine.accounting_line(len(manifest), len(index) - failed, failed))
    num_retryable = pc.sum(pc.is_in(quarantined[schema.ERROR_CLASS], pa.array(RETRYABLE_ERRORS))).as_py() or 0
    if num_retryable:
        logger.warning("%d rows failed for transient reasons; the same command tries them again", num_retryable)
    summary = {
        "fingerprint": spec.fingerprint,
        "rows_in": len(index),
        "rows_used": len(index) - failed,
        "rows_quarantined": failed,
        "quarantine_rate": failed / len(index),
        "stages": progress.stages(),
    }
    storage.write_text(storage.join(output, SUMMARY_FILE), json.dumps(summary, indent=2) + "\n")
    logger.info("next: qformer train … --set data.features=%s", settings.output)
    return summary


def _require_few(quarantined: pa.Table, num_rows: int, settings: FeaturesSettings) -> None:
    if _is_too_many(len(quarantined), num_rows, settings):
        reasons = ", ".join(sorted(set(quarantined[schema.ERROR_CLASS].to_pylist())))
        table = storage.join(settings.output, quarantine.QUARANTINE_FILE)
        raise UserError(
            f"{len(quarantined)} of {num_rows} rows are quarantined ({reasons}), more than max_quarantine_share="
            f"{settings.max_quarantine_share:g} allows; see {table}, fix them or raise the share, "
            "and run the same command again: encoded rows are kept"
        )


def _is_too_many(num_quarantined: int, num_rows: int, settings: FeaturesSettings) -> bool:
    return num_quarantined > settings.max_quarantine_share * num_rows


def _choice(settings: FeaturesSettings) -> "EncoderChoice":
    from pipelines.data.features.shard_encoder import EncoderChoice

    return EncoderChoice(
        vision=with_absolute_name(settings.vision),
        precision=settings.precision,
        num_frames=settings.data.num_frames,
        sampling=settings.data.sampling,
        dtype=settings.dtype,
        audio=settings.audio and with_absolute_name(settings.audio),
        segments=settings.data.audio.build(),
    )


def _claim_folder(output: str, spec: FeatureSpec) -> None:
    """Write the spec into an unused folder, or check that the folder has the same spec."""
    found = read_spec(output)
    if found is None:
        require_unused(output, "output")
        write_spec(output, spec)
    else:
        spec.require_same(found)


def _encode(
    settings: FeaturesSettings,
    output: str,
    choice: "EncoderChoice",
    spec: FeatureSpec,
    decode: DecodeSettings,
    missing: list[pa.Table],
    progress: ShardProgress,
) -> None:
    """Forecast, write the missing shards, and print the time of each stage."""
    options: dict[str, Any] = {"choice": choice, "decode": decode, "frames_per_pass": settings.frames_per_pass}
    with ray_session(settings.ray):
        # Loads Ray, whose environment the session has to set first.
        from pipelines.data.dataset import encode_features, measure_features
        from pipelines.training.records.data_metrics import DataMetrics

        small = measured_blocks(missing)
        costs = measure_features(small, **options, use_gpu=settings.use_gpu) if small else []
        pools: dict[str, Any] = {"decode_workers": settings.decode_workers, "workers": settings.workers}
        _log_forecast(forecast(missing, spec, list(zip(small, costs, strict=True)), **pools), output)
        metrics = DataMetrics("features")
        progress.begin()
        for done in encode_features(missing, folder=output, **options, **pools, use_gpu=settings.use_gpu):
            progress.add(done)
            rows, failed = pc.sum(done["rows"]).as_py(), pc.sum(done["failed"]).as_py()
            metrics.count_batch(sum_costs(done), rows_used=rows - failed, rows_quarantined=failed)
            for wait_s in done["wait_s"].to_pylist():
                metrics.observe_wait(wait_s, queue_depth=progress.queue_depth)
            if _is_too_many(progress.num_failed, progress.num_rows, settings):
                break  # the job fails anyway
    decoding = WorkerPool(name="decode workers", setting="decode_workers", workers=settings.decode_workers, seconds={})
    encoding = WorkerPool(name="encoder workers", setting="workers", workers=settings.workers, seconds={})
    print(progress.table(decoding, encoding))


def _log_forecast(expected: Forecast, output: str) -> None:
    """Log the forecast, and warn if the disk is too small."""
    logger.info("%s, into %s", expected, output)
    if storage.is_local(output):
        free_bytes = shutil.disk_usage(output).free
        if expected.size_bytes > free_bytes:
            logger.warning("%s has only %s free", output, format_bytes(free_bytes))
