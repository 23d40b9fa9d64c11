"""`qformer doctor RUN`: checks whether the model uses its images, and whether the run is healthy."""

import json
import logging
import pickle
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from jobs.doctor.model import frozen_now, pair_findings
from jobs.doctor.report import show
from jobs.doctor.run_records import RunRecords, read_records
from jobs.settings.evaluate import DoctorSettings
from pipelines.data import storage
from pipelines.data.storage import checkpoint_folders
from pipelines.data.storage.local_copies import local_folder
from pipelines.evaluation.doctor import log as log_findings
from pipelines.evaluation.doctor import run as run_findings
from pipelines.evaluation.doctor import weights as weight_findings
from pipelines.evaluation.doctor.findings import Finding, worst
from pipelines.evaluation.doctor.weights import Weights
from pipelines.training.run.checkpoint import TRAINING_FILE
from qformer.conversion.checkpoint import read_info, read_weights
from qformer.errors import UserError

DOCTOR_FILE = "doctor.json"
EXIT_PROBLEM = 1

logger = logging.getLogger(__name__)


def main(settings: DoctorSettings) -> int:
    """Check a run, print the findings and write them to doctor.json.

    Returns:
        The exit code: 0, or 1 if a finding is a problem.

    Raises:
        UserError: If there is no such run, or the rows that the user chose cannot be read.
    """
    findings = examine(settings)
    show(findings, settings.run)
    values: dict[str, Any] = {
        "run": settings.run,
        "status": worst(finding.status for finding in findings),
        "findings": [asdict(finding) for finding in findings],
    }
    file = storage.join(settings.output or settings.run, DOCTOR_FILE)
    try:
        storage.write_text(file, json.dumps(values, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"output: {file} cannot be written ({error}); choose another folder with output") from error
    return EXIT_PROBLEM if values["status"] == "problem" else 0


def examine(settings: DoctorSettings) -> list[Finding]:
    """All findings of a run, the most important checks first.

    Raises:
        UserError: If there is no such run, or the rows that the user chose cannot be read.
    """
    run = settings.run
    if not storage.exists(run):
        raise UserError(f"run={run} does not exist; give the folder of a `qformer train` run")
    records, finished = read_records(run), checkpoint_folders.finished_checkpoints(run)
    if not finished and records.settings is None and records.metrics is None:
        raise UserError(f"run={run} holds no training run; give the folder that `qformer train` wrote (its output)")
    folders = {uri: local_folder(uri) for uri in finished}
    damaged = {uri: why for uri, folder in folders.items() if (why := checkpoint_folders.damage(folder)) is not None}
    whole = [uri for uri in finished if uri not in damaged]
    newest = folders[whole[0]] if whole else None
    steps_done = checkpoint_folders.step_of(whole[0]) if whole else 0
    rows = _row_counts(records, newest)
    findings = [] if newest is None else [*pair_findings(settings, records, newest)]
    findings += _log_findings(records)
    findings += _weight_findings(records, [folders[uri] for uri in reversed(whole)])
    findings += [
        run_findings.checkpoints(
            [_name(uri) for uri in finished],
            {_name(uri): why for uri, why in damaged.items()},
            steps_done,
            _expected_steps(records),
        ),
        run_findings.quarantine(
            rows, records.quarantined, records.settings.max_quarantine_share if records.settings else None
        ),
        run_findings.restarts(records.starts),
        run_findings.alarms(records.events, records.num_stacks),
    ]
    best = run_findings.validation(records.best, steps_done)
    return findings if best is None else [*findings, best]


def _log_findings(records: RunRecords) -> list[Finding]:
    metrics, settings = records.metrics or [], records.settings
    stages = (records.summary or {}).get("stages") or {}
    return [
        log_findings.data_wait(
            metrics,
            has_features=bool(settings and settings.data.features),
            decode_workers=settings.decode_workers if settings else None,
            queue_depth=stages.get("queue_depth"),
        ),
        *log_findings.losses(metrics, records.loss_weights),
        *log_findings.steps(metrics, records.bad_steps or [], settings.precision if settings else None),
    ]


def _weight_findings(records: RunRecords, checkpoints: Sequence[Path]) -> list[Finding]:
    """Findings about trained and frozen weights.

    Args:
        records: Records of the run.
        checkpoints: Intact checkpoints, the oldest first.
    """
    starts, settings = records.trainables, records.settings
    # Checkpoints in between add only the time of a change, and may be large.
    own = [_weights(folder) for folder in dict.fromkeys([*checkpoints[:1], *checkpoints[-1:]])]
    initial = _initial_weights(settings.init_from) if settings and settings.init_from else []
    recorded = records.frozen_sha256
    now: dict[str, list[str] | str] = {}
    if checkpoints and recorded:
        precision = settings.precision if settings else None
        now = frozen_now(read_info(checkpoints[-1]), own[-1].tensors, recorded[-1], precision)
    return [
        weight_findings.trainables(starts, own[-1] if own else None),
        weight_findings.unchanged_trainables(starts, own),
        weight_findings.frozen_tensors(starts, [*initial, *own]),
        *weight_findings.backbones(recorded, now),
        *([weight_findings.finite(own[-1])] if own else []),
    ]


def _weights(folder: Path) -> Weights:
    return Weights(name=folder.name, tensors=read_weights(folder))


def _initial_weights(init_from: str) -> list[Weights]:
    """Weights of the checkpoint that a run started from; empty if it no longer exists."""
    try:
        folder = local_folder(checkpoint_folders.newest_checkpoint(init_from))
        return [Weights(name=f"init_from ({folder.name})", tensors=read_weights(folder), is_own=False)]
    except UserError as error:
        logger.info("init_from is not compared: %s", error)
        return []


def _row_counts(records: RunRecords, newest: Path | None) -> dict[str, int] | None:
    """Rows in, used and quarantined: from the summary, or from the newest checkpoint of a run without one."""
    values: dict[str, Any] = records.summary or {}
    if "rows_in" not in values and newest is not None and (newest / TRAINING_FILE).is_file():
        try:
            values = torch.load(newest / TRAINING_FILE, map_location="cpu", weights_only=True, mmap=True)["accounting"]
        except (OSError, RuntimeError, KeyError, pickle.UnpicklingError) as error:
            logger.warning("%s cannot be read (%s)", newest / TRAINING_FILE, error)
    names = ("rows_in", "rows_used", "rows_quarantined")
    return {name: int(values[name]) for name in names} if all(name in values for name in names) else None


def _expected_steps(records: RunRecords) -> int | None:
    """Expected last step: from the summary, since a validation may end a run early; else from the settings."""
    if records.summary and "steps" in records.summary:
        return int(records.summary["steps"])
    return records.settings.steps if records.settings else None


def _name(uri: str) -> str:
    return uri.rstrip("/").rpartition("/")[2]
