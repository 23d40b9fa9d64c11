"""Loops and single steps as the training makes them, for tests that look at one part."""

import torch

from pipelines.training.records.accounting import Accounting
from pipelines.training.records.flops import StepFlops
from pipelines.training.records.health import QueryCollapseMonitor
from pipelines.training.run.model import Training
from pipelines.training.step.guard import StepGuard
from pipelines.training.step.loop import Hooks, Loop
from pipelines.training.step.objective import Objective
from pipelines.training.step.optim import build_optimizer
from pipelines.training.step.precision import Precision

CPU = torch.device("cpu")


def make_objective(stage, *, is_learned=False, **weights):
    return Objective(stage.terms, {"diversity": 0.0, **weights}, is_learned=is_learned)


def make_training(run, *, precision="fp32", ema=None, is_learned=False, **weights):
    objective = make_objective(run.stage, is_learned=is_learned, **weights)
    extra = [] if objective.log_variances is None else [objective.log_variances]
    optimizer = build_optimizer(run.stage.trainables, weight_decay=0.05, betas=(0.9, 0.98), extra=extra)
    numbers = Precision(precision, CPU)
    return Training(optimizer=optimizer, objective=objective, precision=numbers, ema=ema, order="order")


def make_loop(run, settings, *, training=None, call=None, accounting=None, guard=None, alarm=print, **hooks):
    training = training or make_training(run)
    return Loop(
        stage=run.stage,
        call=call or run.stage.trainables,
        optimizer=training.optimizer,
        objective=training.objective,
        precision=training.precision,
        accounting=accounting or Accounting(),
        settings=settings,
        guard=guard or StepGuard(1, print, print),
        queries=QueryCollapseMonitor(alarm),
        flops=StepFlops(CPU),
        hooks=Hooks(**hooks),
        ema=training.ema,
    )


def backward(stage, batch, *, call=None, noise_key=0, **weights):
    """Loss terms of a step and their total, as numbers, after their gradients were added up."""
    objective = make_objective(stage, **weights)
    used = objective if torch.is_grad_enabled() else Objective(stage.terms, dict.fromkeys(stage.terms, 0.0))
    outcome = stage.backward(call or stage.trainables, batch, noise_key, used, Precision("fp32", CPU))
    losses = {name: float(value) for name, value in outcome.losses.items()}
    return {**losses, "total": objective.total(losses)}
