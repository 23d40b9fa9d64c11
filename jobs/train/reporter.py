"""Records of a run that its first rank writes: metrics, events, starts, checkpoints, bad steps, quarantine."""

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
from jobs.settings.train import TrainSettings
from pipelines.data import storage
from pipelines.data.corpus import quarantine
from pipelines.data.corpus.manifest import write_table
from pipelines.data.corpus.quarantine import QUARANTINE_FILE
from pipelines.data.failures import Failure
from pipelines.training.records.accounting import Accounting
from pipelines.training.records.metrics_log import MetricsLog
from pipelines.training.run.checkpoint_writer import CheckpointWriter

_QUARANTINE_PAUSE_S = 60.0
"""Least seconds between two writes of the quarantine table, which is written whole and may be long."""
BAD_STEPS_FILE, EVENTS_FILE, STARTS_FILE = "bad_steps.jsonl", "events.jsonl", "starts.jsonl"
VALIDATION_QUARANTINE_FILE = "validation_quarantine.parquet"


class RunReporter:
    """Writes a run's records and sends messages to its user; used by the first rank alone.

    Args:
        status: Handle of an actor with the methods of `RunStatus`.
        settings: Settings of the run.
        start_step: Steps done before.

    Attributes:
        metrics_log: Log of the metrics.
        checkpoint_writer: Writer of the checkpoints.
    """

    def __init__(self, status: Any, settings: TrainSettings, start_step: int) -> None:
        self._status, self._output = status, settings.output
        self._lines: dict[str, list[str]] = {}
        self._lock = threading.Lock()
        self.metrics_log = MetricsLog(settings.output, status, start_step, self.log_event)
        self.checkpoint_writer = CheckpointWriter(
            settings.output, num_newest=settings.keep_checkpoints, warn=self.log_event
        )
        self._num_quarantined, self._quarantine_at_s = 0, -math.inf
        self._drop_redone_bad_steps(start_step)

    def log_event(self, text: str) -> None:
        """Send a message to the driver, and write it to events.jsonl."""
        self._status.post.remote(text)
        self._append(EVENTS_FILE, {"time": _now(), "text": text})

    def save_events(self, texts: Sequence[str]) -> None:
        """Write messages to events.jsonl that the driver printed before."""
        for text in texts:
            self._append(EVENTS_FILE, {"time": _now(), "text": text})

    def record_step(self, metrics: dict[str, float], accounting: Accounting) -> None:
        """Record a logged step's metrics, and the rows that were quarantined since the table was last written."""
        self.metrics_log.write(metrics)
        is_due = time.monotonic() - self._quarantine_at_s > _QUARANTINE_PAUSE_S
        if is_due and accounting.rows_quarantined > self._num_quarantined:
            self.write_quarantine(accounting)

    def record_bad_step(self, values: dict[str, Any]) -> None:
        """Write a skipped step to bad_steps.jsonl."""
        self._append(BAD_STEPS_FILE, values)

    def record_start(self, facts: dict[str, Any]) -> None:
        """Write a start of the workers to starts.jsonl: time, code, machine, and `facts` about the model."""
        self._append(STARTS_FILE, {"time": _now(), **asdict(current_environment()), **facts})

    def write_quarantine(self, accounting: Accounting) -> None:
        """Write the quarantine table; a failure is a warning, and the next write the next try."""
        self._num_quarantined, self._quarantine_at_s = accounting.rows_quarantined, time.monotonic()
        self._write_table(accounting.table(), QUARANTINE_FILE)

    def write_validation_quarantine(self, failures: Iterable[Failure]) -> None:
        """Write the quarantine table of the last validation."""
        self._write_table(quarantine.to_table(failures), VALIDATION_QUARANTINE_FILE)

    def _write_table(self, table: pa.Table, name: str) -> None:
        try:
            write_table(table, storage.join(self._output, name))
        except Exception as error:  # whatever a file system raises
            self.log_event(f"ALARM {name} is not written: {error}; the next checkpoint is the next try")

    def _append(self, name: str, values: dict[str, Any]) -> None:
        """Add a line to a file of the run folder; lines of earlier starts stay."""
        uri = storage.join(self._output, name)
        with self._lock:  # the threads of checkpoint writer and watchdog log events too
            self._write_line(uri, name, values)

    def _write_line(self, uri: str, name: str, values: dict[str, Any]) -> None:
        if name not in self._lines:
            earlier = storage.read_bytes(uri, 2**30).decode() if storage.exists(uri) else ""
            self._lines[name] = earlier.splitlines(keepends=True)
        self._lines[name].append(json.dumps(values) + "\n")
        try:
            storage.write_text(uri, "".join(self._lines[name]))
        except Exception as error:  # a full disk, an unreachable store: the next write includes this line
            self._status.post.remote(f"ALARM {name} is not written: {error}")

    def _drop_redone_bad_steps(self, start_step: int) -> None:
        """Drop the bad steps after the checkpoint of this start, which does those steps again."""
        uri = storage.join(self._output, BAD_STEPS_FILE)
        if not storage.exists(uri):
            return
        lines = storage.read_bytes(uri, 2**30).decode().splitlines()
        storage.write_text(uri, "".join(f"{line}\n" for line in lines if _step_of(line) < start_step))


def append_events(output: str, texts: Sequence[str]) -> None:
    """Add messages to events.jsonl of a run whose workers have ended; a failure is ignored.

    The driver's log holds the same messages.
    """
    if not texts:
        return
    uri = storage.join(output, EVENTS_FILE)
    lines = [json.dumps({"time": _now(), "text": text}) + "\n" for text in texts]
    with contextlib.suppress(Exception):  # whatever a file system raises must not hide the run's own result
        earlier = storage.read_bytes(uri, 2**30).decode() if storage.exists(uri) else ""
        storage.write_text(uri, earlier + "".join(lines))


def _step_of(line: str) -> float:
    """Step of a record; infinite where a crash cut the line short."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
