"""The metrics of the data plane and of training arrive where Prometheus looks for them."""

import re
import time

import pytest

from pipelines.data.media.stage_costs import StageCosts
from pipelines.training.records.data_metrics import DataMetrics
from pipelines.training.records.train_metrics import TrainMetrics
from tests.metrics_endpoint import endpoints, scraped

TIMEOUT_S = 60.0


def test_prometheus_sees_what_was_counted(ray_local):
    metrics = DataMetrics("test", rank=3)
    metrics.count_batch(StageCosts(fetch_s=0.5, decode_s=2.0, fetched_bytes=4096), rows_used=30, rows_quarantined=2)
    metrics.count_batch(StageCosts(decode_s=1.0, fetched_bytes=1), rows_used=8, rows_quarantined=0)
    metrics.observe_wait(0.02, queue_depth=4)
    metrics.observe_wait(2.0, queue_depth=1)
    expected = {
        ("ray_qformer_data_stage_seconds_total", "fetch"): 0.5,
        ("ray_qformer_data_stage_seconds_total", "decode"): 3.0,
        ("ray_qformer_data_rows_total", "used"): 38,
        ("ray_qformer_data_rows_total", "quarantined"): 2,
        ("ray_qformer_data_fetched_bytes_total", ""): 4097,
        ("ray_qformer_data_quarantine_rate", ""): 0.05,
        ("ray_qformer_data_queue_depth", ""): 1,
        ("ray_qformer_data_wait_seconds_bucket", "0.03"): 1,
        ("ray_qformer_data_wait_seconds_bucket", "3.0"): 2,
    }
    deadline = time.monotonic() + TIMEOUT_S
    while not expected.keys() <= (found := scraped(ray_local, "test")).keys() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert {key: found.get(key) for key in expected} == pytest.approx(expected)


def test_prometheus_sees_a_runs_last_figures(ray_local):
    metrics = TrainMetrics("runs/seen")
    metrics.set({"step": 10, "loss/itc": 3.5, "mfu": 0.25})
    metrics.set({"step": 20, "loss/itc": 2.5, "mfu": 0.5, "validation/total": 4.0})
    expected = {"step": 20, "loss_itc": 2.5, "mfu": 0.5, "validation_total": 4.0}
    pattern = re.compile(r'^ray_qformer_train_(\w+)\{.*run="runs/seen".*\} (\S+)$', re.MULTILINE)
    end = time.monotonic() + TIMEOUT_S
    while (found := {k: float(v) for k, v in pattern.findall(endpoints(ray_local))}) != expected:
        assert time.monotonic() < end, found
        time.sleep(0.5)
