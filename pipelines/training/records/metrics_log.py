"""Metrics of a run's logged steps: metrics.jsonl, TensorBoard, Prometheus, and the driver's progress display."""

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import fsspec

from pipelines.data import storage
from pipelines.training.records.train_metrics import TrainMetrics

METRICS_FILE = "metrics.jsonl"
_REMOTE_PAUSE_S = 60.0
"""Least seconds between two writes to an object store, which cannot append: each writes the whole file."""

logger = logging.getLogger(__name__)


class MetricsLog:
    """Writes a run's metrics; used by the first rank alone.

    Args:
        output: Run folder.
        status: Handle of an actor with the methods of `RunStatus`, which gets each logged step's metrics; or None.
        start_step: Steps done before; records after it, of a run that died, are dropped.
        warn: Callback that takes a warning for the user.

    Attributes:
        records: Metrics of the logged steps, oldest first.
    """

    def __init__(self, output: str, status: Any, start_step: int, warn: Callable[[str], None] = logger.warning) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.records = [record for record in read_metrics(output) if record["step"] <= start_step]
        self._uri, self._status, self._warn = storage.join(output, METRICS_FILE), status, warn
        self._prometheus = TrainMetrics(output)
        self._tensorboard: Any = SummaryWriter(storage.join(output, "tensorboard"), purge_step=start_step + 1)
        self._is_incomplete = True
        self._written_at_s = 0.0
        with self._warning_on_error():
            self._rewrite()

    def write(self, metrics: dict[str, float]) -> None:
        """Record one step's metrics; a step that cannot be written is written with the next one."""
        self.records.append(metrics)
        self._prometheus.set(metrics)
        if self._status is not None:
            self._status.set_metrics.remote(metrics)
        with self._warning_on_error():
            if not storage.is_local(self._uri):
                if time.monotonic() - self._written_at_s > _REMOTE_PAUSE_S:
                    self._rewrite()
            elif self._is_incomplete:
                self._rewrite()
            else:
                self._is_incomplete = True
                with open(storage.local_path(self._uri), "a") as file:
                    file.write(json.dumps(metrics) + "\n")
                self._is_incomplete = False
        scalars = {name: value for name, value in metrics.items() if name not in ("step", "epoch", "batch_ids")}
        self._add_scalars(scalars, int(metrics["step"]))

    def write_validation(self, step: int, losses: Mapping[str, float]) -> None:
        """Record a validation's losses in TensorBoard and for Prometheus."""
        scalars = {f"validation/{name}": value for name, value in losses.items()}
        self._add_scalars(scalars, step)
        self._prometheus.set(scalars)

    def close(self) -> None:
        """Write what is still in memory."""
        with self._warning_on_error():
            self._rewrite()
        if self._tensorboard is not None:
            with self._warning_on_error():
                self._tensorboard.close()

    def _rewrite(self) -> None:
        self._written_at_s = time.monotonic()
        storage.write_bytes(self._uri, "".join(json.dumps(record) + "\n" for record in self.records).encode())
        self._is_incomplete = False

    def _add_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        if self._tensorboard is None:
            return
        try:
            for name, value in scalars.items():
                self._tensorboard.add_scalar(name, value, step)
        except Exception as error:  # a full disk ended its thread, which cannot be started again
            self._tensorboard = None
            self._warn(f"ALARM TensorBoard's file cannot be written ({error}); {METRICS_FILE} goes on")

    @contextmanager
    def _warning_on_error(self) -> Iterator[None]:
        """Warn instead of raising: a full disk or a store that refuses must not end the training."""
        try:
            yield
        except Exception as error:  # whatever a file system raises
            self._warn(f"ALARM {METRICS_FILE} is not written: {error}; the next logged step is the next try")


def read_metrics(output: str) -> list[dict[str, float]]:
    """Metrics of a run's logged steps; empty when there are none. A line that a crash cut short is left out."""
    uri = storage.join(output, METRICS_FILE)
    if not storage.exists(uri):
        return []
    records = []
    with fsspec.open(uri, "rt") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                records.append(json.loads(line))
    return records
