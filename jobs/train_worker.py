"""What one rank of `qformer train` does: build or restore the run, train, and tell what came of it."""

import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from ray.train.torch import get_device
from torch.nn.parallel import DistributedDataParallel

from jobs.run_folder import QUARANTINE_FILE
from jobs.settings import TrainSettings
from jobs.settings_loading import resolved_yaml
from jobs.train_inputs import decode_settings, tokenizer_folder
from pipelines.data import storage
from pipelines.data.batch import SampleBatch
from pipelines.data.checkpoint_folders import newest_whole_checkpoint
from pipelines.data.features import FeatureCache
from pipelines.data.manifest import write_table
from pipelines.training.accounting import Accounting, TooManyQuarantinedError
from pipelines.training.checkpoint_writer import CheckpointError, CheckpointWriter
from pipelines.training.ema import Ema
from pipelines.training.feed import rank_batches
from pipelines.training.guard import StepGuard
from pipelines.training.loop import Loop, LoopSettings
from pipelines.training.optim import build_optimizer
from pipelines.training.run import TrainingRun, choice_from
from pipelines.training.telemetry import RunLog
from qformer.distributed import any_text, rank, world_size
from qformer.errors import UserError

BAD_STEPS_FILE = "bad_steps.jsonl"


def train_worker(arguments: dict[str, Any]) -> dict[str, Any]:
    """Train on one rank; the first rank's return value is the run's summary.

    A mistake of the user is returned as {"mistake": message}: raised, it would be tried again `max_failures` times.

    Args:
        arguments: settings (dumped), feed and board (actor handles), cache (`FeatureCache` or None), order (its
            fingerprint), rows (of an epoch), steps_per_epoch.
    """
    settings, mistake = TrainSettings.model_validate(arguments["settings"]), None
    try:
        state = _built(arguments, settings)
    except UserError as error:
        mistake = str(error)
    # Other ranks may have come through, and would wait for this one.
    if (mistake := any_text(mistake)) is not None:
        return {"mistake": mistake}
    reporter = _Reporter(arguments, settings, state.start_step) if rank() == 0 else None
    loop = _loop(arguments, settings, state, reporter)
    try:
        loop.run(_batches(arguments, settings, state), state.start_step)
        state.run.assert_frozen()
        if reporter:
            reporter.writer.close()
    except TooManyQuarantinedError as error:  # raised by all ranks at the same step
        mistake = str(error)
    except CheckpointError as error:  # of the last step: no other rank waits for this one any more
        mistake = str(error)
    finally:
        if reporter:
            reporter.log.close()
            write_table(state.accounting.table(), storage.join(settings.output, QUARANTINE_FILE))
    if (mistake := any_text(mistake)) is not None:
        return {"mistake": mistake}
    stages = loop.times.combined(state.run.encode.seconds)
    last = reporter.log.records[-1] if reporter and reporter.log.records else {}
    return {**_summary(settings, state), "last": last, "stages": stages}


@dataclass(frozen=True, kw_only=True, slots=True)
class _State:
    """A run as it starts or goes on."""

    run: TrainingRun
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    accounting: Accounting
    start_step: int
    """Steps done before."""


class _Reporter:
    """The first rank's records: log, checkpoints, bad steps, and lines for the user."""

    def __init__(self, arguments: dict[str, Any], settings: TrainSettings, start_step: int) -> None:
        self.say = arguments["board"].say.remote
        self.log = RunLog(settings.output, arguments["board"], start_step)
        self.writer = CheckpointWriter(settings.output, keep=settings.keep_checkpoints, alarm=self.say)
        self._bad_steps_uri = storage.join(settings.output, BAD_STEPS_FILE)
        self._bad_steps: list[str] = []

    def bad_step(self, values: dict[str, Any]) -> None:
        """Keep what became of a step that was left out."""
        self._bad_steps.append(json.dumps(values) + "\n")
        storage.write_text(self._bad_steps_uri, "".join(self._bad_steps))


