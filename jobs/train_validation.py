"""The validation of a training run: its own feed, and what a lower or higher loss leads to."""

import dataclasses
import uuid
from typing import Any

from jobs.settings import TrainSettings
from jobs.train_inputs import decode_settings
from jobs.train_reporter import Reporter
from pipelines.data.transforms import Augmentation
from pipelines.training.feed import rank_batches
from pipelines.training.run import Training, TrainingRun
from pipelines.training.validation import BestCheckpoint, validation_losses
from qformer.distributed import any_text, rank, world_size


class Validation:
    """Called after so many steps on every rank; returns whether training goes on.

    Args:
        arguments: Of the worker.
        settings: Of the run.
        run: Being trained.
        training: What changes with it.
        reporter: On the first rank.
        start_step: Steps done before.
    """

    def __init__(
        self,
        arguments: dict[str, Any],
        settings: TrainSettings,
        run: TrainingRun,
        training: Training,
        reporter: Reporter | None,
        start_step: int,
    ) -> None:
        self._arguments, self._settings, self._run = arguments, settings, run
        self._training, self._reporter = training, reporter
        patience = settings.validation.patience if settings.validation else None
        decode = decode_settings(settings, run.preprocessing)
        self._decode = dataclasses.replace(decode, augmentation=Augmentation())
        self._best = BestCheckpoint(settings.output, patience=patience, start_step=start_step)
        if reporter:
            reporter.writer.best_step = self._best.best.step

    def __call__(self, done: int) -> bool:
        """Compute the losses of the whole evaluation set."""
        batches = rank_batches(
            self._arguments["validation_feed"],
            attempt=str(any_text(uuid.uuid4().hex)),
            start_step=0,
            total_steps=self._arguments["validation_steps"],
            rank=rank(),
            world_size=world_size(),
            source=self._arguments["validation_cache"] or self._decode,
        )
        training = self._training
        losses, samples = validation_losses(
            self._run.stage, batches, training.objective, training.precision, training.ema
        )
        goes_on = self._best.see(done, losses["total"])
        if self._reporter:
            best = self._best.best
            self._best.write()
            self._reporter.writer.best_step = best.step
            self._reporter.log.validated(done, losses)
            told = "  ".join(f"{name} {value:.4f}" for name, value in losses.items())
            rows = f"{samples} of {self._arguments['validation_rows']} rows"
            end = "" if goes_on else f"; the training ends, for {best.num_worse} validations brought nothing better"
            self._reporter.say(
                f"validation at step {done} over {rows}: {told}; best {best.loss:.4f} at step {best.step}{end}"
            )
        return goes_on
