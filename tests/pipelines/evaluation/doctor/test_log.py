"""What the doctor reads out of a run's log and records."""

import math

import pytest

from pipelines.evaluation.doctor import log as log_findings
from pipelines.evaluation.doctor import run as run_findings
from pipelines.evaluation.doctor.findings import worst


def records(count=30, **course):
    """Of a log in which each value is a number or a function of the record's place."""
    log = []
    for place in range(count):
        values = {name: value(place) if callable(value) else value for name, value in course.items()}
        log.append({"step": 10 * (place + 1), **values})
    return log


def named(count=30, **course):
    return records(count, **{name.replace("_of_", "/"): value for name, value in course.items()})


def losses(log, **weights):
    return {finding.topic: finding for finding in log_findings.losses(log, weights)}


def falling(place):
    return 3.0 * 0.95**place + 0.05 * (-1) ** place


def test_a_healthy_log():
    found = losses(named(loss_of_itc=falling, chance_of_itc=3.4))
    assert {finding.status for finding in found.values()} == {"ok"}


def test_losses_that_are_not_finite():
    log = named(loss_of_lm=lambda place: math.nan if place == 4 else 1.0)
    found = losses(log)["losses"]
    assert found.status == "problem" and "loss/lm at step 50" in found.text


@pytest.mark.parametrize(
    ("itm", "weights", "status"), [(0.4, {}, "ok"), (0.636, {}, "warning"), (0.636, {"itm": 0}, "ok")]
)
def test_losses_at_chance(itm, weights, status):
    log = named(loss_of_itc=1.0, chance_of_itc=3.4, loss_of_itm=itm, chance_of_itm=0.637)
    assert losses(log, **weights)["chance"].status == status


def test_all_losses_at_chance_are_a_problem_and_unknown_chance_is_told():
    assert losses(named(loss_of_itc=3.39, chance_of_itc=3.4))["chance"].status == "problem"
    assert losses(named(loss_of_itc=3.39))["chance"].status == "unknown"


def test_losses_that_rise():
    def course(place):
        return falling(place) if place < 20 else 2.0 + 0.02 * (-1) ** place

    found = losses(named(loss_of_lm=course))["course of losses"]
    assert found.status == "warning" and "lm from" in found.text
    assert losses(named(loss_of_lm=course), lm=0.0)["course of losses"].status == "ok"
    noisy = named(loss_of_lm=lambda place: 1.0 + 0.3 * (-1) ** place + (0.06 if place > 20 else 0.0))
    assert losses(noisy)["course of losses"].status == "ok"
    assert losses(named(count=3, loss_of_lm=1.0))["course of losses"].status == "unknown"


def test_steps_that_went_wrong():
    log = named(gradient_norm_spikes=lambda place: place % 15, overflows=lambda place: 2 * place)
    found = {finding.topic: finding for finding in log_findings.steps(log, [{"step": 7}], "fp16")}
    assert found["bad steps"].status == "warning" and "1 of 300 steps" in found["bad steps"].text
    # The counter began anew at the resumed start: 14 before, 14 after.
    assert found["gradient spikes"].figures["spikes"] == 28 and found["gradient spikes"].status == "warning"
    assert found["fp16 overflows"].figures["overflows"] == 58 and found["fp16 overflows"].status == "warning"
    many = log_findings.steps(log, [{"step": step} for step in range(9)], None)
    assert many[0].status == "problem"
    clean = log_findings.steps(named(gradient_norm_spikes=0.0), [], "fp32")
    assert [finding.status for finding in clean] == ["ok", "ok"]


def test_data_wait_advice_names_what_there_is_to_turn():
    log = named(data_wait_share=0.2)
    with_cache = log_findings.data_wait(log, has_features=True, decode_workers=2, queue_depth=0.1)
    assert "2 now" in with_cache.advice and "faster disk" in with_cache.advice and "0.1 batches" in with_cache.text
    without = log_findings.data_wait(log, has_features=False, decode_workers=None, queue_depth=None)
    assert "qformer features" in without.advice
    assert log_findings.data_wait([], has_features=False, decode_workers=1, queue_depth=None).status == "unknown"


@pytest.mark.parametrize(
    ("bad", "max_share", "status"),
    [(0, 0.05, "ok"), (20, 0.05, "warning"), (80, 0.05, "problem"), (80, None, "warning")],
)
def test_quarantine(bad, max_share, status):
    rows = {"rows_in": 1000, "rows_used": 1000 - bad, "rows_quarantined": bad}
    found = run_findings.quarantine(rows, {"corrupt": bad}, max_share)
    assert found.status == status and (f"corrupt {bad}" in found.text) == bool(bad)


def test_lost_rows_are_a_problem():
    found = run_findings.quarantine({"rows_in": 10, "rows_used": 8, "rows_quarantined": 1}, None, None)
    assert found.status == "problem" and "rows were lost" in found.text


@pytest.mark.parametrize(
    ("starts", "status"),
    [
        ([(0, 2, "a")], "ok"),
        ([(0, 2, "a"), (50, 1, "a")], "ok"),  # a node was lost, and training went on from a checkpoint
        ([(0, 2, "a"), (0, 2, "a")], "warning"),  # nothing had been saved
        ([(0, 2, "a"), (50, 2, "b-dirty")], "warning"),
    ],
)
def test_starts(starts, status):
    found = run_findings.restarts([dict(zip(("step", "workers", "commit"), start, strict=True)) for start in starts])
    assert found.status == status


def test_checkpoints_short_of_the_last_step():
    found = run_findings.checkpoints(["step-00000050"], {}, 50, 100)
    assert found.status == "warning" and "50 steps of 100" in found.text and "--resume" in found.advice


def test_alarms_and_hangs_are_told():
    events = [{"text": "starting at step 0"}, {"text": "ALARM step 3: the queries have collapsed"}]
    assert "queries have collapsed" in run_findings.alarms(events, 0).text
    assert "a step hung" in run_findings.alarms([], 2).text
    assert run_findings.alarms([], 0).status == "ok"


def test_a_validation_that_was_best_long_ago():
    assert run_findings.validation({"step": 50, "loss": 1.0, "num_worse": 5}, 100).status == "warning"
    assert run_findings.validation({"step": 100, "loss": 1.0, "num_worse": 0}, 100).status == "ok"
    assert run_findings.validation(None, 100) is None


def test_the_worst_status():
    assert worst(["ok", "problem", "warning"]) == "problem" and worst([]) == "ok"
