"""Losses over the evaluation set, the best checkpoint, early stopping."""

import json

import pytest
import torch

from pipelines.training.step.ema import Ema
from pipelines.training.step.validation import Best, BestCheckpoint, read_best, validation_losses
from tests.pipelines.training.loops import backward, make_loop, make_training
from tests.pipelines.training.step.test_loop import batches, make_run, settings, tokenizer, train  # noqa: F401


@pytest.mark.parametrize("stage", [1, 2])
def test_losses_are_means_over_samples_without_dropout_and_leave_no_trace(stage, tokenizer):  # noqa: F811
    run = make_run(stage, tokenizer)
    training = make_training(run)
    given = [*batches(6), *batches(7, failed=(1, 2))]
    before = {name: tensor.clone() for name, tensor in run.stage.trainables.state_dict().items()}
    arguments = (training.objective, training.precision, None)
    losses, samples = validation_losses(run.stage, iter(given), *arguments)
    assert samples == 10 and validation_losses(run.stage, iter(given), *arguments) == (losses, samples)
    assert run.stage.num_truncated == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.stage.trainables.state_dict().items())
    assert all(parameter.grad is None for parameter in run.stage.trainables.parameters())
    if stage == 2:  # whose terms need no noise
        run.stage.trainables.eval()
        each = [backward(run.stage, batch)["lm"] for batch in given]
        assert losses["lm"] == pytest.approx((4 * each[0] + 4 * each[1] + 2 * each[2]) / 10, rel=1e-5)


def test_the_moving_average_is_what_is_validated(tokenizer):  # noqa: F811
    run = make_run(2, tokenizer)
    training = make_training(run, ema=Ema(run.stage.trainables, 0.9))
    averaged, _ = validation_losses(run.stage, batches(7), training.objective, training.precision, None)
    with torch.no_grad():
        for parameter in run.stage.trainables.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    moved = {name: tensor.clone() for name, tensor in run.stage.trainables.state_dict().items()}
    arguments = (run.stage, batches(7), training.objective, training.precision)
    assert validation_losses(*arguments, training.ema)[0] == averaged
    assert validation_losses(run.stage, batches(7), *arguments[2:], None)[0] != averaged
    assert all(torch.equal(tensor, moved[name]) for name, tensor in run.stage.trainables.state_dict().items())


def test_the_best_is_kept_and_patience_ends(tmp_path):
    best = BestCheckpoint(str(tmp_path), read_best(str(tmp_path)), patience=2)
    for step, loss in ((10, 3.0), (20, 2.0), (30, 2.5)):
        best.see(step, loss)
        assert best.goes_on
    best.write()
    assert read_best(str(tmp_path)) == Best(20, 2.0, 1, last=30)
    resumed = BestCheckpoint(str(tmp_path), read_best(str(tmp_path)), patience=2)
    resumed.see(40, 2.0)
    assert not resumed.goes_on and resumed.best == Best(20, 2.0, 2, last=40)
    for_ever = BestCheckpoint(str(tmp_path), resumed.best, patience=None)
    for_ever.see(50, 9.0)
    assert for_ever.goes_on and for_ever.best.step == 20
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 20


def test_learned_weights_do_not_choose_the_best(tokenizer):  # noqa: F811
    run = make_run(1, tokenizer)
    plain, learned = make_training(run), make_training(run, is_learned=True)
    with torch.no_grad():
        learned.objective.log_variances.add_(1.0)
    totals = [
        validation_losses(run.stage, batches(7), one.objective, one.precision, None)[0]["total"]
        for one in (plain, learned)
    ]
    assert totals[0] == totals[1]


def test_batches_that_are_not_finite_are_missing_in_the_count(tokenizer):  # noqa: F811
    run = make_run(2, tokenizer)
    training, encode = make_training(run), run.stage.encode
    whole, _ = validation_losses(run.stage, batches(7), training.objective, training.precision, None)

    def spoilt(batch):
        tokens = encode(batch)
        return tokens * float("nan") if batch.step == 6 else tokens

    run.stage.encode = spoilt
    assert validation_losses(run.stage, batches(6), training.objective, training.precision, None) == (whole, 4)


def test_a_resumed_loop_validates_where_it_died_before_it_could(tokenizer):  # noqa: F811
    seen = []
    loop = make_loop(
        make_run(2, tokenizer), settings(validate_every=3), validate=lambda done: bool(seen.append(done)) or done != 6
    )
    assert loop.run(batches(6), 6) == 6 and seen == [6]  # and it ends, for it had ended so


def test_a_loop_validates_when_it_is_due_saves_first_and_stops_when_told(tokenizer):  # noqa: F811
    run, seen = make_run(2, tokenizer), []

    def validate(done):
        seen.append(("validate", done))
        run.stage.trainables.eval()
        return done < 6

    loop = make_loop(
        run,
        settings(validate_every=3, checkpoint_every=100),
        validate=validate,
        save=lambda done: seen.append(("save", done)),
        is_preempted=lambda: len(seen) == 0,
    )
    assert loop.run(batches(), 0) == 6
    # The notice of a preemption at the first logged step brought a checkpoint of its own.
    assert seen == [("save", 2), ("save", 3), ("validate", 3), ("save", 6), ("validate", 6)]
