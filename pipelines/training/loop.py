"""The training loop: batches in, optimizer steps out; no Ray here, one process or many."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.data.batch import SampleBatch
from pipelines.training.accounting import Accounting
from pipelines.training.ema import Ema
from pipelines.training.guard import StepGuard
from pipelines.training.optim import learning_rate
from pipelines.training.run_times import RunTimes
from pipelines.training.stages import Stage
from qformer.distributed import mean_of_ranks, stream_seed, world_size


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
    precision: str = "fp32"


@dataclass(slots=True)
class Loop:
    """State of a training run on one rank.

    Args:
        stage: Computes the losses.
        call: The trainables, or DDP around them.
        optimizer: Over the trainables.
        accounting: Rows so far.
        settings: See `LoopSettings`.
        log: Called on every rank at each logged step; only the first rank's has an effect.
        save: Called on every rank when a checkpoint is due, with the number of steps done.
        guard: Leaves out steps whose gradient is not finite.
        ema: Follows the trainables; None where no average is wanted.
    """

    stage: Stage
    call: Callable[..., Any]
    optimizer: torch.optim.Optimizer
    accounting: Accounting
    settings: LoopSettings
    log: Callable[[dict[str, float]], None]
    save: Callable[[int], None]
    guard: StepGuard
    ema: Ema | None = None
    times: RunTimes = field(default_factory=RunTimes)

    def run(self, batches: Iterator[SampleBatch], start_step: int) -> None:
        """Do steps `start_step` to `settings.steps`.

        Args:
            batches: This rank's batches in step order, beginning at `start_step`.
            start_step: Steps done before.

        Raises:
            UserError: If too many rows are quarantined.
            ValueError: If the gradients of several steps in a row are not finite.
        """
        settings = self.settings
        self.stage.trainables.train()
        begun = window_start = time.perf_counter()
        waited_s, samples = 0.0, 0
        for step in range(start_step, settings.steps):
            before = time.perf_counter()
            batch = next(batches)
            wait_s = time.perf_counter() - before
            waited_s += wait_s
            self.times.add(batch, wait_s)
            epoch = step // settings.steps_per_epoch
            self.accounting.add(batch, epoch)
            samples += int(batch.is_valid.sum())
            losses, gradient_norm, rate = self._step(batch, step)
            done = step + 1
            is_last = done == settings.steps
            if done % settings.log_every == 0 or is_last:
                self.accounting.combine()
                elapsed_s = time.perf_counter() - window_start
                values = self._log_values(losses, gradient_norm, rate, samples, elapsed_s, waited_s)
                self.log({"step": done, "epoch": epoch, **values})
                window_start, waited_s, samples = time.perf_counter(), 0.0, 0
                self.accounting.check(
                    epoch=epoch, rows_per_epoch=settings.rows_per_epoch, max_share=settings.max_quarantine_share
                )
            if done % settings.checkpoint_every == 0 or is_last:
                self.accounting.combine()
                self.save(done)
        self.times.wall_s += time.perf_counter() - begun

    def _step(self, batch: SampleBatch, step: int) -> tuple[dict[str, Tensor], Tensor, float]:
        settings = self.settings
        rate = learning_rate(
            step,
            peak=settings.learning_rate,
            minimum=settings.min_learning_rate,
            warmup_steps=settings.warmup_steps,
            total_steps=settings.steps,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # Dropout of a step is a function of (seed, step, rank), so that a resumed run draws the same.
        torch.manual_seed(stream_seed("dropout", settings.seed, step))
        with self._autocast():
            losses = self.stage.losses(self.call, batch, step)
        losses["total"].backward()
        gradient_norm = nn.utils.clip_grad_norm_(self.stage.trainables.parameters(), settings.clip_norm)
        if self.guard.admits(step, float(gradient_norm), losses, batch.sample_ids):
            self.optimizer.step()
            if self.ema is not None:
                self.ema.update(step)
        self.optimizer.zero_grad(set_to_none=True)
        return losses, gradient_norm, rate

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.settings.precision == "fp32":
            return contextlib.nullcontext()
        device = next(self.stage.trainables.parameters()).device
        return torch.autocast(device.type, dtype=torch.bfloat16)

    def _log_values(
        self,
        losses: dict[str, Tensor],
        gradient_norm: Tensor,
        rate: float,
        samples: int,
        elapsed_s: float,
        waited_s: float,
    ) -> dict[str, float]:
        """Loss terms as means over ranks, and how fast the last window went."""
        means = {f"loss/{name}": mean_of_ranks(float(value.detach())) for name, value in losses.items()}
        return {
            **means,
            "learning_rate": rate,
            "gradient_norm": float(gradient_norm),
            "samples_per_s": mean_of_ranks(samples) * world_size() / max(elapsed_s, 1e-9),
            "data_wait_share": mean_of_ranks(waited_s) / max(elapsed_s, 1e-9),
            "rows_quarantined": float(self.accounting.rows_quarantined),
            "bad_steps": float(self.guard.num_bad),
            "gradient_norm_spikes": float(self.guard.num_spikes),
            **self.times.window(),
        }
