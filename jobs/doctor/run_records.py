"""Records of a training run, as far as they exist."""

import collections
import json
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from jobs.folders.output import SETTINGS_FILE, SUMMARY_FILE
from jobs.settings.loading import load_saved
from jobs.settings.train import TrainSettings
from jobs.train.reporter import BAD_STEPS_FILE, EVENTS_FILE, STARTS_FILE
from pipelines.data import schema, storage
from pipelines.data.corpus.quarantine import QUARANTINE_FILE
from pipelines.evaluation.doctor.weights import Trainables
from pipelines.training.group.watchdog import STACKS_FOLDER
from pipelines.training.records.metrics_log import METRICS_FILE
from pipelines.training.step.validation import BEST_FILE

_MAX_BYTES = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecords:
    """Content of a run folder; None for a file that is missing or unreadable."""

    settings: TrainSettings | None
    metrics: list[dict[str, Any]] | None
    starts: list[dict[str, Any]] | None
    events: list[dict[str, Any]] | None
    bad_steps: list[dict[str, Any]] | None
    summary: dict[str, Any] | None
    best: dict[str, Any] | None
    quarantined: collections.Counter[str] | None
    """Rows of the quarantine table by error class."""
    num_stacks: int
    """Number of stack files that the watchdog wrote."""

    @property
    def trainables(self) -> list[Trainables]:
        """Trainables of each start that recorded them; else those of the summary."""
        found = [_trainables(start.get("trainable"), "names", "parameters") for start in self.starts or []]
        known = [one for one in found if one is not None]
        last = _trainables(self.summary, "trainable_names", "trainable_parameters")
        return known or ([] if last is None else [last])

    @property
    def frozen_sha256(self) -> list[dict[str, str]]:
        """Digests of the frozen models, for each start that recorded them and for the summary."""
        found = [one.get("frozen_sha256") for one in [*(self.starts or []), self.summary or {}]]
        return [one for one in found if isinstance(one, dict) and one]

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weight of each loss term; empty if the settings are unknown."""
        if self.settings is None:
            return {}
        return self.settings.optim.loss_weights.by_name()


def read_records(run: str) -> RunRecords:
    """Read a run folder."""
    stacks = storage.join(run, STACKS_FOLDER)
    return RunRecords(
        settings=_settings(run),
        metrics=_lines(run, METRICS_FILE),
        starts=_lines(run, STARTS_FILE),
        events=_lines(run, EVENTS_FILE),
        bad_steps=_lines(run, BAD_STEPS_FILE),
        summary=_json(run, SUMMARY_FILE),
        best=_json(run, BEST_FILE),
        quarantined=_quarantined(run),
        num_stacks=len(storage.folder_names(stacks)),
    )


def _trainables(values: Any, names: str, parameters: str) -> Trainables | None:
    if not isinstance(values, dict) or names not in values or parameters not in values:
        return None
    return Trainables(names=list(values[names]), parameters=int(values[parameters]))


def _read(run: str, name: str) -> str | None:
    uri = storage.join(run, name)
    try:
        return storage.read_bytes(uri, _MAX_BYTES).decode() if storage.exists(uri) else None
    except (OSError, UnicodeDecodeError):
        return None


def _lines(run: str, name: str) -> list[dict[str, Any]] | None:
    """Records of a file, without incomplete lines (of a run that is going on or was killed)."""
    text = _read(run, name)
    found = None if text is None else [_parsed(line) for line in text.splitlines()]
    return None if found is None else [one for one in found if one is not None]


def _json(run: str, name: str) -> dict[str, Any] | None:
    text = _read(run, name)
    return None if text is None else _parsed(text)


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _settings(run: str) -> TrainSettings | None:
    text = _read(run, SETTINGS_FILE)
    return None if text is None else load_saved(TrainSettings, text)


def _quarantined(run: str) -> collections.Counter[str] | None:
    uri = storage.join(run, QUARANTINE_FILE)
    try:
        if not storage.exists(uri):
            return None
        with storage.open_input(uri) as file:
            return collections.Counter(pq.read_table(file)[schema.ERROR_CLASS].to_pylist())
    except (OSError, ValueError, KeyError):  # pyarrow's own errors are ValueErrors and OSErrors
        return None
