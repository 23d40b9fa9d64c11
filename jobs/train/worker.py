"""What one rank of `qformer train` does: build or restore the run, train, and tell what came of it."""

import socket
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import get_device
from torch.nn.parallel import DistributedDataParallel

from jobs.cluster.exceptions import find_user_error
from jobs.settings.jobs import TrainSettings
from jobs.settings.loading import resolved_yaml
from jobs.train.inputs import decode_settings, tokenizer_folder
from jobs.train.reporter import RunReporter
from jobs.train.validation import Validation
from pipelines.data.batches.batch import SampleBatch
from pipelines.data.features.cache import FeatureCache
from pipelines.data.storage.checkpoint_folders import checkpoint_uri, newest_whole_checkpoint
from pipelines.data.storage.local_copies import local_folder, remove_copy
from pipelines.training.group.coordinator import COORDINATOR_DIED
from pipelines.training.group.feed import rank_batches
from pipelines.training.group.watchdog import Watchdog
from pipelines.training.records.accounting import Accounting, TooManyQuarantinedError
from pipelines.training.records.flops import StepFlops
from pipelines.training.records.health import QueryCollapseMonitor
from pipelines.training.run.checkpoint_writer import CheckpointError
from pipelines.training.run.model import Training, TrainingRun
from pipelines.training.run.model_choice import choice_from
from pipelines.training.step.ema import Ema
from pipelines.training.step.guard import DivergedError, StepGuard
from pipelines.training.step.loop import Hooks, Loop, LoopSettings
from pipelines.training.step.objective import Objective
from pipelines.training.step.optim import build_optimizer
from pipelines.training.step.precision import Precision
from pipelines.training.step.ranks import of_all_ranks
from qformer.conversion.checkpoint import read_info
from qformer.distributed import any_text, rank, world_size
from qformer.errors import UserError
from qformer.objectives.losses import DIVERSITY

_MAX_STARTS = 10
"""From one step, where a run may be restarted as often as nodes are lost: more are no accident."""


def train_worker(arguments: dict[str, Any]) -> dict[str, Any]:
    """Train on one rank; the first rank's return value is the run's summary.

    A mistake of the user is returned as {"mistake": message}: raised, it would be tried again `max_failures` times.

    Args:
        arguments: settings (dumped), feed and coordinator (handles of one actor), cache (`FeatureCache` or None), order
            (its fingerprint), rows (of an epoch), steps_per_epoch; of the validation, if any, validation_feed,
            validation_cache, validation_rows and validation_steps.
    """
    settings, mistake = TrainSettings.model_validate(arguments["settings"]), None
    try:
        told = ray.get(arguments["coordinator"].user_error.remote())
    except ray.exceptions.ActorDiedError:  # for every rank alike, and at every start
        return {"mistake": COORDINATOR_DIED}
    if told is not None:
        return {"mistake": told}  # of one rank, which ended the start before this one
    try:
        state = _built(arguments, settings)
    except UserError as error:
        mistake = str(error)
    else:
        mistake = _stuck(arguments["coordinator"], settings, state.start_step) if rank() == 0 else None
    # Other ranks may have come through, and would wait for this one.
    if (mistake := any_text(mistake)) is not None:
        return {"mistake": mistake}
    reporter = RunReporter(arguments["coordinator"], settings, state.start_step) if rank() == 0 else None
    say = reporter.log_event if reporter else arguments["coordinator"].post.remote
    _announce(reporter, state, arguments["coordinator"])
    watchdog = Watchdog(
        settings.output, rank(), timeout_s=settings.hang_timeout_s, warn=say, start_step=state.start_step
    )
    loop = _loop(arguments, settings, state, reporter, watchdog)
    try:
        done = loop.run(_batches(arguments, settings, state), state.start_step)
        state.run.assert_frozen()
        if reporter:
            reporter.checkpoint_writer.close()
    except (TooManyQuarantinedError, DivergedError, CheckpointError) as error:
        mistake = str(error)  # met by all ranks at the same step; the last one when no rank waits for this one any more
    except Exception as error:
        # Of this rank alone, such as a storage that refuses it: it must not be tried again `max_failures` times.
        if (found := find_user_error(error)) is not None:
            ray.get(arguments["coordinator"].record_user_error.remote(str(found)))
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


@dataclass(frozen=True, kw_only=True, slots=True)
class _State:
    """A run as it starts or goes on."""

    run: TrainingRun
    training: Training
    accounting: Accounting
    start_step: int
    """Steps done before."""


def _announce(reporter: RunReporter | None, state: _State, coordinator: Any) -> None:
    """Write down and say who starts, from where; every rank must call."""
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


def _stuck(coordinator: Any, settings: TrainSettings, start_step: int) -> str | None:
    """What to tell of a run that starts again and again before its next checkpoint, where nobody set how often."""
    num_starts = ray.get(coordinator.record_start.remote(start_step))
    if settings.max_failures is not None or num_starts <= _MAX_STARTS:
        return None
    return (
        f"the workers have started {num_starts} times from step {start_step} and never reached the next checkpoint; "
        f"events.jsonl in {settings.output} says of what they died. Mend it, or lower checkpoint_every="
        f"{settings.checkpoint_every}, and run the same command with --resume; max_failures sets another limit"
    )


