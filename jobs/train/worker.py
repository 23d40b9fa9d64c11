"""Training on one rank of `qformer train`: build or restore the run, train, return the summary."""

import socket
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import get_device
from torch.nn.parallel import DistributedDataParallel

from jobs.cluster.exceptions import find_user_error
from jobs.settings.loading import resolved_yaml
from jobs.settings.train import TrainSettings
from jobs.train.inputs import decode_settings
from jobs.train.reporter import RunReporter
from jobs.train.state import RunState, build_state
from jobs.train.validation import Validation
from jobs.train.worker_job import WorkerJob
from pipelines.data.batches.batch import SampleBatch
from pipelines.training.group.coordinator import COORDINATOR_DIED
from pipelines.training.group.feed import rank_batches
from pipelines.training.group.watchdog import Watchdog
from pipelines.training.records.accounting import TooManyQuarantinedError
from pipelines.training.records.flops import StepFlops
from pipelines.training.records.health import QueryCollapseMonitor
from pipelines.training.run.checkpoint_writer import CheckpointError
from pipelines.training.step.guard import DivergedError, StepGuard
from pipelines.training.step.loop import Hooks, Loop, LoopSettings
from pipelines.training.step.ranks import of_all_ranks
from qformer.distributed import any_text, rank, world_size
from qformer.errors import UserError
from qformer.objectives.losses import DIVERSITY

_MAX_STARTS = 10
"""Most starts from one step where `max_failures` is not set; more are no accident."""


def train_worker(arguments: Mapping[str, WorkerJob]) -> dict[str, Any]:
    """Train on one rank; the first rank's return value is the run's summary.

    A mistake of the user is returned as {"mistake": message}: Ray Train would retry a raised one `max_failures` times.

    Args:
        arguments: The run's `WorkerJob` under "job"; Ray Train takes a mapping.
    """
    job, mistake = arguments["job"], None
    settings = job.settings
    try:
        reported = ray.get(job.coordinator.user_error.remote())
    except ray.exceptions.ActorDiedError:  # on every rank, at every start
        return {"mistake": COORDINATOR_DIED}
    if reported is not None:
        return {"mistake": reported}  # of one rank, which ended the start before this one
    try:
        state = build_state(job)
    except UserError as error:
        mistake = str(error)
    else:
        mistake = _start_limit(job.coordinator, settings, state.start_step) if rank() == 0 else None
    # Other ranks may have succeeded, and would wait for this one.
    if (mistake := any_text(mistake)) is not None:
        return {"mistake": mistake}
    reporter = RunReporter(job.coordinator, settings, state.start_step) if rank() == 0 else None
    say = reporter.log_event if reporter else job.coordinator.post.remote
    _record_start(reporter, state, job.coordinator)
    watchdog = Watchdog(
        settings.output, rank(), timeout_s=settings.hang_timeout_s, warn=say, start_step=state.start_step
    )
    loop = _loop(job, state, reporter, watchdog)
    try:
        done = loop.run(_batches(job, state), state.start_step)
        state.run.assert_frozen()
        if reporter:
            reporter.checkpoint_writer.close()
    except (TooManyQuarantinedError, DivergedError, CheckpointError) as error:
        mistake = str(error)  # on all ranks alike; `CheckpointError` when no other rank waits
    except Exception as error:
        # On this rank alone, such as a storage that denies access: no retry helps.
        if (found := find_user_error(error)) is not None:
            ray.get(job.coordinator.record_user_error.remote(str(found)))
        raise
    finally:
        watchdog.close()
        if reporter:
            reporter.metrics_log.close()
            reporter.write_quarantine(state.accounting)
    if (mistake := any_text(mistake)) is not None:
        return {"mistake": mistake}
    stages = loop.times.combined(state.run.encode.seconds)
    last = reporter.metrics_log.records[-1] if reporter and reporter.metrics_log.records else {}
    return {**_summary(settings, state), "steps": done, "last": last, "stages": stages}


def _record_start(reporter: RunReporter | None, state: RunState, coordinator: Any) -> None:
    """Record and print which machines start, and from which step; every rank must call."""
    hosts = of_all_ranks([socket.gethostname()])
    if reporter is None:
        return
    reporter.save_events(ray.get(coordinator.take_failures.remote()))
    run = state.run
    trainable = {"names": run.trainable_names, "parameters": run.num_trainable}
    group = {"step": state.start_step, "workers": world_size(), "hosts": hosts}
    reporter.record_start({**group, "trainable": trainable, "frozen_sha256": dict(run.fingerprints)})
    verb = "resuming" if state.start_step else "starting"
    reporter.log_event(
        f"{verb} at step {state.start_step} with {world_size()} worker(s) on {', '.join(sorted(set(hosts)))}"
    )


