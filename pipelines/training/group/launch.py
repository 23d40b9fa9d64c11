"""Ray Train around a worker function: the only place that knows its trainer."""

import contextlib
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.training.group.desk import DESK_DIED
from pipelines.training.records.telemetry import live_progress
from qformer.errors import UserError

_RESIZE_PAUSE_S = 60.0
"""Between looks for nodes that have come. Growing restarts the workers, from the last checkpoint."""

_TUNABLES = "GLIBC_TUNABLES"
_KEEP_MEMORY = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in {"hugetlb": 1, "mmap_threshold": 2**30, "trim_threshold": 2**32, "top_pad": 2**26}.items()
)
"""What glibc's malloc does in workers on CPUs: keeps what a step's tensors lay in for the next step, in large pages. By
default it goes back and is fetched again page by page, 20,000 times a step in the training benchmark: 5 to 10 % of one.
"""

_UNUSED = ("DatasetsCallback", "PlacementGroupCleanerCallback")
"""Of the callbacks that every trainer has; see `_Trainer`."""


class _TellFailures(UserCallback):  # type: ignore[misc]
    """Has the driver say which workers died, and why; Ray calls it in the controller."""

    def __init__(self, board: Any) -> None:
        self._board = board

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Tell."""
        for rank, error in sorted(worker_exceptions.items()):
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            self._board.died.remote(f"ALARM worker {rank} died: {type(error).__name__}: {(lines or [''])[-1][:300]}")


class _Trainer(TorchTrainer):  # type: ignore[misc]
    """Without two actors of Ray Train's, each a process that takes time of the training.

    One shares datasets out, of which it is given none: a `BatchFeed` does that. The other frees the workers' places
    where their controller has died but the driver lives on, and asks Ray's dashboard every second whether it has; a
    job ends then, which frees them too, and a local cluster has no dashboard.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = super()._create_default_callbacks()
        return [one for one in callbacks if type(one).__name__ not in _UNUSED]


def launch(
    worker: Callable[[dict[str, Any]], dict[str, Any]],
    arguments: dict[str, Any],
    *,
    board: Any,
    workers: int,
    min_workers: int | None,
    use_gpu: bool,
    max_failures: int,
    hang_timeout_s: float,
    name: str,
    scratch: str,
    total_steps: int,
    keep: Callable[[Sequence[str]], None],
) -> dict[str, Any]:
    """Run `worker(arguments | {"board": board})` on every rank and return the first rank's result.

    Args:
        worker: The training function; importable by the workers.
        arguments: Its settings and actor handles.
        board: Handle of a `ProgressBoard` actor, whose figures and lines are shown while the run goes on.
        workers: Ranks.
        min_workers: As few are enough to start or to go on; None: all.
        use_gpu: One GPU a rank.
        max_failures: Restarts of the whole group after a crash.
        hang_timeout_s: Longest step; collectives wait twice as long, so that the watchdog speaks first.
        name: Shown in the progress line, and in the dashboard of a cluster that has one.
        scratch: Folder for Ray Train's own records; our checkpoints lie in the run folder.
        total_steps: For the progress line.
        keep: Takes of what workers died that nobody came after to write down.

    Raises:
        UserError: If the controller or the desk dies, which nobody starts again.
    """
    trainer = _Trainer(
        worker,
        train_loop_config={**arguments, "board": board},
        torch_config=TorchConfig(
            backend="cpu:gloo,cuda:nccl" if use_gpu else "gloo", timeout_s=math.ceil(2 * hang_timeout_s)
        ),
        scaling_config=ScalingConfig(
            num_workers=workers if min_workers is None else (min_workers, workers),
            use_gpu=use_gpu,
            elastic_resize_monitor_interval_s=_RESIZE_PAUSE_S,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=scratch,
            failure_config=FailureConfig(max_failures=max_failures),
            callbacks=[_TellFailures(board)],
            worker_runtime_env={} if use_gpu else {"env_vars": {_TUNABLES: os.environ.get(_TUNABLES, _KEEP_MEMORY)}},
        ),
    )
    with live_progress(board, total_steps, name):
        try:
            return _fit(trainer, board)
        finally:
            with contextlib.suppress(ray.exceptions.RayError):
                keep(ray.get(board.take_deaths.remote()))


def _fit(trainer: TorchTrainer, board: Any) -> dict[str, Any]:
    try:
        return trainer.fit().return_value
    except ray.exceptions.ActorDiedError as error:
        raise UserError(
            "the process that controls the workers died (killed, or out of memory); the run stands at its newest "
            "checkpoint: run the same command with --resume"
        ) from error
    except TrainingFailedError as error:
        if _has_died(board):
            raise UserError(DESK_DIED) from error
        raise


def _has_died(board: Any) -> bool:
    try:
        ray.get(board.mistake.remote())
    except ray.exceptions.ActorDiedError:
        return True
    return False


def beside_driver() -> NodeAffinitySchedulingStrategy:
    """Keeps an actor on the node of the caller, without which the run ends anyway; any other may be lost."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
