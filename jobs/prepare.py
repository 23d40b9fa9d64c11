"""`qformer prepare`: check every row of the sources; write a manifest of the usable ones and a quarantine table."""

import collections
import json
import logging
import sys
import time
from typing import Any

import pyarrow as pa

from jobs.cluster_session import ray_session
from jobs.settings import PrepareSettings
from jobs.settings_loading import resolved_yaml
from pipelines.data import quarantine, schema, storage
from pipelines.data.manifest import MANIFEST_FILE, read_source, write_table
from pipelines.data.samples import Limits
from pipelines.data.stage_costs import StageCosts
from pipelines.data.stage_report import Pool, stage_table

logger = logging.getLogger(__name__)

QUARANTINE_FILE = "quarantine.parquet"
SUMMARY_FILE = "summary.json"
SETTINGS_FILE = "settings.yaml"
_PROGRESS_EVERY_S = 5.0


def main(settings: PrepareSettings) -> dict[str, Any]:
    """Run the job.

    Args:
        settings: Sources and output.

    Returns:
        The summary, as written to `summary.json`.

    Raises:
        UserError: If the output is in use or a source cannot be read. Bad media files raise nothing.
    """
    storage.require_unused(settings.output, "output")
    rows = pa.concat_tables([read_source(**source.model_dump()) for source in settings.sources])
    logger.info("checking %d rows of %d sources", len(rows), len(settings.sources))
    with ray_session(settings.ray):
        used, quarantined = _probe(rows, settings)
    summary = _summary(rows, used, quarantined)
    storage.write_text(storage.join(settings.output, SETTINGS_FILE), resolved_yaml(settings))
    write_table(used, storage.join(settings.output, MANIFEST_FILE))
    write_table(quarantined, storage.join(settings.output, QUARANTINE_FILE))
    storage.write_text(storage.join(settings.output, SUMMARY_FILE), json.dumps(summary, indent=2) + "\n")
    share = len(quarantined) / max(1, len(rows))
    if share > settings.max_quarantine_share:
        logger.warning(
            "%.1f %% of the rows are quarantined, more than max_quarantine_share allows training (%.1f %%); see %s",
            100 * share,
            100 * settings.max_quarantine_share,
            storage.join(settings.output, QUARANTINE_FILE),
        )
    print(quarantine.accounting_line(len(rows), len(used), len(quarantined)))
    return summary


def _probe(rows: pa.Table, settings: PrepareSettings) -> tuple[pa.Table, pa.Table]:
    # Loads Ray, whose environment the session has to set first; and mistakes in the settings are told sooner.
    from pipelines.data.dataset import probe

    begun_s = told_at_s = time.monotonic()
    costs = StageCosts()

    def tell(done: int, total: int, failed: int) -> None:
        nonlocal told_at_s
        if done == total or time.monotonic() - told_at_s > _PROGRESS_EVERY_S:
            told_at_s = time.monotonic()
            logger.info("checked %d of %d rows, %d quarantined", done, total, failed)

    used, quarantined = probe(
        rows,
        num_frames=settings.num_frames,
        limits=Limits(**settings.limits.model_dump()),
        decode_workers=settings.decode_workers,
        on_progress=tell,
        on_costs=costs.add,
    )
    workers, seconds = settings.decode_workers, costs.seconds()
    pool = Pool(name="decode workers", setting="decode_workers", workers=workers, seconds=seconds)
    wall_s = time.monotonic() - begun_s
    print(stage_table([pool], wall_s=wall_s, rows=len(rows), fetched_bytes=costs.fetched_bytes))
    return used, quarantined


def _summary(rows: pa.Table, used: pa.Table, quarantined: pa.Table) -> dict[str, Any]:
    return {
        "rows_in": len(rows),
        "rows_used": len(used),
        "rows_quarantined": len(quarantined),
        "used_by_kind": dict(collections.Counter(used[schema.KIND].to_pylist())),
        "used_by_split": dict(collections.Counter(used[schema.SPLIT].to_pylist())),
        "quarantined_by_error": dict(collections.Counter(quarantined[schema.ERROR_CLASS].to_pylist())),
    }


if __name__ == "__main__":
    from jobs.cli import run_job

    sys.exit(run_job("prepare"))
