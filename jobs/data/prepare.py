"""`qformer prepare`: check every row of the sources; write a manifest of the usable ones and a quarantine table."""

import contextlib
import itertools
import json
import logging
import random
import tempfile
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from jobs.cluster.session import ray_session
from jobs.data.prepare_report import print_summary, show_progress
from jobs.folders.output import SETTINGS_FILE, SUMMARY_FILE, require_unused
from jobs.settings.corpus import PrepareSettings
from jobs.settings.loading import resolved_yaml
from pipelines.data import schema, storage
from pipelines.data.batches.stage_report import WorkerPool, stage_table
from pipelines.data.corpus import preparation, quarantine
from pipelines.data.corpus.duplicates import is_leak
from pipelines.data.corpus.manifest_files import manifest_files
from pipelines.data.corpus.name_set import NameSet
from pipelines.data.corpus.preparation import Preparation
from pipelines.data.corpus.sources.raw import Source
from pipelines.data.corpus.sources.source import SourceBlock, check_source, read_source
from pipelines.data.media.stage_costs import COST_COLUMNS, StageCosts, sum_costs
from qformer.errors import UserError

if TYPE_CHECKING:
    from pipelines.training.records.data_metrics import DataMetrics

logger = logging.getLogger(__name__)

_PROBED_RATE_HZ = 16_000
"""Any rate serves to check whether sound can be decoded."""

_SAMPLED_FROM_ROWS = 10_000
"""A dry run samples from this many first rows of each source; reading a large source to its end takes long."""


def main(settings: PrepareSettings) -> dict[str, Any]:
    """Run the job.

    Args:
        settings: Sources and output.

    Returns:
        The summary, as written to `summary.json`.

    Raises:
        UserError: If the output is in use or a source cannot be read. Bad media files raise nothing.
    """
    if settings.retry_quarantined:
        if settings.dry_run:
            raise UserError("retry_quarantined and dry_run exclude each other; give one of them")
        return _retry(settings)
    sources = _sources(settings)
    if settings.dry_run:
        with tempfile.TemporaryDirectory(prefix="qformer-dry-run-") as folder:
            summary = _prepare(settings, _sampled(sources, settings.dry_run), folder)
        _report(summary, settings)
        print(f"dry run: nothing was written; up to {settings.dry_run} rows of each source were checked")
        return summary
    require_unused(settings.output, "output")
    used_ids = NameSet()
    logger.info("checking %d sources", len(sources))
    blocks = itertools.chain.from_iterable(read_source(source, used_ids) for source in sources)
    summary = _prepare(settings, blocks, settings.output)
    _finish(summary, settings)
    return summary


def _sources(settings: PrepareSettings) -> list[Source]:
    """The sources with unique names."""
    sources: list[Source] = []
    for source in settings.sources:
        name = source.name or source.path.rstrip("/").rpartition("/")[2]
        if any(name == other.name for other in sources):
            if source.name:
                raise UserError(f"two sources have the name {name!r}; give each its own")
            name = f"{name}-{len(sources)}"
        sources.append(Source(**{**source.model_dump(), "name": name}))
        check_source(sources[-1])
    return sources


def _prepare(settings: PrepareSettings, blocks: Iterable[SourceBlock], output: str) -> dict[str, Any]:
    with contextlib.closing(Preparation()) as found, show_progress() as report_progress:

        def rows() -> Iterator[pa.Table]:
            for block in blocks:
                found.add_failures(block.failures)
                metrics.count_batch(StageCosts(), rows_used=0, rows_quarantined=len(block.failures))
                yield block.rows

        with ray_session(settings.ray):
            metrics = _metrics()
            for checked in _probe(rows(), settings, metrics):
                found.add(*checked)
                report_progress(found.num_rows, found.num_quarantined)
        duplicates = found.write(output, drop_leaks=settings.drop_training_duplicates)
    return _summary(output, duplicates, settings)


def _retry(settings: PrepareSettings) -> dict[str, Any]:
    """Try the quarantined files of an earlier run again."""
    output = settings.output
    if not manifest_files(output) or not storage.exists(storage.join(output, preparation.QUARANTINED_ROWS_FILE)):
        raise UserError(f"output={output} holds no prepared manifest; run prepare without --retry-quarantined first")
    tries: dict[str, int] = {}
    with contextlib.closing(Preparation()) as found, show_progress() as report_progress:

        def rows() -> Iterator[pa.Table]:
            for block, counts in preparation.quarantined_rows(output):
                tries.update(zip(block[schema.SAMPLE_ID].to_pylist(), counts, strict=True))
                yield block

        with ray_session(settings.ray):
            for block, checked in _probe(rows(), settings, _metrics()):
                earlier = [tries.pop(name) for name in block[schema.SAMPLE_ID].to_pylist()]
                found.add(block, preparation.add_tries(checked, earlier))
                report_progress(found.num_rows, found.num_quarantined)
        num_tried, num_fixed = found.num_rows, found.num_rows - found.num_quarantined
        unread = preparation.failures_before_reading(output)
        found.add_failures(unread)
        duplicates = found.append(output, drop_leaks=settings.drop_training_duplicates)
    summary = _summary(output, duplicates, settings)
    _finish(summary, settings)
    print(
        f"tried {num_tried} quarantined rows again: {num_fixed} can be used now; "
        f"{len(unread)} more are wrong in their source, not in their files: correct it and prepare again"
    )
    return summary


