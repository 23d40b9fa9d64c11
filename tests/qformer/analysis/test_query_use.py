"""Which queries count as dead or collapsed, on tensors; and which tensors count as moved."""

import pytest
import torch

from qformer.analysis.query_use import QueryStatistics
from qformer.analysis.weight_changes import changed_tensors


def figures(own_GQD, other_GQD):
    statistics = QueryStatistics()
    for own, other in zip(own_GQD.split(7), other_GQD.split(7), strict=True):
        statistics.add(own, other)
    return statistics.figures()


def test_a_query_that_says_the_same_of_every_image_is_dead():
    torch.manual_seed(0)
    own = torch.randn(40, 4, 16)
    own[:, 1] = torch.randn(16)  # constant
    own[:, 2] = torch.randn(16) + 1e-3 * torch.randn(40, 16)  # within the rounding of bf16
    own[:, 3] = 3 * torch.randn(16) + 0.3 * torch.randn(40, 16)  # mostly constant, and yet it tells something
    found = figures(own, own.roll(1, 0))
    assert found.dead == [1, 2] and not found.has_collapsed
    assert found.spread[1] == 0.0 and 0.02 < found.spread[3] < 0.3


def test_the_spread_of_unrelated_images_is_their_standard_deviation():
    torch.manual_seed(0)
    own = 2.0 + torch.randn(4000, 1, 8)
    found = figures(own, own.roll(1, 0))
    expected = (own.var(dim=0).sum() / own.square().sum(dim=2).mean()).sqrt()
    assert found.spread[0] == pytest.approx(float(expected), rel=0.03)


def test_what_the_instruction_alone_changes_does_not_keep_a_query_alive():
    """Outputs differ from sample to sample, and not with the image."""
    torch.manual_seed(0)
    own = torch.randn(40, 2, 16)
    other = own.clone()
    other[:, 0] = torch.randn(40, 16)
    assert figures(own, other).dead == [1]


def test_queries_that_all_say_the_same_have_collapsed():
    torch.manual_seed(0)
    own = torch.randn(40, 1, 16).expand(-1, 4, -1)
    found = figures(own, own.roll(1, 0))
    assert found.has_collapsed and found.cosine == pytest.approx(1.0, abs=1e-5) and found.dead == []


def test_outputs_that_are_not_finite_are_dead():
    own = torch.full((10, 2, 4), float("nan"))
    assert figures(own, own).dead == [0, 1]


def test_nothing_to_look_at():
    assert QueryStatistics().figures() is None


def test_moved_tensors_are_named():
    before = {"a": torch.ones(3), "b": torch.ones(2), "c": torch.ones(4), "d": torch.tensor([float("nan"), 1.0])}
    after = {"a": torch.ones(3), "b": torch.tensor([1.0, 1.0 + 2**-20]), "c": torch.ones(5), "d": before["d"].clone()}
    assert changed_tensors(before, after, [*before, "e"]) == ["b"]  # c has another shape, e is nowhere
    assert changed_tensors({"a": torch.tensor([0.1]).half()}, {"a": torch.tensor([0.1]).half().float()}, ["a"]) == []
    assert changed_tensors({"a": torch.tensor([0.1]).half()}, {"a": torch.tensor([0.1])}, ["a"]) == ["a"]