def _built(arguments: dict[str, Any], settings: TrainSettings) -> _State:
    choice = choice_from(
        settings.model.model_dump(),
        stage=settings.stage,
        num_frames=settings.data.num_frames,
        sampling=settings.data.sampling.model_dump(mode="json"),
        segments=settings.data.audio.model_dump(),
        tokenizer=tokenizer_folder(settings),
    )
    cache: FeatureCache | None = arguments["cache"]
    share = -(-settings.batch_size // world_size())
    run = TrainingRun(
        choice,
        get_device(),
        precision=settings.precision,
        seed=settings.seed,
        init_from=settings.init_from,
        features=cache.spec if cache else None,
        is_compiled=settings.compile,
        micro_batch=limit if (limit := _micro_batch(settings)) is not None and limit < share else None,
    )
    optim, trainables = settings.optim, run.stage.trainables
    objective = Objective(run.stage.terms, optim.loss_weights.by_name(), is_learned=optim.loss_weights.is_learned)
    extra = [] if objective.log_variances is None else [objective.log_variances]
    training = Training(
        optimizer=build_optimizer(trainables, weight_decay=optim.weight_decay, betas=optim.betas, extra=extra),
        objective=objective,
        precision=Precision(settings.precision, get_device()),
        ema=Ema(trainables, optim.ema_decay) if optim.ema_decay is not None else None,
        order=arguments["order"],
    )
    if rank() == 0:
        arguments["coordinator"].post.remote(f"weights {run.load_report}")
    accounting, start_step = Accounting(), 0
    newest = _newest(settings.output, arguments["coordinator"].post.remote)
    if newest is not None:
        saved = run.restore(newest, training)
        remove_copy(settings.output, newest)  # a run may be restarted a hundred times on one disk
        accounting, start_step = Accounting.from_state(saved.accounting), saved.step
    return _State(run=run, training=training, accounting=accounting, start_step=start_step)


def _micro_batch(settings: TrainSettings) -> int | None:
    """Most samples that a worker keeps a graph of: as many as the whole group's, when a smaller group goes on."""
    if settings.micro_batch is None and settings.min_workers is not None and not settings.model.lavis_reduction:
        return -(-settings.batch_size // settings.workers)
    return settings.micro_batch


def _newest(output: str, tell: Callable[[str], object]) -> Path | None:
    """The newest whole checkpoint as the first rank sees it: a store may show another rank an older listing."""
    newest = newest_whole_checkpoint(output, tell) if rank() == 0 else None
    step = any_text(None if newest is None else str(read_info(newest).step))
    if newest is not None or step is None:
        return newest
    return local_folder(checkpoint_uri(output, int(step)))


def _batches(arguments: dict[str, Any], settings: TrainSettings, state: _State) -> Iterator[SampleBatch]:
    return rank_batches(
        arguments["feed"],
        attempt=str(any_text(uuid.uuid4().hex)),  # the first rank's, on every rank
        start_step=state.start_step,
        total_steps=settings.steps,
        rank=rank(),
        world_size=world_size(),
        source=arguments["cache"] or decode_settings(settings, state.run.preprocessing, state.run.audio_sampling),
        is_pinned=get_device().type == "cuda",
    )


def _loop(
    arguments: dict[str, Any], settings: TrainSettings, state: _State, reporter: RunReporter | None, watchdog: Watchdog
) -> Loop:
    run, training = state.run, state.training
    call: torch.nn.Module = run.stage.trainables
    # DDP wants a gradient of every parameter; without it the loop averages gradients itself.
    is_silent = any(training.objective.is_silent(name) for name in run.stage.terms if name != DIVERSITY)
    if world_size() > 1 and run.stage.micro_batch is None and not is_silent:
        device = get_device()
        devices = [device.index] if device.type == "cuda" else None
        # Gradients lie in the buckets that ranks exchange: a copy of all of them less, in time and memory.
        call = DistributedDataParallel(call, device_ids=devices, gradient_as_bucket_view=True)

    def save(done: int) -> None:
        if reporter is not None:
            yaml = resolved_yaml(settings)
            reporter.checkpoint_writer.submit(run.checkpoint(done, training, state.accounting, settings=yaml))
            reporter.write_quarantine(state.accounting)

    validation = Validation(arguments, settings, run, training, reporter, watchdog.report_progress)
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
            steps_per_epoch=arguments["steps_per_epoch"],
            rows_per_epoch=arguments["rows"],
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
    """Asks Ray whether a machine of the group goes away soon; true once for each notice."""

    def __init__(self, alarm: Any) -> None:
        self._alarm, self._seen = alarm, None

    def __call__(self) -> bool:
        notice = ray.train.get_preemption_info()  # a barrier: every rank is told the same
        is_new, self._seen = notice is not None and notice != self._seen, notice
        if is_new:
            self._alarm(f"a machine of the group goes away ({notice}); taking a checkpoint first")
        return is_new


def _summary(settings: TrainSettings, state: _State) -> dict[str, Any]:
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
    """Only the first rank keeps records."""
