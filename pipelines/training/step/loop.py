"""The training loop: batches in, optimizer steps out; no Ray here, one process or many."""

import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pipelines.data.batches.batch import SampleBatch
from pipelines.data.order.global_batches import keyed_hash
from pipelines.training.records.accounting import Accounting
from pipelines.training.records.flops import StepFlops
from pipelines.training.records.health import QueryCollapseMonitor, chance_levels
from pipelines.training.records.run_times import RunTimes
from pipelines.training.step.ema import Ema
from pipelines.training.step.guard import StepGuard
from pipelines.training.step.objective import Objective
from pipelines.training.step.optim import average_gradients, learning_rate
from pipelines.training.step.precision import Precision
from pipelines.training.step.stages import Outcome, Stage
from qformer.distributed import mean_of_ranks, stream_seed, world_size
from qformer.errors import NotFiniteError


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopSettings:
    """What the loop itself needs of the run's settings."""

    steps: int
    steps_per_epoch: int
    rows_per_epoch: int
    learning_rate: float
    min_learning_rate: float
    warmup_steps: int
    clip_norm: float
    checkpoint_every: int
    log_every: int
    seed: int
    max_quarantine_share: float
    validate_every: int | None = None
    """Steps between validations, each of which is a checkpoint too; None: no validation."""