def _metrics() -> "DataMetrics":
    # Loads Ray, whose environment the session has to set first.
    from pipelines.training.records.data_metrics import DataMetrics

    return DataMetrics("prepare")


def _probe(
    rows: Iterable[pa.Table], settings: PrepareSettings, metrics: "DataMetrics"
) -> Iterator[tuple[pa.Table, pa.Table]]:
    # Loads Ray, whose environment the session has to set first, and so that settings errors are reported sooner.
    from jobs.data.prepare_probe import probe

    costs, num_rows, begun_s = StageCosts(), 0, time.monotonic()
    for block, checked in probe(
        rows,
        num_frames=settings.num_frames,
        audio=settings.audio.build().at(_PROBED_RATE_HZ) if settings.audio else None,
        limits=settings.limits,
        decode_workers=settings.decode_workers,
    ):
        block_costs, num_failed = sum_costs(checked), len(checked) - checked[schema.STAGE].null_count
        metrics.count_batch(block_costs, rows_used=len(checked) - num_failed, rows_quarantined=num_failed)
        costs.add(block_costs)
        num_rows += len(block)
        yield block, checked.drop_columns(list(COST_COLUMNS))
    workers, wall_s = settings.decode_workers, time.monotonic() - begun_s
    pool = WorkerPool(name="decode workers", setting="decode_workers", workers=workers, seconds=costs.seconds())
    print(stage_table([pool], wall_s=wall_s, rows=num_rows, fetched_bytes=costs.fetched_bytes))


def _sampled(sources: list[Source], count: int) -> Iterator[SourceBlock]:
    """A random sample of the first rows of each source, with the failures among them."""
    rng = random.Random(0)  # noqa: S311 - the same rows each time
    used_ids = NameSet()
    for source in sources:
        tables, failures, num_read = [schema.MANIFEST_SCHEMA.empty_table()], [], 0
        for block in read_source(source, used_ids):
            tables.append(block.rows)
            failures += block.failures
            num_read += len(block.rows)
            if num_read >= max(_SAMPLED_FROM_ROWS, count):
                break
        rows = pa.concat_tables(tables)
        chosen = sorted(rng.sample(range(len(rows)), min(count, len(rows))))
        logger.info("%s: %d of the first %d rows", source.name, len(chosen), num_read + len(failures))
        yield SourceBlock(rows.take(pa.array(chosen, pa.int64())), failures)


def _summary(output: str, duplicates: pa.Table, settings: PrepareSettings) -> dict[str, Any]:
    leaks = pa.array(is_leak(duplicates), pa.bool_())
    within = duplicates.filter(pc.invert(leaks))[schema.SPLIT]
    return {
        **preparation.count_corpus(output).to_dict(),
        "duplicates_within_split": {row["values"]: row["counts"] for row in pc.value_counts(within).to_pylist()},
        "training_rows_in_evaluation": pc.sum(leaks).as_py() or 0,
        "training_duplicates_dropped": settings.drop_training_duplicates,
    }


def _finish(summary: dict[str, Any], settings: PrepareSettings) -> None:
    output = settings.output
    storage.write_text(storage.join(output, SETTINGS_FILE), resolved_yaml(settings))
    storage.write_text(storage.join(output, SUMMARY_FILE), json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    _report(summary, settings)


def _report(summary: dict[str, Any], settings: PrepareSettings) -> None:
    print_summary(summary)
    rows_in, used, quarantined = (summary[f"rows_{name}"] for name in ("in", "used", "quarantined"))
    if quarantined > settings.max_quarantine_share * max(1, rows_in):
        logger.warning(
            "%.1f %% of the rows are quarantined, more than max_quarantine_share allows training (%.1f %%); see %s",
            100 * quarantined / rows_in,
            100 * settings.max_quarantine_share,
            storage.join(settings.output, quarantine.QUARANTINE_FILE),
        )
    if summary["training_rows_in_evaluation"] and not summary["training_duplicates_dropped"]:
        logger.warning(
            "%d training rows show the same bytes as evaluation rows, so that scores will be too good: see %s, or set "
            "drop_training_duplicates=true",
            summary["training_rows_in_evaluation"],
            storage.join(settings.output, preparation.DUPLICATES_FILE),
        )
    print(quarantine.accounting_line(rows_in, used, quarantined))
