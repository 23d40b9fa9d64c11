"""What a run tells while it goes on: metrics.jsonl, TensorBoard events, and a live line in the driver."""

import contextlib
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import fsspec
import ray

from pipelines.data import storage
from pipelines.training.records.train_metrics import TrainMetrics

METRICS_FILE = "metrics.jsonl"
POLL_PAUSE_S = 0.5
REMOTE_PAUSE_S = 60.0
"""Object stores cannot append: there the file is written whole, but not at every log line."""
_ANSWER_S = 10.0
"""Most time that a poll waits: the board may be doing something else."""
QUIET_PAUSE_S = 15.0
"""Between progress lines where there is no terminal."""

logger = logging.getLogger(__name__)


class RunLog:
    """Writes a run's metrics; used by the first rank alone.

    Args:
        output: Run folder.
        board: `ProgressBoard` actor to tell, or None.
        start_step: Steps done before; later records of a run that died are dropped.
        alarm: Called with a line for the user.
    """

    def __init__(self, output: str, board: Any, start_step: int, alarm: Callable[[str], None] = logger.warning) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.uri, self.board = storage.join(output, METRICS_FILE), board
        self.metrics = TrainMetrics(output)
        self.records = [record for record in read_metrics(output) if record["step"] <= start_step]
        self.alarm = alarm
        self.writer: Any = SummaryWriter(storage.join(output, "tensorboard"), purge_step=start_step + 1)
        self._is_torn = True
        with self._alarming():
            self._rewrite()

    def write(self, values: dict[str, float]) -> None:
        """Record one step's figures; where there is no room for them, the next time brings them with it."""
        self.records.append(values)
        self.metrics.set(values)
        if self.board is not None:
            self.board.put.remote(values)
        with self._alarming():
            if not storage.is_local(self.uri):
                if time.monotonic() - self.written_at > REMOTE_PAUSE_S:
                    self._rewrite()
            elif self._is_torn:
                self._rewrite()
            else:
                self._is_torn = True
                with open(storage.local_path(self.uri), "a") as file:
                    file.write(json.dumps(values) + "\n")
                self._is_torn = False
        figures = {name: value for name, value in values.items() if name not in ("step", "epoch", "batch_ids")}
        self._draw(figures, int(values["step"]))

    def validated(self, step: int, losses: Mapping[str, float]) -> None:
        """Record a validation in TensorBoard and for Prometheus."""
        figures = {f"validation/{name}": value for name, value in losses.items()}
        self._draw(figures, step)
        self.metrics.set(figures)

    def close(self) -> None:
        """Write what is still in memory."""
        with self._alarming():
            self._rewrite()
        if self.writer is not None:
            with self._alarming():
                self.writer.close()

    def _rewrite(self) -> None:
        self.written_at = time.monotonic()
        storage.write_bytes(self.uri, "".join(json.dumps(record) + "\n" for record in self.records).encode())
        self._is_torn = False

    def _draw(self, figures: Mapping[str, float], step: int) -> None:
        if self.writer is None:
            return
        try:
            for name, value in figures.items():
                self.writer.add_scalar(name, value, step)
        except Exception as error:  # its thread died of a full disk, and will not live again
            self.writer = None
            self.alarm(f"ALARM TensorBoard's file takes no more ({error}); {METRICS_FILE} goes on")

    @contextmanager
    def _alarming(self) -> Iterator[None]:
        """A disk or store that takes nothing ends no training."""
        try:
            yield
        except Exception as error:  # whatever a file system raises
            self.alarm(f"ALARM {METRICS_FILE} is not written: {error}; the next logged step is the next try")


def read_metrics(output: str) -> list[dict[str, float]]:
    """Records of a run so far; empty when there are none. A line that a crash cut short is left out."""
    uri = storage.join(output, METRICS_FILE)
    if not storage.exists(uri):
        return []
    records = []
    with fsspec.open(uri, "rt") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                records.append(json.loads(line))
    return records


