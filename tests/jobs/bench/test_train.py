"""The training benchmark at a tiny size: both sides train, and every figure is there."""

import pytest

from jobs.bench import train as bench
from qformer.config import QFormerSizes

TINY = QFormerSizes(hidden_size=16, num_layers=2, num_heads=2, intermediate_size=16, num_queries=2, embed_dim=8)


def test_the_steady_state_is_read_off_the_windows_after_the_warm_up(tmp_path, monkeypatch):
    case = bench.TrainCase(warm_up=10, timed=20, workers=2, batch_per_rank=5)
    # 100 samples a window: 2 s and 4 s, of which half a second and two seconds were waited.
    windows = [(10, 1.0, 0.9), (20, 50.0, 0.25), (30, 25.0, 0.5)]
    records = [dict(zip(("step", "samples_per_s", "data_wait_share"), window, strict=True)) for window in windows]
    monkeypatch.setattr(bench.train, "main", lambda settings: None)
    monkeypatch.setattr(bench, "read_metrics", lambda output: records)
    run = bench._train(bench._settings(case, "manifest", tmp_path), case)
    assert run.samples_per_s == pytest.approx(200 / 6) and run.data_wait_share == pytest.approx(2.5 / 6)


@pytest.mark.slow
def test_ours_torchrun_and_the_cache_are_measured(ray_local):
    case = bench.TrainCase(
        vision="test_vit",
        qformer=TINY,
        batch_per_rank=2,
        warm_up=2,
        timed=2,
        rounds=1,
        jpegs=8,
        jpeg_size=(64, 48),
        jpeg_bytes=2_000,
    )
    result = bench.measure(case)
    assert set(result.ratios) == {"ray_vs_torchrun", "data_wait_share", "cache_vs_ceiling"}
    assert min(result.seconds.values()) > 0
