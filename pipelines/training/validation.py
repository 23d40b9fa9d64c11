"""Losses over the evaluation set, the best checkpoint so far, and when to stop for want of a better one."""

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch

from pipelines.data import storage
from pipelines.data.batch import SampleBatch
from pipelines.data.order import keyed_hash
from pipelines.training.ema import Ema
from pipelines.training.objective import Objective
from pipelines.training.precision import Precision
from pipelines.training.stages import Stage
from qformer.distributed import mean_of_ranks

BEST_FILE = "best.json"


@dataclass(frozen=True, slots=True)
class Best:
    """RUN/best.json: the checkpoint with the lowest validation loss."""

    step: int = 0
    """Optimizer steps done at it; 0: there is none yet."""
    loss: float = math.inf
    num_worse: int = 0
    """Validations since then."""


def validation_losses(
    stage: Stage, batches: Iterator[SampleBatch], objective: Objective, precision: Precision, ema: Ema | None
) -> tuple[dict[str, float], int]:
    """Mean loss terms over all batches, each counted by its samples; every rank must call.

    Without dropout, with the moving average where there is one, and with the same negatives every time.

    Args:
        stage: Being trained.
        batches: This rank's, which hold every row of the evaluation set once over all ranks.
        objective: Of the training, for "total".
        precision: Of the training.
        ema: Of the training.

    Returns:
        The terms and their "total", and how many samples they are the mean of.
    """
    silent = Objective(stage.terms, dict.fromkeys(stage.terms, 0.0))
    sums, samples, num_truncated = dict.fromkeys(stage.terms, 0.0), 0, stage.num_truncated
    stage.trainables.eval()
    with torch.no_grad(), contextlib.nullcontext() if ema is None else ema.in_place():
        for batch in batches:
            noise_key = keyed_hash("validation", batch.step) >> 1
            outcome = stage.backward(stage.trainables, batch, noise_key, silent, precision)
            count = int(outcome.num_samples)
            for name, value in outcome.losses.items():
                sums[name] += count * mean_of_ranks(float(value))
            samples += count
    stage.num_truncated = num_truncated  # counts the texts of the training
    means = {name: value / max(1, samples) for name, value in sums.items()}
    return {"total": objective.total(means), **means}, samples


class BestCheckpoint:
    """Keeps RUN/best.json.

    Args:
        output: Run folder.
        patience: So many validations in a row without a better one end the training; None: none do.
        start_step: Steps done before; what a run that died had found later is forgotten.
    """

    def __init__(self, output: str, *, patience: int | None, start_step: int) -> None:
        self._uri, self._patience = storage.join(output, BEST_FILE), patience
        found = read_best(output)
        self.best = found if found.step <= start_step else Best()

    def see(self, step: int, loss: float) -> bool:
        """Take in a validation; False when training should end."""
        if loss < self.best.loss:
            self.best = Best(step, loss)
        else:
            self.best = Best(self.best.step, self.best.loss, self.best.num_worse + 1)
        return self._patience is None or self.best.num_worse < self._patience

    def write(self) -> None:
        """Write best.json; the first rank's task."""
        storage.write_text(self._uri, json.dumps(asdict(self.best)) + "\n")


def read_best(output: str) -> Best:
    """The best checkpoint of a run so far."""
    uri = storage.join(output, BEST_FILE)
    if not storage.exists(uri):
        return Best()
    return Best(**json.loads(storage.read_bytes(uri, 10_000)))