class ProgressBoard:
    """Latest figures of a run and what it has to say: the first rank puts them, the driver reads them."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self.news: list[str] = []
        self.told_mistake: str | None = None
        self.starts: list[int] = []
        self.deaths: list[str] = []

    def starting(self, step: int) -> int:
        """Keep that the workers start from a step; return how often in a row they have started from it."""
        self.starts = [*(one for one in self.starts if one == step), step]
        return len(self.starts)

    def give_up(self, text: str) -> None:
        """Keep a mistake of the user that a rank has met: whoever starts next ends with it."""
        self.told_mistake = self.told_mistake or text

    def mistake(self) -> str | None:
        """The first that was kept; None as long as there is none."""
        return self.told_mistake

    def put(self, values: dict[str, float]) -> None:
        """Replace the figures."""
        self.values = values

    def say(self, text: str) -> None:
        """Have the driver print a line."""
        self.news.append(text)

    def died(self, text: str) -> None:
        """Have the driver say of what a worker died, and keep it for the run's records."""
        self.say(text)
        self.deaths.append(text)

    def take_deaths(self) -> list[str]:
        """What was kept since the last taking."""
        deaths, self.deaths = self.deaths, []
        return deaths

    def read(self, num_heard: int = 0) -> tuple[dict[str, float], list[str]]:
        """Figures of the last logged step, and the lines said after the first `num_heard`.

        All are kept: an answer may come too late for who asked.
        """
        return self.values, self.news[num_heard:]


@contextmanager
def live_progress(board: Any, total_steps: int, title: str) -> Iterator[None]:
    """Show the board's figures while the block runs: a bar in a terminal, quiet lines elsewhere."""
    done = threading.Event()
    show = _show_bar if sys.stderr.isatty() else _show_lines
    thread = threading.Thread(target=show, args=(board, total_steps, title, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=2 * _ANSWER_S)  # that it may wait for now, and a last one


def describe(values: dict[str, float]) -> str:
    """One line of figures: losses beside chance, rate, speed, data wait."""
    losses = "  ".join(_with_chance(name, values) for name in values if name.startswith("loss/"))
    return (
        f"{losses}  lr {values['learning_rate']:.1e}  {values['samples_per_s']:.0f} samples/s  "
        f"data wait {values['data_wait_share']:.0%}"
    )


def _with_chance(name: str, values: dict[str, float]) -> str:
    term = name.removeprefix("loss/")
    chance = values.get(f"chance/{term}")
    return f"{term} {values[name]:.3f}" + ("" if chance is None else f" (chance {chance:.3f})")


class _Listener:
    """Asks the board of a run, from one thread, and tells every line once."""

    def __init__(self, board: Any) -> None:
        self._board, self._num_heard = board, 0

    def poll(self) -> dict[str, float]:
        """Print what was said since the last poll, and return the figures."""
        figures: dict[str, float]
        try:
            figures, news = ray.get(self._board.read.remote(self._num_heard), timeout=_ANSWER_S)
        except ray.exceptions.RayError:
            return {}  # a busy or ending cluster: the next poll tells
        self._num_heard += len(news)
        for text in news:
            logger.info("%s", text)
        return figures


def _show_lines(board: Any, total_steps: int, title: str, done: threading.Event) -> None:
    listener, shown_step, shown_at = _Listener(board), 0, time.monotonic()
    while not done.wait(POLL_PAUSE_S):
        if time.monotonic() - shown_at < QUIET_PAUSE_S:
            continue
        values = listener.poll()
        if values and values["step"] > shown_step:
            shown_step, shown_at = int(values["step"]), time.monotonic()
            logger.info("%s  step %d/%d  %s", title, shown_step, total_steps, describe(values))
    listener.poll()  # a short run has said more than it was asked for


def _show_bar(board: Any, total_steps: int, title: str, done: threading.Event) -> None:
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
        listener = _Listener(board)
        while True:
            is_done = done.wait(POLL_PAUSE_S)
            values = listener.poll()
            if values:
                progress.update(task, completed=int(values["step"]), line=describe(values))
            if is_done:
                return