def _start_limit(coordinator: Any, settings: TrainSettings, start_step: int) -> str | None:
    """Message for a run that restarts too often before its next checkpoint; None while it may start."""
    num_starts = ray.get(coordinator.record_start.remote(start_step))
    if settings.max_failures is not None or num_starts <= _MAX_STARTS:
        return None
    return (
        f"the workers have started {num_starts} times from step {start_step} and never reached the next checkpoint; "
        f"events.jsonl in {settings.output} has the errors. Fix the cause, or lower checkpoint_every="
        f"{settings.checkpoint_every}, and run the same command with --resume; max_failures sets another limit"
    )


def _batches(job: WorkerJob, state: RunState) -> Iterator[SampleBatch]:
    settings, run = job.settings, state.run
    return rank_batches(
        job.training.actor,
        attempt=str(any_text(uuid.uuid4().hex)),  # the first rank's, on every rank
        start_step=state.start_step,
        total_steps=settings.steps,
        rank=rank(),
        world_size=world_size(),
        source=job.training.cache or decode_settings(settings, run.preprocessing, run.audio_sampling),
        is_pinned=get_device().type == "cuda",
    )


def _loop(job: WorkerJob, state: RunState, reporter: RunReporter | None, watchdog: Watchdog) -> Loop:
    settings, run, training = job.settings, state.run, state.training
    call: torch.nn.Module = run.stage.trainables
    # DDP wants a gradient of every parameter; without it the loop averages gradients itself.
    is_silent = any(training.objective.is_silent(name) for name in run.stage.terms if name != DIVERSITY)
    if world_size() > 1 and run.stage.micro_batch is None and not is_silent:
        device = get_device()
        devices = [device.index] if device.type == "cuda" else None
        # Gradients are views of the buckets that ranks exchange, which saves a copy of all of them.
        call = DistributedDataParallel(call, device_ids=devices, gradient_as_bucket_view=True)

    def save(done: int) -> None:
        if reporter is not None:
            yaml = resolved_yaml(settings)
            reporter.checkpoint_writer.submit(run.checkpoint(done, training, state.accounting, settings=yaml))
            reporter.write_quarantine(state.accounting)

    validation = Validation(job, run, training, reporter, watchdog.report_progress)
    report, alarm = (reporter.record_bad_step, reporter.log_event) if reporter else (_ignore, _ignore)
    optim = settings.optim
    return Loop(
        stage=run.stage,
        call=call,
        optimizer=training.optimizer,
        objective=training.objective,
        precision=training.precision,
        accounting=state.accounting,
        settings=LoopSettings(
            steps=settings.steps,
            steps_per_epoch=job.training.steps_per_epoch,
            rows_per_epoch=job.training.rows_per_epoch,
            learning_rate=optim.learning_rate,
            min_learning_rate=optim.min_learning_rate,
            warmup_steps=optim.warmup_steps,
            clip_norm=optim.clip_norm,
            checkpoint_every=settings.checkpoint_every,
            log_every=settings.log_every,
            seed=settings.seed,
            max_quarantine_share=settings.max_quarantine_share,
            validate_every=settings.validation.every if settings.validation else None,
        ),
        guard=StepGuard(settings.max_bad_steps, report, alarm),
        queries=QueryCollapseMonitor(alarm),
        flops=StepFlops(get_device()),
        hooks=Hooks(
            log=(lambda values: reporter.record_step(values, state.accounting)) if reporter else _ignore,
            save=save,
            validate=validation,
            is_preempted=_PreemptionNotice(alarm),
            beat=watchdog.report_progress,
        ),
        ema=training.ema,
    )


class _PreemptionNotice:
    """Polls Ray for machines of the group that go away soon; true once for each notice.

    Args:
        alarm: Callback that takes a message for the user.
    """

    def __init__(self, alarm: Any) -> None:
        self._alarm, self._last = alarm, None

    def __call__(self) -> bool:
        notice = ray.train.get_preemption_info()  # a barrier: every rank gets the same answer
        is_new, self._last = notice is not None and notice != self._last, notice
        if is_new:
            self._alarm(f"a machine of the group goes away ({notice}); taking a checkpoint first")
        return is_new


def _summary(settings: TrainSettings, state: RunState) -> dict[str, Any]:
    run, accounting = state.run, state.accounting
    return {
        "stage": settings.stage,
        "resumed_from_step": state.start_step,
        "accounting": accounting.line,
        "rows_in": accounting.rows_in,
        "rows_used": accounting.rows_used,
        "rows_quarantined": accounting.rows_quarantined,
        "texts_truncated": run.num_truncated(),
        "load_report": run.load_report,
        "trainable_parameters": run.num_trainable,
        "trainable_names": run.trainable_names,
        "frozen_sha256": run.fingerprints,
    }


def _ignore(_: object) -> None:
    """Records of ranks other than the first."""
