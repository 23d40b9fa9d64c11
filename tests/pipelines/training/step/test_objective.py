"""Weights of the loss terms, fixed and learned, and the regulariser."""

import dataclasses
import math

import pytest
import torch

from pipelines.training.run.model import TrainingRun
from pipelines.training.step.objective import Objective
from qformer.analysis.queries import mean_cosine
from qformer.config import QFormerSizes
from qformer.objectives.losses import diversity_loss
from tests.pipelines.training.loops import make_training
from tests.pipelines.training.step.test_loop import QFORMER, choice, make_run, settings, tokenizer, train  # noqa: F401


def test_fixed_weights_are_factors_and_a_term_of_weight_0_has_no_gradient():
    leaf = torch.tensor([1.0, 2.0], requires_grad=True)
    terms = {"a": leaf.square().sum(), "b": leaf.sum(), "c": leaf.sum() * float("nan")}
    objective = Objective(("a", "b", "c"), {"b": 3.0, "c": 0.0})
    objective.scale = 4.0
    objective.backward(terms, link=leaf[0])
    torch.testing.assert_close(leaf.grad, 4 * (2 * leaf.detach() + 3) + torch.tensor([1.0, 0.0]))
    assert objective.total({"a": 5.0, "b": 2.0, "c": float("nan")}) == 11.0
    assert objective.learned_weights() == {} and objective.log_variances is None


def test_learned_weights_have_the_gradient_of_their_formula():
    objective = Objective(("a", "b", "c"), {"b": 2.0, "c": 0.0}, is_learned=True)
    with torch.no_grad():
        objective.log_variances.copy_(torch.tensor([0.5, -1.0, 0.3]))
    values = {"a": 3.0, "b": 0.7, "c": 9.0}
    objective.learn(values)
    s = objective.log_variances.detach().clone().requires_grad_()
    total = (-s[0]).exp() * 3.0 + 2.0 * (-s[1]).exp() * 0.7 + (s[0] + s[1]) / 2
    total.backward()
    torch.testing.assert_close(objective.log_variances.grad, s.grad)
    assert objective.total(values) == pytest.approx(float(total.detach()) + 0.15)
    leaf = torch.ones((), requires_grad=True)
    objective.backward({"a": 3.0 * leaf})
    assert float(leaf.grad) == pytest.approx(3 * math.exp(-0.5))


def test_a_learned_weight_becomes_the_inverse_of_its_loss():
    """The minimum over s of exp(-s) * loss + s / 2 lies at exp(-s) = 1 / (2 * loss)."""
    objective = Objective(("a",), {}, is_learned=True)
    optimizer = torch.optim.Adam([objective.log_variances], lr=0.05)
    for _ in range(400):
        objective.learn({"a": 4.0})
        optimizer.step()
    assert objective.learned_weights()["a"] == pytest.approx(1 / 8, rel=0.01)


def test_learned_weights_are_trained_logged_and_kept_in_the_checkpoint(tokenizer, tmp_path):  # noqa: F811
    run = make_run(1, tokenizer)
    training = make_training(run, is_learned=True)
    logged = train(run, tmp_path, training=training, learning_rate=1e-2)
    assert logged[-1]["weight/itc"] < 1 < logged[-1]["weight/itm"] * 2
    assert logged[-1]["loss/total"] != pytest.approx(sum(logged[-1][f"loss/{name}"] for name in ("itc", "itm", "itg")))
    restored = make_run(1, tokenizer)
    again = make_training(restored, is_learned=True)
    restored.restore(tmp_path / "checkpoints" / "step-00000008", again)
    assert torch.equal(again.objective.log_variances, training.objective.log_variances)


def test_diversity_is_the_mean_squared_cosine_of_different_queries_of_valid_samples():
    hidden = torch.randn(6, 4, 8)  # three samples of two frames
    valid = torch.tensor([True, False, True])
    expected = 0.0
    for frame in (0, 1, 4, 5):
        for one in range(4):
            for other in range(4):
                if one != other:
                    expected += float(torch.cosine_similarity(hidden[frame, one], hidden[frame, other], dim=0)) ** 2
    total, count = diversity_loss(hidden, valid)
    assert float(total) == pytest.approx(expected / 12 / 2, rel=1e-5) and int(count) == 2
    assert float(diversity_loss(torch.eye(8)[None, :4], torch.tensor([True]))[0]) == pytest.approx(0.0, abs=1e-6)
    alike = torch.ones(1, 4, 8)
    assert float(diversity_loss(alike, torch.tensor([True]))[0]) == pytest.approx(1.0)
    assert float(mean_cosine(alike)) == pytest.approx(1.0)
    assert float(mean_cosine(hidden[:1, :1])) == pytest.approx(0.0, abs=1e-6)
    pairs = [torch.cosine_similarity(hidden[0, a], hidden[0, b], dim=0) for a in range(4) for b in range(4) if a != b]
    assert float(mean_cosine(hidden)[0]) == pytest.approx(float(torch.stack(pairs).mean()), abs=1e-6)


@pytest.mark.parametrize("stage", [1, 2])
def test_the_regulariser_parts_queries_that_start_alike(stage, tokenizer, tmp_path):  # noqa: F811
    last = []
    for weight in (0.0, 3.0):
        run = make_run(stage, tokenizer)
        with torch.no_grad():
            queries = run.stage.trainables.qformer.query_tokens
            queries.copy_(queries[:, :1] + 0.3 * (queries - queries[:, :1]))
        training = make_training(run, diversity=weight)
        last.append(train(run, tmp_path / str(weight), training=training, learning_rate=5e-3)[-1])
    assert last[1]["loss/diversity"] < 0.7 * last[0]["loss/diversity"]
    assert last[1]["query_cosine"] < last[0]["query_cosine"]


def test_collapsed_queries_raise_an_alarm_once(tokenizer, tmp_path, capsys):  # noqa: F811
    without_dropout = dataclasses.replace(choice(2, tokenizer), qformer=QFormerSizes(**{**QFORMER, "dropout": 0.0}))
    run = TrainingRun(without_dropout, torch.device("cpu"), precision="fp32", seed=5, init_from=None)
    with torch.no_grad():
        queries = run.stage.trainables.qformer.query_tokens
        queries.copy_(queries[:, :1].expand_as(queries))
    logged = train(run, tmp_path)
    assert min(record["query_cosine"] for record in logged) > 0.99
    assert capsys.readouterr().out.count("the queries have collapsed") == 1
    assert settings().log_every < settings().steps  # it was seen more than once
