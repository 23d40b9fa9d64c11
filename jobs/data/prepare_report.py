"""Console output of `qformer prepare`: progress and summary."""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

logger = logging.getLogger(__name__)

_LOG_EVERY_S = 10.0
_MAX_WIDTH = 110
_MAX_NAMES = 8
"""Largest number of codecs or sources in one cell."""


@contextlib.contextmanager
def show_progress() -> Iterator[Callable[[int, int], None]]:
    """Show progress: a live line on a terminal, otherwise a log line every few seconds.

    Yields:
        A function to call with the total numbers of rows checked and quarantined.
    """
    if not sys.stderr.isatty():
        yield _LogProgress()
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    # Progress goes to standard error, so that standard output stays clean for scripts.
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("reading sources")
        start_s = time.monotonic()

        def report(num_rows: int, num_quarantined: int) -> None:
            rate = num_rows / max(1e-3, time.monotonic() - start_s)
            text = f"{num_rows:,} rows checked ({rate:,.0f}/s), {num_quarantined:,} quarantined"
            progress.update(task, description=text)

        yield report


class _LogProgress:
    """Logs progress every few seconds."""

    def __init__(self) -> None:
        self._logged_at_s = time.monotonic()

    def __call__(self, num_rows: int, num_quarantined: int) -> None:
        if time.monotonic() - self._logged_at_s > _LOG_EVERY_S:
            self._logged_at_s = time.monotonic()
            logger.info("checked %d rows, %d quarantined", num_rows, num_quarantined)


def print_summary(summary: dict[str, Any]) -> None:
    """Print a prepared corpus as a table."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal or console.width > _MAX_WIDTH:
        console = Console(width=_MAX_WIDTH)
    table = Table(show_header=False, highlight=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _lines(summary):
        table.add_row(name, value)
    console.print(table)


def _lines(summary: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield (
        "rows",
        f"{summary['rows_in']:,} = {summary['rows_used']:,} used + {summary['rows_quarantined']:,} quarantined",
    )
    for key in ("kind", "split", "source"):
        yield f"by {key}", _counts(summary[f"used_by_{key}"])
    if summary["rows_quarantined"]:
        yield "quarantined", _counts(summary["quarantined_by_error"])
    yield "captions", f"{summary['captions']:,}; {summary['rows_without_captions']:,} rows without"
    if summary["captions"]:
        yield "caption words", _histogram(summary["caption_words"])
    for kind, files in summary["files"].items():
        yield f"{kind}: codec", _counts(files["codecs"])
        yield f"{kind}: size", _spreads(files, (("width", ""), ("height", "")))
        if "duration_s" in files:
            yield f"{kind}: time", _spreads(files, (("duration_s", " s"), ("fps", "")))
        more = [f"{files[key]:,} {key.replace('_', ' ')}" for key in ("rotated", "with_sound") if files[key]]
        if more:
            yield f"{kind}: also", ", ".join(more)
    for split, count in summary["duplicates_within_split"].items():
        yield f"duplicates: {split}", f"{count:,} rows with the same bytes as another file of the split"
    if summary["training_rows_in_evaluation"]:
        fate = "dropped from training" if summary["training_duplicates_dropped"] else "STILL IN TRAINING"
        yield "LEAK", f"{summary['training_rows_in_evaluation']:,} training rows show what evaluation shows: {fate}"


def _counts(counts: dict[str, int]) -> str:
    shown = [f"{name} {count:,}" for name, count in list(counts.items())[:_MAX_NAMES]]
    rest = sum(list(counts.values())[_MAX_NAMES:])
    return ", ".join([*shown, *([f"others {rest:,}"] if rest else [])]) or "none"


def _histogram(counts: dict[str, int]) -> str:
    most = max(counts.values())
    blocks = " ▁▂▃▄▅▆▇█"
    bars = "".join(blocks[-(-8 * count // most)] for count in counts.values())
    return f"{bars}  " + ", ".join(f"{label}: {count:,}" for label, count in counts.items() if count)


def _spreads(files: dict[str, Any], names: tuple[tuple[str, str], ...]) -> str:
    parts = []
    for name, unit in names:
        if spread := files.get(name):
            label = name.removesuffix("_s")
            parts.append(f"{label} {spread['min']:g} to {spread['max']:g}{unit} (median {spread['median']:g})")
    return "; ".join(parts)