def _nothing(_: object) -> None:
    """What most callbacks of a loop do on most ranks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hooks:
    """What a run does between steps; every rank calls each of them at the same steps."""

    log: Callable[[dict[str, float]], None] = _nothing
    """Takes the figures of a logged step."""
    save: Callable[[int], None] = _nothing
    """Takes a checkpoint after so many steps."""
    validate: Callable[[int], bool] = lambda _: True
    """Looks at the evaluation set after so many steps; False ends the training. The same on all ranks."""
    is_preempted: Callable[[], bool] = lambda: False
    """Asked at logged steps: whether a machine goes away soon, and a checkpoint is wanted now. The same on all ranks.
    """
    beat: Callable[[int], None] = _nothing
    """Called after every step."""


@dataclass(kw_only=True, slots=True)
class Loop:
    """State of a training run on one rank.

    Args:
        stage: Computes losses and gradients.
        call: The trainables, or DDP around them.
        optimizer: Over the trainables, and over the objective's own weights where it learns any.
        objective: Weighs the loss terms.
        precision: In what numbers to compute.
        accounting: Rows so far.
        settings: See `LoopSettings`.
        guard: Leaves out steps whose gradient is not finite.
        queries: Watches the query outputs.
        flops: Counts what the steps compute.
        hooks: See `Hooks`.
        ema: Follows the trainables; None where no average is wanted.
    """

    stage: Stage
    call: Callable[..., Any]
    optimizer: torch.optim.Optimizer
    objective: Objective
    precision: Precision
    accounting: Accounting
    settings: LoopSettings
    guard: StepGuard
    queries: QueryCollapseMonitor
    flops: StepFlops
    hooks: Hooks = Hooks()
    ema: Ema | None = None
    times: RunTimes = field(default_factory=RunTimes)

    def run(self, batches: Iterator[SampleBatch], start_step: int) -> int:
        """Do steps `start_step` to `settings.steps`, or until a validation ends the run.

        Args:
            batches: This rank's batches in step order, beginning at `start_step`.
            start_step: Steps done before.

        Returns:
            Steps done in all.

        Raises:
            UserError: If too many rows are quarantined.
            DivergedError: If several steps in a row had features or gradients that are not finite.
        """
        settings, hooks = self.settings, self.hooks
        begun_s, done = time.perf_counter(), start_step
        outcome: Outcome | None = None  # of the last step that was not left out
        figures: dict[str, float] = {}
        if self._is_validated(start_step) and start_step and not hooks.validate(start_step):
            return start_step  # it had ended so, or died before it could say
        self.stage.trainables.train()
        window = _Window(self.flops.total)
        for step in range(start_step, settings.steps):
            batch = self._next(batches, window)
            epoch, done = step // settings.steps_per_epoch, step + 1
            is_last = done == settings.steps
            self.accounting.add(batch, epoch)
            outcome, figures = self._guarded_step(batch, step) or (outcome, figures)
            is_preempted = False
            if done % settings.log_every == 0 or is_last:
                self.accounting.combine()
                if outcome is not None:
                    names = {"batch_ids": batch_fingerprint(batch.sample_ids)}
                    values = self._log_values(outcome, figures, window, done)
                    hooks.log({"step": done, "epoch": epoch, **names, **values})
                window = _Window(self.flops.total)
                self.accounting.check(
                    epoch=epoch, rows_per_epoch=settings.rows_per_epoch, max_share=settings.max_quarantine_share
                )
                is_preempted = hooks.is_preempted()
            is_validated = self._is_validated(done)
            if done % settings.checkpoint_every == 0 or is_last or is_validated or is_preempted:
                self.accounting.combine()
                hooks.save(done)
            hooks.beat(done)
            if is_validated:
                paused_s = time.perf_counter()
                if not hooks.validate(done):
                    break
                self.stage.trainables.train()
                window.begun_s += time.perf_counter() - paused_s
                begun_s += time.perf_counter() - paused_s
        self.times.wall_s += time.perf_counter() - begun_s
        return done

    def _next(self, batches: Iterator[SampleBatch], window: "_Window") -> SampleBatch:
        before_s = time.perf_counter()
        batch = next(batches)
        wait_s = time.perf_counter() - before_s
        window.waited_s += wait_s
        window.samples += int(batch.is_valid.sum())
        self.times.add(batch, wait_s)
        return batch

    def _guarded_step(self, batch: SampleBatch, step: int) -> tuple[Outcome, dict[str, float]] | None:
        """What came of a step; None where its features are not finite, and it was left out."""
        try:
            self.flops.add(batch.images.shape, functools.partial(self._backward, batch, step, is_rehearsal=True))
            return self._step(batch, step)
        except NotFiniteError as error:  # on all ranks
            self.optimizer.zero_grad(set_to_none=True)
            self.guard.leave_out(step, str(error), batch.sample_ids)
            return None

    def _is_validated(self, done: int) -> bool:
        every = self.settings.validate_every
        return every is not None and (done % every == 0 or done == self.settings.steps)

    def _backward(self, batch: SampleBatch, step: int, is_rehearsal: bool = False) -> Outcome:
        # Dropout of a step is a function of (seed, step, rank), so that a resumed run draws the same; negatives are one
        # of (seed, step) alone, so that another number of ranks does.
        torch.manual_seed(stream_seed("dropout", self.settings.seed, step))
        noise_key = keyed_hash("negatives", self.settings.seed, step) >> 1
        self.objective.scale, num_truncated = self.precision.scale, self.stage.num_truncated
        outcome = self.stage.backward(self.call, batch, noise_key, self.objective, self.precision)
        if is_rehearsal:
            self.stage.num_truncated = num_truncated
            self.optimizer.zero_grad(set_to_none=True)
        return outcome

    def _step(self, batch: SampleBatch, step: int) -> tuple[Outcome, dict[str, float]]:
        settings, optimizer, objective = self.settings, self.optimizer, self.objective
        rate = learning_rate(
            step,
            peak=settings.learning_rate,
            minimum=settings.min_learning_rate,
            warmup_steps=settings.warmup_steps,
            total_steps=settings.steps,
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        outcome = self._backward(batch, step)
        if self.call is self.stage.trainables:  # and not DDP
            average_gradients(self.stage.trainables)
        self.precision.unscale(optimizer)
        norm = float(nn.utils.clip_grad_norm_(self.stage.trainables.parameters(), settings.clip_norm))
        # Norms are the same on all ranks, so that all of them come here or none.
        is_bad = not math.isfinite(norm) and not math.isfinite(mean_of_ranks(float(sum(outcome.losses.values()))))
        is_overflow = self.precision.overflowed(norm, has_finite_losses=not is_bad)
        if not is_overflow and self.guard.admits(step, norm, outcome.losses, batch.sample_ids):
            if objective.log_variances is not None:
                objective.learn(_means(outcome))
            optimizer.step()
            if self.ema is not None:
                self.ema.update(step)
        optimizer.zero_grad(set_to_none=True)
        return outcome, {"learning_rate": rate, "gradient_norm": norm}

    def _log_values(
        self, outcome: Outcome, figures: dict[str, float], window: "_Window", done: int
    ) -> dict[str, float]:
        """Loss terms as means over ranks beside chance, and how fast the last window went."""
        means, cosine = _means(outcome), mean_of_ranks(float(outcome.query_cosine))
        self.queries.update(cosine, done)
        elapsed_s = window.elapsed_s
        rate = mean_of_ranks(window.samples) * world_size() / elapsed_s
        return {
            "loss/total": self.objective.total(means),
            **{f"loss/{name}": value for name, value in means.items()},
            **{f"chance/{name}": value for name, value in chance_levels(means, int(outcome.num_samples)).items()},
            **{f"weight/{name}": value for name, value in self.objective.learned_weights().items()},
            "query_cosine": cosine,
            **figures,
            "samples_per_s": rate,
            "data_wait_share": mean_of_ranks(window.waited_s) / elapsed_s,
            **self.flops.figures(self.flops.total - window.first_flops, elapsed_s),
            "rows_quarantined": float(self.accounting.rows_quarantined),
            "bad_steps": float(self.guard.num_bad),
            "gradient_norm_spikes": float(self.guard.num_spikes),
            **self.precision.figures(),
            **self.times.window(),
        }


@dataclass(slots=True)
class _Window:
    """Since the last logged step."""

    first_flops: float
    begun_s: float = field(default_factory=time.perf_counter)
    waited_s: float = 0.0
    samples: int = 0

    @property
    def elapsed_s(self) -> float:
        return max(time.perf_counter() - self.begun_s, 1e-9)


def batch_fingerprint(sample_ids: list[str]) -> int:
    """A 32-bit digest of the samples in a global batch, however many ranks share it."""
    own = sum(keyed_hash("batch", name) >> 32 for name in sample_ids if name)
    return round(mean_of_ranks(own) * world_size()) % 2**32


def _means(outcome: Outcome) -> dict[str, float]:
    """Loss terms as means over ranks; every rank must call."""
    return {name: mean_of_ranks(float(value)) for name, value in outcome.losses.items()}
