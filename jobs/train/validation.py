"""Validation during a training run: losses from a feed of its own, the best checkpoint, early stopping."""

import dataclasses
import json
import uuid
from collections.abc import Callable, Iterator

from jobs.train.inputs import decode_settings
from jobs.train.reporter import VALIDATION_QUARANTINE_FILE, RunReporter
from jobs.train.worker_job import WorkerJob
from pipelines.data.batches.batch import SampleBatch
from pipelines.data.failures import Failure
from pipelines.data.media.transforms import Augmentation
from pipelines.training.group.feed import rank_batches
from pipelines.training.run.model import Training, TrainingRun
from pipelines.training.step.ranks import of_all_ranks
from pipelines.training.step.validation import Best, BestCheckpoint, read_best, validation_losses
from qformer.distributed import any_text, rank, world_size


class Validation:
    """Computes the validation losses on every rank, and decides whether training goes on.

    Args:
        job: Settings and feeds of the run.
        run: Model that is trained.
        training: Optimizer, objective, precision and moving average of the training.
        reporter: The run's reporter on the first rank; None on others.
        report_progress: Callback after every batch that takes the number of steps done.
    """

    def __init__(
        self,
        job: WorkerJob,
        run: TrainingRun,
        training: Training,
        reporter: RunReporter | None,
        report_progress: Callable[[int], None],
    ) -> None:
        settings = job.settings
        self._feed, self._run = job.validation, run
        self._training, self._reporter, self._report_progress = training, reporter, report_progress
        patience = settings.validation.patience if settings.validation else None
        decode = decode_settings(settings, run.preprocessing, run.audio_sampling)
        self._decode = dataclasses.replace(decode, augmentation=Augmentation(), uses_seeds=False)
        best_json = json.dumps(dataclasses.asdict(read_best(settings.output))) if rank() == 0 else None
        best = Best(**json.loads(str(any_text(best_json))))  # the first rank reads the file for every rank
        self._best = BestCheckpoint(settings.output, best, patience=patience)
        if reporter:
            reporter.checkpoint_writer.best_step = self._best.best.step

    def __call__(self, done: int) -> bool:
        """Validate over the whole evaluation set, unless this step was validated before.

        Args:
            done: Steps done.

        Returns:
            Whether training goes on; the same on every rank.
        """
        if done <= self._best.best.last:
            return self._best.goes_on
        if (feed := self._feed) is None:
            return True
        batches = rank_batches(
            feed.actor,
            attempt=str(any_text(uuid.uuid4().hex)),
            start_step=0,
            total_steps=feed.steps_per_epoch,
            rank=rank(),
            world_size=world_size(),
            source=feed.cache or self._decode,
            job="validation",
        )
        training, stage = self._training, self._run.stage
        failures: list[Failure] = []
        batches = self._collecting(batches, done, failures)
        losses, samples = validation_losses(stage, batches, training.objective, training.precision, training.ema)
        failures = of_all_ranks(failures)
        if self._reporter:
            self._reporter.write_validation_quarantine(failures)
        if not samples:
            if self._reporter:
                self._reporter.log_event(f"ALARM validation at step {done}: no row of the evaluation set is usable")
            return self._best.goes_on
        self._best.see(done, losses["total"])
        goes_on = self._best.goes_on
        if self._reporter:
            best = self._best.best
            try:
                self._best.write()
            except Exception as error:  # a full disk, an unreachable store
                self._reporter.log_event(
                    f"ALARM best.json is not written: {error}; the next validation is the next try"
                )
            self._reporter.checkpoint_writer.best_step = best.step
            self._reporter.metrics_log.write_validation(done, losses)
            terms = "  ".join(f"{name} {value:.4f}" for name, value in losses.items())
            rows = f"{samples} of {feed.rows_per_epoch} rows"
            if failures:
                rows += f" ({len(failures)} could not be used, see {VALIDATION_QUARANTINE_FILE})"
            end = "" if goes_on else f"; training ends after {best.num_worse} validations without a better loss"
            self._reporter.log_event(
                f"validation at step {done} over {rows}: {terms}; best {best.loss:.4f} at step {best.step}{end}"
            )
        return goes_on

    def _collecting(self, batches: Iterator[SampleBatch], done: int, failures: list[Failure]) -> Iterator[SampleBatch]:
        """The same batches; adds their failures to `failures` and reports progress."""
        for batch in batches:
            yield batch
            failures.extend(batch.failures)
            self._report_progress(done)
