"""fp16 with its loss scale; bf16 and fp32 are compared in test_loop."""

import pytest
import torch

from pipelines.training.step.precision import Precision
from tests.pipelines.training.loops import make_training
from tests.pipelines.training.step.test_loop import make_run, tokenizer, train  # noqa: F401

CPU = torch.device("cpu")


def test_fp16_trains_to_nearly_the_same_losses_and_keeps_its_scale(tokenizer, tmp_path):  # noqa: F811
    logged = {}
    for name in ("fp32", "fp16"):
        run = make_run(1, tokenizer)
        run.stage.trainables.eval()
        training = make_training(run, precision=name)
        logged[name] = train(run, tmp_path / name, training=training)
        assert all(p.dtype == torch.float32 for p in run.stage.trainables.parameters())
    assert logged["fp16"][-1]["loss/total"] == pytest.approx(logged["fp32"][-1]["loss/total"], rel=0.1)
    assert logged["fp16"][-1]["loss_scale"] > 1 and "loss_scale" not in logged["fp32"][-1]
    restored = make_run(1, tokenizer)
    again = make_training(restored, precision="fp16")
    restored.restore(tmp_path / "fp16" / "checkpoints" / "step-00000008", again)
    assert again.precision.state() == training.precision.state() != {}


def test_an_overflow_halves_the_scale_and_is_no_bad_step():
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer, precision = torch.optim.SGD([weight]), Precision("fp16", CPU)
    start = precision.scale
    weight.grad = torch.tensor([float("inf")])
    precision.unscale(optimizer)
    assert (
        precision.overflowed(float("inf"), has_finite_losses=True)
        and precision.scale == start / 2
        and precision.num_overflows == 1
    )
    weight.grad = torch.tensor([3.0 * precision.scale])
    precision.unscale(optimizer)
    assert float(weight.grad) == 3.0 and not precision.overflowed(3.0, has_finite_losses=True)


def test_a_gradient_that_is_not_finite_at_scale_1_is_the_steps_own_fault():
    precision = Precision("fp16", CPU)
    precision.restore({**precision.state(), "scale": 1.0})
    weight = torch.nn.Parameter(torch.ones(1))
    weight.grad = torch.tensor([float("nan")])
    precision.unscale(torch.optim.SGD([weight]))
    assert not precision.overflowed(float("nan"), has_finite_losses=True) and precision.num_overflows == 0


def test_a_loss_that_is_not_finite_is_no_overflow_either():
    precision = Precision("fp16", CPU)
    weight = torch.nn.Parameter(torch.ones(1))
    weight.grad = torch.tensor([float("nan")])
    precision.unscale(torch.optim.SGD([weight]))
    assert not precision.overflowed(float("nan"), has_finite_losses=False) and precision.num_overflows == 0


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_other_precisions_do_not_scale(name):
    precision = Precision(name, CPU)
    assert (
        precision.scale == 1.0
        and precision.figures() == {}
        and not precision.overflowed(float("inf"), has_finite_losses=True)
    )
