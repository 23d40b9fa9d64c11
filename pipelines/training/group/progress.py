"""Progress of a run in the driver: a bar in a terminal, log lines elsewhere."""

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

_POLL_PAUSE_S = 0.5
_LINE_PAUSE_S = 15.0
"""Seconds between progress lines where there is no terminal."""
_ANSWER_TIMEOUT_S = 10.0
"""Longest wait of a poll: the coordinator may be planning a segment."""

logger = logging.getLogger(__name__)


@contextmanager
def live_progress(coordinator: Any, total_steps: int, title: str) -> Iterator[None]:
    """Show a run's metrics and messages while the block runs.

    Args:
        coordinator: Handle of the run's `RunCoordinator` actor.
        total_steps: Steps of the whole run.
        title: Text at the beginning of each line.
    """
    done = threading.Event()
    show = _show_bar if sys.stderr.isatty() else _show_lines
    thread = threading.Thread(target=show, args=(coordinator, total_steps, title, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=2 * _ANSWER_TIMEOUT_S)  # the poll under way, and a last one


def progress_line(metrics: dict[str, float]) -> str:
    """One line of metrics: losses with their chance levels, learning rate, speed, share of time spent on data."""
    losses = "  ".join(_with_chance(name, metrics) for name in metrics if name.startswith("loss/"))
    return (
        f"{losses}  lr {metrics['learning_rate']:.1e}  {metrics['samples_per_s']:.0f} samples/s  "
        f"data wait {metrics['data_wait_share']:.0%}"
    )


def _with_chance(name: str, metrics: dict[str, float]) -> str:
    term = name.removeprefix("loss/")
    chance = metrics.get(f"chance/{term}")
    return f"{term} {metrics[name]:.3f}" + ("" if chance is None else f" (chance {chance:.3f})")


class _StatusPoller:
    """Polls a run's status from one thread, and logs every message once."""

    def __init__(self, coordinator: Any) -> None:
        self._coordinator, self._num_logged = coordinator, 0

    def poll(self) -> dict[str, float]:
        """Log the messages since the last poll, and return the metrics; empty where no answer came in time."""
        metrics: dict[str, float]
        try:
            metrics, messages = ray.get(self._coordinator.read.remote(self._num_logged), timeout=_ANSWER_TIMEOUT_S)
        except ray.exceptions.RayError:
            return {}  # a busy or ending cluster; the next poll asks for the same messages
        self._num_logged += len(messages)
        for message in messages:
            logger.info("%s", message)
        return metrics


def _show_lines(coordinator: Any, total_steps: int, title: str, done: threading.Event) -> None:
    poller, shown_step, shown_at = _StatusPoller(coordinator), 0, time.monotonic()
    while not done.wait(_POLL_PAUSE_S):
        if time.monotonic() - shown_at < _LINE_PAUSE_S:
            continue
        metrics = poller.poll()
        if metrics and metrics["step"] > shown_step:
            shown_step, shown_at = int(metrics["step"]), time.monotonic()
            logger.info("%s  step %d/%d  %s", title, shown_step, total_steps, progress_line(metrics))
    poller.poll()  # messages since the last line


def _show_bar(coordinator: Any, total_steps: int, title: str, done: threading.Event) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[line]}"),
    )
    with Progress(*columns, transient=False) as progress:
        task = progress.add_task(title, total=total_steps, line="starting workers")
        poller = _StatusPoller(coordinator)
        while True:
            is_done = done.wait(_POLL_PAUSE_S)
            metrics = poller.poll()
            if metrics:
                progress.update(task, completed=int(metrics["step"]), line=progress_line(metrics))
            if is_done:
                return
