"""Loss terms of weight 0 on two ranks: parameters that only they would move have no gradient anywhere."""

import torch

from pipelines.training.step.optim import average_gradients
from tests.distributed import run_processes
from tests.pipelines.training.loops import backward
from tests.pipelines.training.step.test_generation_ranks import joined_batch, make_stage1, part


def two_steps(rank, world, folder):
    expected = torch.load(folder / "gradients.pt")
    stage = make_stage1()
    for _ in range(2):
        stage.trainables.zero_grad(set_to_none=True)
        backward(stage, part(joined_batch(), slice(rank * 3, rank * 3 + 3)), itm=0.0)
        average_gradients(stage.trainables)
    for name, parameter in stage.trainables.named_parameters():
        if expected[name] is None:
            assert parameter.grad is None, name
        else:
            torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-3, msg=name)


def test_a_term_without_weight_needs_no_ddp(tmp_path):
    stage = make_stage1()
    backward(stage, joined_batch(), itm=0.0)
    gradients = {name: parameter.grad for name, parameter in stage.trainables.named_parameters()}
    assert gradients["itm_head.weight"] is None and gradients["text_projection.weight"] is not None
    torch.save(gradients, tmp_path / "gradients.pt")
    run_processes(two_steps, 2, tmp_path)