def _built(arguments: dict[str, Any], settings: TrainSettings) -> _State:
    choice = choice_from(
        settings.model.model_dump(),
        stage=settings.stage,
        num_frames=settings.data.num_frames,
        sampling=settings.data.sampling.model_dump(mode="json"),
        tokenizer=tokenizer_folder(settings),
    )
    cache: FeatureCache | None = arguments["cache"]
    run = TrainingRun(
        choice,
        get_device(),
        precision=settings.precision,
        seed=settings.seed,
        init_from=settings.init_from,
        features=cache.spec if cache else None,
        is_compiled=settings.compile,
    )
    optim, trainables = settings.optim, run.stage.trainables
    optimizer = build_optimizer(trainables, weight_decay=optim.weight_decay, betas=optim.betas)
    ema = Ema(trainables, optim.ema_decay) if optim.ema_decay is not None else None
    if rank() == 0:
        arguments["board"].say.remote(f"weights {run.load_report}")
    accounting, start_step = Accounting(), 0
    newest = newest_whole_checkpoint(settings.output)
    if newest is not None:
        saved = run.restore(newest, optimizer, order=arguments["order"], ema=ema)
        accounting, start_step = Accounting.from_state(saved.accounting), saved.step
    return _State(run=run, optimizer=optimizer, ema=ema, accounting=accounting, start_step=start_step)


def _batches(arguments: dict[str, Any], settings: TrainSettings, state: _State) -> Iterator[SampleBatch]:
    return rank_batches(
        arguments["feed"],
        attempt=str(any_text(uuid.uuid4().hex)),  # the first rank's, on every rank
        start_step=state.start_step,
        total_steps=settings.steps,
        rank=rank(),
        world_size=world_size(),
        source=arguments["cache"] or decode_settings(settings, state.run.preprocessing),
    )


def _loop(arguments: dict[str, Any], settings: TrainSettings, state: _State, reporter: _Reporter | None) -> Loop:
    run = state.run
    call: torch.nn.Module = run.stage.trainables
    if world_size() > 1:
        device = get_device()
        call = DistributedDataParallel(call, device_ids=[device.index] if device.type == "cuda" else None)

    def save(done: int) -> None:
        if reporter is not None:
            order, yaml = arguments["order"], resolved_yaml(settings)
            reporter.writer.submit(
                run.checkpoint(done, state.optimizer, state.accounting, order=order, settings=yaml, ema=state.ema)
            )

    report, alarm = (reporter.bad_step, reporter.say) if reporter else (_ignore, _ignore)
    return Loop(
        stage=run.stage,
        call=call,
        optimizer=state.optimizer,
        accounting=state.accounting,
        settings=LoopSettings(
            steps=settings.steps,
            steps_per_epoch=arguments["steps_per_epoch"],
            rows_per_epoch=arguments["rows"],
            checkpoint_every=settings.checkpoint_every,
            log_every=settings.log_every,
            seed=settings.seed,
            max_quarantine_share=settings.max_quarantine_share,
            precision=settings.precision,
            **settings.optim.model_dump(exclude={"weight_decay", "betas", "ema_decay"}),
        ),
        log=reporter.log.write if reporter else _ignore,
        save=save,
        guard=StepGuard(settings.max_bad_steps, report, alarm),
        ema=state.ema,
    )


def _summary(settings: TrainSettings, state: _State) -> dict[str, Any]:
    run, accounting = state.run, state.accounting
    return {
        "stage": settings.stage,
        "steps": settings.steps,
        "resumed_from_step": state.start_step,
        "accounting": accounting.line,
        "rows_in": accounting.rows_in,
        "rows_used": accounting.rows_used,
        "rows_quarantined": accounting.rows_quarantined,
        "texts_truncated": run.num_truncated(),
        "load_report": run.load_report,
        "trainable_parameters": sum(p.numel() for p in run.stage.trainables.parameters() if p.requires_grad),
        "trainable_names": run.trainable_names,
        "frozen_sha256": run.fingerprints,
    }


def _ignore(_: object) -> None:
    """Only the first rank keeps records."""
