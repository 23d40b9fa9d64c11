"""What the first rank of `qformer train` writes down: log, events, checkpoints, bad steps, quarantine."""

import json
import threading
import time
from dataclasses import asdict
from typing import Any

from jobs.circumstances import circumstances
from jobs.run_folder import QUARANTINE_FILE
from jobs.settings import TrainSettings
from pipelines.data import storage
from pipelines.data.manifest import write_table
from pipelines.training.accounting import Accounting
from pipelines.training.checkpoint_writer import CheckpointWriter
from pipelines.training.telemetry import RunLog

BAD_STEPS_FILE, EVENTS_FILE, STARTS_FILE = "bad_steps.jsonl", "events.jsonl", "starts.jsonl"


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

    def say(self, text: str) -> None:
        """Have the driver print a line, and keep it in events.jsonl."""
        self._board.say.remote(text)
        self._append(EVENTS_FILE, {"time": _now(), "text": text})

    def bad_step(self, values: dict[str, Any]) -> None:
        """Keep what became of a step that was left out."""
        self._append(BAD_STEPS_FILE, values)

    def started(self, facts: dict[str, Any]) -> None:
        """Keep with what code, on what machine and with what `facts` of the model the workers have started."""
        self._append(STARTS_FILE, {"time": _now(), **asdict(circumstances()), **facts})

    def write_quarantine(self, accounting: Accounting) -> None:
        """Write the quarantine table as it is now. Where there is no room for it, the next time is the next try."""
        try:
            write_table(accounting.table(), storage.join(self._output, QUARANTINE_FILE))
        except Exception as error:  # whatever a file system raises
            self.say(f"ALARM {QUARANTINE_FILE} is not written: {error}; the next checkpoint is the next try")

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


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
