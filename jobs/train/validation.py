"""The validation of a training run: its own feed, and what a lower or higher loss leads to."""

import dataclasses
import json
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from jobs.settings.jobs import TrainSettings
from jobs.train.inputs import decode_settings
from jobs.train.reporter import VALIDATION_QUARANTINE_FILE, Reporter
from pipelines.data.batches.batch import SampleBatch
from pipelines.data.failures import Failure
from pipelines.data.media.transforms import Augmentation
from pipelines.training.group.feed import rank_batches
from pipelines.training.run.model import Training, TrainingRun
from pipelines.training.step.ranks import of_all_ranks
from pipelines.training.step.validation import Best, BestCheckpoint, read_best, validation_losses
from qformer.distributed import any_text, rank, world_size


class Validation:
    """Called after so many steps on every rank; returns whether training goes on.

    Args:
        arguments: Of the worker.
        settings: Of the run.
        run: Being trained.
        training: What changes with it.
        reporter: On the first rank.
        beat: Told after every batch, with the number of steps done.
    """

    def __init__(
        self,
        arguments: dict[str, Any],
        settings: TrainSettings,
        run: TrainingRun,
        training: Training,
        reporter: Reporter | None,
        beat: Callable[[int], None],
    ) -> None:
        self._arguments, self._settings, self._run = arguments, settings, run
        self._training, self._reporter, self._beat = training, reporter, beat
        patience = settings.validation.patience if settings.validation else None
        decode = decode_settings(settings, run.preprocessing, run.audio_sampling)
        self._decode = dataclasses.replace(decode, augmentation=Augmentation(), uses_seeds=False)
        found = json.dumps(dataclasses.asdict(read_best(settings.output))) if rank() == 0 else None
        best = Best(**json.loads(str(any_text(found))))  # as the first rank sees the file, on every rank
        self._best = BestCheckpoint(settings.output, best, patience=patience)
        if reporter:
            reporter.writer.best_step = self._best.best.step

    def __call__(self, done: int) -> bool:
        """Compute the losses of the whole evaluation set; of a step that was validated before, nothing."""
        if done <= self._best.best.last:
            return self._best.goes_on
        batches = rank_batches(
            self._arguments["validation_feed"],
            attempt=str(any_text(uuid.uuid4().hex)),
            start_step=0,
            total_steps=self._arguments["validation_steps"],
            rank=rank(),
            world_size=world_size(),
            source=self._arguments["validation_cache"] or self._decode,
            job="validation",
        )
        training, stage = self._training, self._run.stage
        failures: list[Failure] = []
        watched = self._watched(batches, done, failures)
        losses, samples = validation_losses(stage, watched, training.objective, training.precision, training.ema)
        failures = of_all_ranks(failures)
        if self._reporter:
            self._reporter.write_validation_quarantine(failures)
        if not samples:
            if self._reporter:
                self._reporter.say(f"ALARM validation at step {done}: not one row of the evaluation set could be used")
            return self._best.goes_on
        self._best.see(done, losses["total"])
        goes_on = self._best.goes_on
        if self._reporter:
            best = self._best.best
            try:
                self._best.write()
            except Exception as error:  # a full disk, a store that is away
                self._reporter.say(f"ALARM best.json is not written: {error}; the next validation is the next try")
            self._reporter.writer.best_step = best.step
            self._reporter.log.validated(done, losses)
            told = "  ".join(f"{name} {value:.4f}" for name, value in losses.items())
            rows = f"{samples} of {self._arguments['validation_rows']} rows"
            if failures:
                rows += f" ({len(failures)} could not be used, see {VALIDATION_QUARANTINE_FILE})"
            end = "" if goes_on else f"; the training ends, for {best.num_worse} validations brought nothing better"
            self._reporter.say(
                f"validation at step {done} over {rows}: {told}; best {best.loss:.4f} at step {best.step}{end}"
            )
        return goes_on

    def _watched(self, batches: Iterator[SampleBatch], done: int, failures: list[Failure]) -> Iterator[SampleBatch]:
        for batch in batches:
            yield batch
            failures.extend(batch.failures)
            self._beat(done)
