"""What the first rank of `qformer train` writes down: log, events, checkpoints, bad steps, quarantine."""

import contextlib
import json
import math
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from jobs.cluster.environment import current_environment
from jobs.folders.output import QUARANTINE_FILE
from jobs.settings.jobs import TrainSettings
from pipelines.data import storage
from pipelines.data.batches.batch import Failure
from pipelines.data.corpus import quarantine
from pipelines.data.corpus.manifest import write_table
from pipelines.training.records.accounting import Accounting
from pipelines.training.records.telemetry import RunLog
from pipelines.training.run.checkpoint_writer import CheckpointWriter

_QUARANTINE_PAUSE_S = 60.0
"""Between two writings of the quarantine table: it is written whole, and may be long."""
BAD_STEPS_FILE, EVENTS_FILE, STARTS_FILE = "bad_steps.jsonl", "events.jsonl", "starts.jsonl"
VALIDATION_QUARANTINE_FILE = "validation_quarantine.parquet"


class Reporter:
    """Keeps a run's records and tells its user; used by the first rank alone.

    Args:
        board: `ProgressBoard` actor.
        settings: Of the run.
        start_step: Steps done before.
    """

    def __init__(self, board: Any, settings: TrainSettings, start_step: int) -> None:
        self._board, self._output = board, settings.output
        self._lines: dict[str, list[str]] = {}
        self._lock = threading.Lock()
        self.log = RunLog(settings.output, board, start_step, self.say)
        self.writer = CheckpointWriter(settings.output, keep=settings.keep_checkpoints, alarm=self.say)
        self._num_quarantined, self._quarantine_at_s = 0, -math.inf
        self._forget_bad_steps(start_step)

    def say(self, text: str) -> None:
        """Have the driver print a line, and keep it in events.jsonl."""
        self._board.say.remote(text)
        self._append(EVENTS_FILE, {"time": _now(), "text": text})

    def keep(self, texts: Sequence[str]) -> None:
        """Keep in events.jsonl what the driver has printed already."""
        for text in texts:
            self._append(EVENTS_FILE, {"time": _now(), "text": text})

    def logged(self, values: dict[str, float], accounting: Accounting) -> None:
        """Record a logged step's figures, and the rows that were quarantined since the table was last written."""
        self.log.write(values)
        is_due = time.monotonic() - self._quarantine_at_s > _QUARANTINE_PAUSE_S
        if is_due and accounting.rows_quarantined > self._num_quarantined:
            self.write_quarantine(accounting)

    def bad_step(self, values: dict[str, Any]) -> None:
        """Keep what became of a step that was left out."""
        self._append(BAD_STEPS_FILE, values)

    def started(self, facts: dict[str, Any]) -> None:
        """Keep with what code, on what machine and with what `facts` of the model the workers have started."""
        self._append(STARTS_FILE, {"time": _now(), **asdict(current_environment()), **facts})

    def write_quarantine(self, accounting: Accounting) -> None:
        """Write the quarantine table as it is now. Where there is no room for it, the next time is the next try."""
        self._num_quarantined, self._quarantine_at_s = accounting.rows_quarantined, time.monotonic()
        self._write_table(accounting.table(), QUARANTINE_FILE)

    def write_validation_quarantine(self, failures: Iterable[Failure]) -> None:
        """Write which rows of the evaluation set the last validation could not use."""
        self._write_table(quarantine.to_table(failures), VALIDATION_QUARANTINE_FILE)

    def _write_table(self, table: pa.Table, name: str) -> None:
        try:
            write_table(table, storage.join(self._output, name))
        except Exception as error:  # whatever a file system raises
            self.say(f"ALARM {name} is not written: {error}; the next checkpoint is the next try")

    def _append(self, name: str, values: dict[str, Any]) -> None:
        """Add a line to a file of the run folder, whose earlier lines, also of earlier starts, stay."""
        uri = storage.join(self._output, name)
        with self._lock:  # the checkpoint's thread and the watchdog's have something to say too
            self._write_line(uri, name, values)

    def _write_line(self, uri: str, name: str, values: dict[str, Any]) -> None:
        if name not in self._lines:
            earlier = storage.read_bytes(uri, 2**30).decode() if storage.exists(uri) else ""
            self._lines[name] = earlier.splitlines(keepends=True)
        self._lines[name].append(json.dumps(values) + "\n")
        try:
            storage.write_text(uri, "".join(self._lines[name]))
        except Exception as error:  # a full disk, a store that is away: the next line brings this one with it
            self._board.say.remote(f"ALARM {name} is not written: {error}")

    def _forget_bad_steps(self, start_step: int) -> None:
        """Drop bad steps after the checkpoint that this start goes on from: they are done again, and told again."""
        uri = storage.join(self._output, BAD_STEPS_FILE)
        if not storage.exists(uri):
            return
        kept = [line for line in storage.read_bytes(uri, 2**30).decode().splitlines() if _step_of(line) < start_step]
        storage.write_text(uri, "".join(f"{line}\n" for line in kept))


def keep_events(output: str, texts: Sequence[str]) -> None:
    """Add to the events of a run whose workers are gone. Where that cannot be done, they stand in the driver's log."""
    if not texts:
        return
    uri = storage.join(output, EVENTS_FILE)
    lines = [json.dumps({"time": _now(), "text": text}) + "\n" for text in texts]
    with contextlib.suppress(Exception):  # whatever a file system raises; the run's own end is what matters
        earlier = storage.read_bytes(uri, 2**30).decode() if storage.exists(uri) else ""
        storage.write_text(uri, earlier + "".join(lines))


def _step_of(line: str) -> float:
    """Step of a record; infinite where it was cut short as its writer died."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
