"""A training run on one rank, as it starts or resumes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ray.train.torch import get_device

from jobs.settings.train import TrainSettings
from jobs.train.inputs import model_choice, tokenizer_folder
from jobs.train.worker_job import WorkerJob
from pipelines.data.storage.checkpoint_folders import checkpoint_uri, newest_whole_checkpoint
from pipelines.data.storage.local_copies import local_folder, remove_copy
from pipelines.training.records.accounting import Accounting
from pipelines.training.run.model import Training, TrainingRun
from pipelines.training.step.ema import Ema
from pipelines.training.step.objective import Objective
from pipelines.training.step.optim import build_optimizer
from pipelines.training.step.precision import Precision
from qformer.conversion.checkpoint import read_info
from qformer.distributed import any_text, rank, world_size


@dataclass(frozen=True, kw_only=True, slots=True)
class RunState:
    """A run as it starts or resumes."""

    run: TrainingRun
    training: Training
    accounting: Accounting
    start_step: int
    """Steps done before."""


def build_state(job: WorkerJob) -> RunState:
    """Build the run on this rank, and restore it from its newest checkpoint if there is one; every rank must call.

    Args:
        job: Settings and feeds of the run.

    Raises:
        UserError: If a backbone cannot be loaded, or settings and checkpoint do not fit.
    """
    settings, cache = job.settings, job.training.cache
    choice = model_choice(
        settings.model,
        stage=settings.stage,
        num_frames=settings.data.num_frames,
        sampling=settings.data.sampling,
        segments=settings.data.audio.build(),
        tokenizer=tokenizer_folder(settings),
    )
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
        order=job.order,
    )
    if rank() == 0:
        job.coordinator.post.remote(f"weights {run.load_report}")
    accounting, start_step = Accounting(), 0
    newest = _newest(settings.output, job.coordinator.post.remote)
    if newest is not None:
        saved = run.restore(newest, training)
        remove_copy(settings.output, newest)  # a run may be restarted a hundred times on one disk
        accounting, start_step = Accounting.from_state(saved.accounting), saved.step
    return RunState(run=run, training=training, accounting=accounting, start_step=start_step)


def _micro_batch(settings: TrainSettings) -> int | None:
    """Most samples of a worker with a graph; in a group that may shrink, as many as in the whole group."""
    if settings.micro_batch is None and settings.min_workers is not None and not settings.model.lavis_reduction:
        return -(-settings.batch_size // settings.workers)
    return settings.micro_batch


def _newest(output: str, warn: Callable[[str], object]) -> Path | None:
    """The newest whole checkpoint that the first rank finds: other ranks may get an older listing from a store."""
    newest = newest_whole_checkpoint(output, warn) if rank() == 0 else None
    step = any_text(None if newest is None else str(read_info(newest).step))
    if newest is not None or step is None:
        return newest
    return local_folder(checkpoint_uri(output, int(step)))
