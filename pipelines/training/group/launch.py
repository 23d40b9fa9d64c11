"""Start of a worker function on every rank with Ray Train; no other module imports its trainer."""

import contextlib
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.training.group.coordinator import COORDINATOR_DIED
from pipelines.training.group.progress import live_progress
from qformer.errors import UserError

_RESIZE_PAUSE_S = 60.0
"""Seconds between checks for new nodes. A larger group restarts the workers from the last checkpoint."""

_TUNABLES = "GLIBC_TUNABLES"
_REUSE_MEMORY = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in {"hugetlb": 1, "mmap_threshold": 2**30, "trim_threshold": 2**32, "top_pad": 2**26}.items()
)
"""Settings of glibc's malloc in workers on CPUs: freed tensor memory stays in the process, in large pages, and the next
step reuses it. By default it is returned and fetched again page by page, 20,000 times a step in the training benchmark:
5 to 10 % of a step."""

_UNUSED_CALLBACKS = ("DatasetsCallback", "PlacementGroupCleanerCallback")
"""Default callbacks that `_Trainer` leaves out."""


class _FailureCallback(UserCallback):  # type: ignore[misc]
    """Records which workers died and why; Ray calls it in the controller.

    Args:
        coordinator: Handle of the run's `RunCoordinator` actor.
    """

    def __init__(self, coordinator: Any) -> None:
        self._coordinator = coordinator

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Record one message for each worker."""
        for rank, error in sorted(worker_exceptions.items()):
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            message = f"ALARM worker {rank} died: {type(error).__name__}: {(lines or [''])[-1][:300]}"
            self._coordinator.record_failure.remote(message)


class _BridgeTrainer(TorchTrainer):  # type: ignore[misc]
    """A TorchTrainer without two actors of Ray Train, each a process that takes CPU time from the training.

    One distributes datasets; a run gives it none, since `BatchFeed` hands out the batches. The other frees the
    workers' placement group when the controller died while the driver lives, and polls Ray's dashboard every second
    for that; here the job ends then, which frees the group too, and a local cluster has no dashboard.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = super()._create_default_callbacks()
        return [callback for callback in callbacks if type(callback).__name__ not in _UNUSED_CALLBACKS]


def launch(
    worker: Callable[[dict[str, Any]], dict[str, Any]],
    arguments: dict[str, Any],
    *,
    coordinator: Any,
    workers: int,
    min_workers: int | None,
    use_gpu: bool,
    max_failures: int,
    hang_timeout_s: float,
    name: str,
    scratch: str,
    total_steps: int,
    save_failures: Callable[[Sequence[str]], None],
) -> dict[str, Any]:
    """Run `worker(arguments | {"coordinator": coordinator})` on every rank and return the first rank's result.

    Args:
        worker: Training function; importable by the workers.
        arguments: Settings and actor handles for the worker.
        coordinator: Handle of the run's `RunCoordinator` actor, whose metrics and messages the driver shows.
        workers: Number of ranks.
        min_workers: Least number of ranks to start or go on with; None for all.
        use_gpu: Whether each rank has a GPU.
        max_failures: Most restarts of the whole group after crashes.
        hang_timeout_s: Longest step; collectives wait twice as long, so that the watchdog reports first.
        name: Title of the progress line, and of the run in the dashboard of a cluster that has one.
        scratch: Folder for Ray Train's own records; checkpoints go into the run folder.
        total_steps: Steps of the whole run, for the progress line.
        save_failures: Callback that takes the worker failures which no later start of the workers recorded.

    Raises:
        UserError: If the controller or the coordinator dies, which nothing restarts.
    """
    trainer = _BridgeTrainer(
        worker,
        train_loop_config={**arguments, "coordinator": coordinator},
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
            callbacks=[_FailureCallback(coordinator)],
            worker_runtime_env={} if use_gpu else {"env_vars": {_TUNABLES: os.environ.get(_TUNABLES, _REUSE_MEMORY)}},
        ),
    )
    with live_progress(coordinator, total_steps, name):
        try:
            return _fit(trainer, coordinator)
        finally:
            with contextlib.suppress(ray.exceptions.RayError):
                save_failures(ray.get(coordinator.take_failures.remote()))


def _fit(trainer: TorchTrainer, coordinator: Any) -> dict[str, Any]:
    try:
        return trainer.fit().return_value
    except ray.exceptions.ActorDiedError as error:
        raise UserError(
            "the process that controls the workers died (killed, or out of memory); the run stands at its newest "
            "checkpoint: run the same command with --resume"
        ) from error
    except TrainingFailedError as error:
        if _has_died(coordinator):
            raise UserError(COORDINATOR_DIED) from error
        raise


def _has_died(coordinator: Any) -> bool:
    try:
        ray.get(coordinator.user_error.remote())
    except ray.exceptions.ActorDiedError:
        return True
    return False


def driver_node_affinity() -> NodeAffinitySchedulingStrategy:
    """Scheduling of an actor on the caller's node: the run ends with that node anyway, but not with any other."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
