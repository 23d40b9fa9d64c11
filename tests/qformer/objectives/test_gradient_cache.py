"""Gradient caching against the plain large batch: losses and gradients, in one process and in two."""

import contextlib
import dataclasses
import weakref
from unittest import mock

import pytest
import torch

from pipelines.training.step.objective import Objective
from pipelines.training.step.optim import average_gradients
from qformer.distributed import mean_of_ranks
from qformer.objectives.gradient_cache import cached_losses
from qformer.objectives.stage1 import Stage1
from tests.distributed import run_processes
from tests.qformer.objectives.test_stage1 import CONFIG, JOINED, batch, model, take

RELATIVE = 1e-5
"""Of a tensor's largest gradient: fp32 sums in another order; 2e-6 was measured."""
TERMS = ("itc", "itm", "itg", "diversity")
WEIGHTS = {"itc": 1.0, "itm": 0.7, "itg": 1.3, "diversity": 0.5}
CASES = {**JOINED, "clips": batch(6, frames=2, seed=4)}


def plain_step(stage1, full):
    """Losses and gradients with all samples at once."""
    losses = stage1(full, noise_key=9)
    Objective(TERMS, WEIGHTS).backward(losses.terms)
    return {name: value.detach() for name, value in losses.terms.items()}, losses.passes.hidden_GQD.detach()


def cached_step(stage1, full, micro_batch, weights=WEIGHTS):
    objective = Objective(TERMS, weights)
    losses = cached_losses(
        stage1,
        full,
        micro_batch=micro_batch,
        noise_key=9,
        backward=objective.backward,
        autocast=contextlib.nullcontext,
    )
    return losses.terms, losses.passes.hidden_GQD


def assert_equal_gradients(found, expected, told):
    for name, gradient in expected.items():
        gap, largest = float((found[name] - gradient).abs().max()), float(gradient.abs().max())
        # A key's bias has a gradient of zero but for rounding, which the softmax cancels.
        assert gap <= RELATIVE * largest + 1e-7, (*told, name, gap, largest)


def gradients(stage1):
    return {name: parameter.grad for name, parameter in stage1.named_parameters()}


@pytest.mark.parametrize("micro_batch", [1, 4, 6])
@pytest.mark.parametrize("case", CASES)
def test_it_equals_the_plain_large_batch(case, micro_batch):
    plain, cached, full = model(), model(), CASES[case]
    expected, hidden = plain_step(plain, full)
    found, cached_hidden = cached_step(cached, full, micro_batch)
    for name in TERMS:
        assert float(found[name]) == pytest.approx(float(expected[name]), rel=RELATIVE), name
    torch.testing.assert_close(cached_hidden, hidden)
    assert_equal_gradients(gradients(cached), gradients(plain), (case, micro_batch))


def ranks_equal_one(rank, world, folder):
    for case, full in CASES.items():
        saved = torch.load(folder / f"{case}.pt")
        for micro_batch in (1, 2):
            stage1 = model()
            found, _ = cached_step(stage1, take(full, slice(rank * 3, rank * 3 + 3)), micro_batch)
            for name, value in saved["losses"].items():
                assert mean_of_ranks(float(found[name])) == pytest.approx(value, rel=RELATIVE), (case, name)
            average_gradients(stage1)
            assert_equal_gradients(gradients(stage1), saved["gradients"], (case, micro_batch, rank))


def test_two_processes_equal_the_plain_large_batch_in_one(tmp_path):
    for case, full in CASES.items():
        stage1 = model()
        losses, _ = plain_step(stage1, full)
        values = {name: float(value) for name, value in losses.items()}
        torch.save({"losses": values, "gradients": gradients(stage1)}, tmp_path / f"{case}.pt")
    run_processes(ranks_equal_one, 2, tmp_path)


def test_both_passes_draw_the_same_dropout():
    torch.manual_seed(3)
    stage1, full, seen = Stage1(dataclasses.replace(CONFIG, dropout=0.3)).train(), batch(5), []
    encode = Stage1.encode

    def kept(*arguments):
        seen.append(encode(*arguments))
        return seen[-1]

    with mock.patch.object(Stage1, "encode", kept):
        cached_step(stage1, full, 2)
    assert len(seen) == 6
    for (first, first_text), (second, second_text) in zip(seen[:3], seen[3:], strict=True):
        assert torch.equal(first.queries_BNE, second.queries_BNE) and torch.equal(first_text, second_text)
    some = take(full, slice(0, 2))
    assert not torch.equal(seen[0][0].queries_BNE, encode(stage1, some, stage1.given(some, 9))[0].queries_BNE)


def test_the_first_pass_keeps_no_keys_and_values():
    """They are what does not fit; embeddings and query outputs are small."""
    stage1, kept, alive = model(), [], []
    encode = Stage1.encode

    def watched(stage, some, given):
        alive.append(sum(ref() is not None for ref in kept))
        image, text = encode(stage, some, given)
        if not torch.is_grad_enabled():
            kept.extend(weakref.ref(kv[0]) for kv in (*image.keys.layers, *image.reading.cache) if kv is not None)
        return image, text

    with mock.patch.object(Stage1, "encode", watched):
        cached_step(stage1, batch(6), 2)
    assert len(kept) >= 3 * 3 and alive == [0] * 6


def test_a_graph_holds_no_more_than_a_micro_batch():
    stage1, full, sizes = model(), batch(7), []
    encode = Stage1.encode

    def kept(stage, some, given):
        if torch.is_grad_enabled():
            sizes.append(len(some.is_valid_B))
        return encode(stage, some, given)

    with mock.patch.object(Stage1, "encode", kept):
        cached_step(stage1, full, 3)
    assert sizes == [3, 3, 1]


def test_a_term_without_weight_leaves_no_gradient():
    stage1 = model()
    cached_step(stage1, batch(4), 2, weights={"itc": 0.0, "itm": 1.0, "itg": 1.0, "diversity": 0.0})
    assert stage1.text_projection.weight.grad is None and stage1.temperature.grad is None
    assert stage1.itm_head.weight.grad.abs().max() > 0


def test_what_does_not_fit_is_refused():
    full = batch(3)
    full.image_BFPV[1, 0, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        cached_step(model(), full, 2)
