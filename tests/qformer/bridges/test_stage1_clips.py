"""Stage 1 of every way to join frames: gradient caching, ranks, and texts of a batch over one set of keys."""

import contextlib

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from pipelines.training.step.objective import Objective
from qformer.objectives import Negatives
from qformer.objectives.gradient_cache import cached_losses
from tests.distributed import run_processes
from tests.qformer.bridges.clips import CLOSE, JOINED, WAYS, batch, stage1
from tests.qformer.objectives.test_stage1 import take

IS_FRAME = torch.tensor([[True, False, True], [True, True, True], [True, False, False], [True, True, False]])
TERMS = ("itc", "itm", "itg", "diversity")


def losses_and_gradients(model, full, **arguments):
    losses = model(full, **arguments)
    losses.total.backward()
    return {name: getattr(losses, name).detach() for name in ("itc", "itm", "itg")}, gradients(model)


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("temporal", WAYS)
def test_gradient_caching_equals_the_whole_batch(temporal):
    full = batch(4, 3, is_frame=IS_FRAME)
    whole = losses_and_gradients(stage1(temporal), full, noise_key=9)
    model = stage1(temporal)
    objective = Objective(TERMS, {"diversity": 0.0})
    terms, _ = cached_losses(
        model, full, micro_batch=2, noise_key=9, backward=objective.backward, autocast=contextlib.nullcontext
    )
    assert_same((terms, gradients(model)), whole)


def joined_in_two_ranks(rank, world, folder):
    """Each rank wants clips of the other, whose frames are padded otherwise."""
    for temporal in WAYS:
        full = batch(4, 3, is_frame=IS_FRAME)
        rows = slice(rank * 2, rank * 2 + 2)
        others = Negatives(torch.tensor([2, 3, 0, 0]), torch.tensor([1, 2, 3, 0]), torch.ones(4, dtype=torch.bool))
        model = stage1(temporal)
        call = DistributedDataParallel(model)
        losses = call(take(full, rows), negatives=Negatives(*(values[rows] for values in others)))
        losses.total.backward()
        whole = torch.load(folder / f"{temporal}.pt")
        for name, gradient in whole.items():
            found = model.get_parameter(name).grad
            torch.testing.assert_close(found, gradient, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def test_two_ranks_equal_one(tmp_path):
    others = Negatives(torch.tensor([2, 3, 0, 0]), torch.tensor([1, 2, 3, 0]), torch.ones(4, dtype=torch.bool))
    for temporal in WAYS:
        _, expected = losses_and_gradients(stage1(temporal), batch(4, 3, is_frame=IS_FRAME), negatives=others)
        torch.save(expected, tmp_path / f"{temporal}.pt")
    run_processes(joined_in_two_ranks, 2, tmp_path)


@pytest.mark.parametrize("temporal", JOINED)
@torch.no_grad()
def test_matching_many_pairs_at_once_equals_each_alone(temporal):
    """One set of keys and values and one mask serve an image's own and its negative text."""
    model, full = stage1(temporal).eval(), batch(4, 3, is_frame=IS_FRAME)
    others = Negatives(torch.tensor([1, 2, 3, 0]), torch.tensor([3, 0, 1, 2]), torch.ones(4, dtype=torch.bool))
    encoded = model.encode(full)
    total, count = model.match(full, encoded, model._others(full, encoded, others))
    pairs = [(clip, clip, 1) for clip in range(4)]
    pairs += [(clip, int(others.text_B[clip]), 0) for clip in range(4)]
    pairs += [(int(others.image_B[text]), text, 0) for text in range(4)]
    expected = torch.zeros(())
    for clip, text, label in pairs:
        one, seen_text = slice(clip, clip + 1), slice(text, text + 1)
        seen = model.perceive(full.image_BFPV[one], full.is_frame_BF[one])
        image = model.qformer.image_key_values(seen.tokens_BFPV.flatten(0, 1))
        logits = model.match_logits(image, full.input_ids_BT[seen_text], full.is_text_BT[seen_text], 1, seen)
        expected = expected + torch.nn.functional.cross_entropy(logits, torch.tensor([label]))
    assert count == 12
    torch.testing.assert_close(total, expected, **CLOSE)
