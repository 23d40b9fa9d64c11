"""What watches a run: the watchdog, chance levels, the count of operations."""

import math
import threading
import time

import pytest
import torch

from pipelines.training.group.progress import progress_line
from pipelines.training.group.watchdog import Watchdog
from pipelines.training.records.flops import StepFlops
from pipelines.training.records.health import chance_levels
from tests.pipelines.training.loops import make_loop
from tests.pipelines.training.step.test_loop import batches, make_run, settings, tokenizer, train  # noqa: F401


def wait_for(condition, timeout_s=10.0):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def test_a_step_that_hangs_has_its_stacks_written_once_and_again_after_progress(tmp_path):
    warnings, release = [], threading.Event()

    def a_collective_that_waits():
        release.wait(30)

    waiting = threading.Thread(target=a_collective_that_waits)
    waiting.start()
    watchdog = Watchdog(str(tmp_path), 3, timeout_s=0.2, warn=warnings.append)
    wait_for(lambda: warnings)
    stacks = (tmp_path / "stacks" / "rank-3.txt").read_text()
    assert "a_collective_that_waits" in stacks and "rank 3 has done no step for 0.2 s after step 0" in warnings[0]
    time.sleep(0.5)
    assert len(warnings) == 1
    watchdog.report_progress(7)
    wait_for(lambda: len(warnings) == 2)
    assert "after step 7" in warnings[1]
    watchdog.close()
    release.set()
    waiting.join()


def test_a_run_that_steps_is_left_alone(tmp_path):
    warnings = []
    watchdog = Watchdog(str(tmp_path), 0, timeout_s=0.6, warn=warnings.append)
    for done in range(8):
        time.sleep(0.1)
        watchdog.report_progress(done)
    watchdog.close()
    assert warnings == [] and not (tmp_path / "stacks").exists()


def test_chance_levels():
    levels = chance_levels(("itc", "itm", "itg", "diversity"), 100)
    assert levels == {"itc": math.log(100), "itm": pytest.approx(0.637, abs=5e-4)}
    assert chance_levels(("itc", "itm"), 1) == {"itc": 0.0, "itm": 0.0}
    assert chance_levels(("lm",), 4) == {}


def test_they_stand_beside_the_losses_in_log_and_progress_line(tokenizer, tmp_path):  # noqa: F811
    record = train(make_run(1, tokenizer), tmp_path)[-1]
    assert record["chance/itc"] == pytest.approx(math.log(4)) and record["chance/itm"] == pytest.approx(
        0.6365, abs=1e-4
    )
    line = progress_line(record)
    assert f"itc {record['loss/itc']:.3f} (chance 1.386)" in line and "(chance 0.637)" in line


def test_operations_are_counted_once_a_shape_forward_and_backward():
    flops, layer, calls = StepFlops(torch.device("cpu")), torch.nn.Linear(16, 32, bias=False), []

    def step():
        calls.append(None)
        layer(torch.ones(8, 16)).sum().backward()

    for _ in range(3):
        flops.add((8, 16), step)
    forward = 2 * 8 * 16 * 32
    # The input needs no gradient, so that the backward is one product.
    assert flops.total == 3 * 2 * forward and len(calls) == 1
    assert flops.figures(2e12, 4.0) == {"tflops_per_s": 0.5}


def test_attention_is_counted_as_its_two_products():
    flops = StepFlops(torch.device("cpu"))
    query, key = torch.randn(2, 4, 16, 8, requires_grad=True), torch.randn(2, 4, 24, 8)

    def step():
        torch.nn.functional.scaled_dot_product_attention(query, key, key).sum().backward()

    flops.add((1,), step)
    forward = 2 * (2 * 2 * 4 * 16 * 24 * 8)
    assert forward < flops.total <= 3.5 * forward


def test_mfu_is_a_share_of_the_devices_peak(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    flops = StepFlops(torch.device("cuda"))
    assert flops.figures(989e12, 2.0)["mfu"] == pytest.approx(0.5)


def test_a_run_logs_its_rate_of_operations_with_gradient_caching_too(tokenizer, tmp_path):  # noqa: F811
    counts = []
    for micro_batch in (None, 2):
        run = make_run(1, tokenizer)
        run.stage.micro_batch = micro_batch
        loop = make_loop(run, settings(steps=2), log=lambda values: counts.append(values["tflops_per_s"]))
        loop.run(batches(), 0)
        assert counts.pop() > 0
        counts.append(loop.flops.total)
    # The second pass of the samples is work too; most of it all is the frozen encoder's.
    assert 1.02 < counts[1] / counts[0] < 2
