"""Stage 1 of every way to join frames: gradient caching, ranks, and texts of a batch over one set of keys."""

import contextlib

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from pipelines.training.step.objective import Objective
from qformer.bridges.protocol import BridgeInput, BridgeText
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
    return {name: losses.terms[name].detach() for name in TERMS}, gradients(model)


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", WAYS)
def test_gradient_caching_equals_the_whole_batch(kind):
    full = batch(4, 3, is_frame=IS_FRAME)
    whole = losses_and_gradients(stage1(kind), full, noise_key=9)
    model = stage1(kind)
    objective = Objective(TERMS, {"diversity": 0.0})
    losses = cached_losses(
        model, full, micro_batch=2, noise_key=9, backward=objective.backward, autocast=contextlib.nullcontext
    )
    assert_same((losses.terms, gradients(model)), whole)


def joined_in_two_ranks(rank, world, folder):
    """Each rank wants clips of the other, whose frames are padded otherwise."""
    for kind in WAYS:
        full = batch(4, 3, is_frame=IS_FRAME)
        rows = slice(rank * 2, rank * 2 + 2)
        others = Negatives(torch.tensor([2, 3, 0, 0]), torch.tensor([1, 2, 3, 0]), torch.ones(4, dtype=torch.bool))
        model = stage1(kind)
        call = DistributedDataParallel(model)
        losses = call(take(full, rows), negatives=Negatives(*(values[rows] for values in others)))
        losses.total.backward()
        whole = torch.load(folder / f"{kind}.pt")
        for name, gradient in whole.items():
            found = model.get_parameter(name).grad
            torch.testing.assert_close(found, gradient, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def test_two_ranks_equal_one(tmp_path):
    others = Negatives(torch.tensor([2, 3, 0, 0]), torch.tensor([1, 2, 3, 0]), torch.ones(4, dtype=torch.bool))
    for kind in WAYS:
        _, expected = losses_and_gradients(stage1(kind), batch(4, 3, is_frame=IS_FRAME), negatives=others)
        torch.save(expected, tmp_path / f"{kind}.pt")
    run_processes(joined_in_two_ranks, 2, tmp_path)


@pytest.mark.parametrize("kind", JOINED)
@torch.no_grad()
def test_matching_many_pairs_at_once_equals_each_alone(kind):
    """One set of keys and values and one mask serve an image's own and its negative text."""
    model, full = stage1(kind).eval(), batch(4, 3, is_frame=IS_FRAME)
    others = Negatives(torch.tensor([1, 2, 3, 0]), torch.tensor([3, 0, 1, 2]), torch.ones(4, dtype=torch.bool))
    given = model.given(full, 0)
    image = model.encode_image(given)
    total, count = model.match(full, given, image.keys, model.negative_pairs(full, image, others))
    pairs = [(clip, clip, 1) for clip in range(4)]
    pairs += [(clip, int(others.text_B[clip]), 0) for clip in range(4)]
    pairs += [(int(others.image_B[text]), text, 0) for text in range(4)]
    expected = torch.zeros(())
    for clip, text, label in pairs:
        one, its_text = slice(clip, clip + 1), slice(text, text + 1)
        alone = BridgeInput(full.image_BFPV[one], full.is_frame_BF[one])
        keys = model.bridge.keys(model.bridge.perceive(alone))
        words = BridgeText(full.input_ids_BT[its_text], full.is_text_BT[its_text])
        logits = model.match_logits(keys, words, alone)
        expected = expected + torch.nn.functional.cross_entropy(logits, torch.tensor([label]))
    assert count == 12
    torch.testing.assert_close(total, expected, **CLOSE)
