"""Losses over the evaluation set, the best checkpoint so far, and when to stop for want of a better one."""

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch

from pipelines.data import storage
from pipelines.data.batches.batch import SampleBatch
from pipelines.data.order.global_batches import keyed_hash
from pipelines.training.step.ema import Ema
from pipelines.training.step.objective import Objective
from pipelines.training.step.precision import Precision
from pipelines.training.step.stages import Stage
from qformer.distributed import mean_of_ranks
from qformer.errors import NotFiniteError

BEST_FILE = "best.json"


@dataclass(frozen=True, slots=True)
class Best:
    """RUN/best.json: the checkpoint with the lowest validation loss."""

    step: int = 0
    """Optimizer steps done at it; 0: there is none yet."""
    loss: float = math.inf
    num_worse: int = 0
    """Validations since then."""
    last: int = 0
    """Step of the last validation."""


def validation_losses(
    stage: Stage, batches: Iterator[SampleBatch], objective: Objective, precision: Precision, ema: Ema | None
) -> tuple[dict[str, float], int]:
    """Mean loss terms over all batches, each counted by its samples; every rank must call.

    Without dropout, with the moving average where there is one, and with the same negatives every time.

    Args:
        stage: Being trained.
        batches: This rank's, which hold every row of the evaluation set once over all ranks.
        objective: Objective of the training, for "total".
        precision: Precision of the training.
        ema: Moving average of the weights in training.

    Returns:
        The terms and their "total" under the fixed weights, and how many samples they are the mean of.
    """
    silent = Objective(stage.terms, dict.fromkeys(stage.terms, 0.0))
    sums, samples, num_truncated = dict.fromkeys(stage.terms, 0.0), 0, stage.num_truncated
    stage.trainables.eval()
    with torch.no_grad(), contextlib.nullcontext() if ema is None else ema.in_place():
        for batch in batches:
            noise_key = keyed_hash("validation", batch.step) >> 1
            try:
                outcome = stage.backward(stage.trainables, batch, noise_key, silent, precision)
            except NotFiniteError:  # on all ranks; its samples are missing in the count
                continue
            count = int(outcome.num_samples)
            for name, value in outcome.losses.items():
                sums[name] += count * mean_of_ranks(float(value))
            samples += count
    stage.num_truncated = num_truncated  # counts the texts of the training
    means = {name: value / max(1, samples) for name, value in sums.items()}
    return {"total": objective.fixed_total(means), **means}, samples


class BestCheckpoint:
    """Keeps RUN/best.json.

    Args:
        output: Run folder.
        best: So far; the same on every rank. Steps after the last checkpoint are done again after a crash, but what
            their validations found stays good: the trajectory is the same.
        patience: So many validations in a row without a better one end the training; None: none do.
    """

    def __init__(self, output: str, best: Best, *, patience: int | None) -> None:
        self._uri, self._patience, self.best = storage.join(output, BEST_FILE), patience, best

    @property
    def goes_on(self) -> bool:
        """Whether training does."""
        return self._patience is None or self.best.num_worse < self._patience

    def see(self, step: int, loss: float) -> None:
        """Take in a validation of a step that comes after all others."""
        if loss < self.best.loss:
            self.best = Best(step, loss, last=step)
        else:
            self.best = Best(self.best.step, self.best.loss, self.best.num_worse + 1, last=step)

    def write(self) -> None:
        """Write best.json; the first rank's task."""
        storage.write_text(self._uri, json.dumps(asdict(self.best)) + "\n")


def read_best(output: str) -> Best:
    """The best checkpoint of a run so far."""
    uri = storage.join(output, BEST_FILE)
    if not storage.exists(uri):
        return Best()
    return Best(**json.loads(storage.read_bytes(uri, 10_000)))
