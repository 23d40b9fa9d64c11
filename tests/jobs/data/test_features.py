"""`qformer features`: what it tells, when it stops, and what it leaves behind then."""

import contextlib
import json
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jobs.data import features
from jobs.settings.corpus import FeaturesSettings
from jobs.settings.data import DataSettings
from pipelines.data.corpus.manifest import write_table
from pipelines.data.features.cache import open_cache
from qformer.config import VisionSpec
from qformer.errors import UserError
from tests.local_data import local_data
from tests.metrics_endpoint import scraped
from tests.pipelines.data.builders import image_manifest

NUM_ROWS = 12


@pytest.fixture
def settings(tmp_path):
    write_table(image_manifest(tmp_path, NUM_ROWS), str(tmp_path / "manifest.parquet"))
    return FeaturesSettings(
        output=str(tmp_path / "cache"),
        vision=VisionSpec("test_vit", pretrained=False),
        data=DataSettings(manifest=str(tmp_path / "manifest.parquet")),
    )


def test_a_real_run_is_seen_by_prometheus_and_told_in_the_summary(ray_local, settings, tmp_path):
    (tmp_path / "5.jpg").unlink()
    before = scraped(ray_local, "features")
    summary = features.main(settings.model_copy(update={"max_quarantine_share": 0.1}))
    assert summary == json.loads((tmp_path / "cache" / "summary.json").read_text())
    assert (summary["rows_in"], summary["rows_used"], summary["rows_quarantined"]) == (NUM_ROWS, NUM_ROWS - 1, 1)
    assert summary["quarantine_rate"] == pytest.approx(1 / NUM_ROWS)
    assert summary["stages"]["wait_s"] > 0 and summary["stages"]["queue_depth"] >= 0
    expected = {
        ("ray_qformer_data_rows_total", "used"): NUM_ROWS - 1,
        ("ray_qformer_data_rows_total", "quarantined"): 1,
        ("ray_qformer_data_wait_seconds_count", ""): 1,
        **{
            ("ray_qformer_data_stage_seconds_total", stage): summary["stages"][stage]
            for stage in ("fetch", "decode", "transform", "encode", "write")
        },
    }

    def added():
        now = scraped(ray_local, "features")
        return {key: now.get(key, 0.0) - before.get(key, 0.0) for key in expected}, now

    deadline = time.monotonic() + 60
    while (found := added())[0] != pytest.approx(expected) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert found[0] == pytest.approx(expected)
    assert found[1]["ray_qformer_data_quarantine_rate", ""] == pytest.approx(1 / NUM_ROWS)
    assert found[1]["ray_qformer_data_queue_depth", ""] >= 0


@pytest.fixture(params=["here", pytest.param("actors", marks=pytest.mark.slow)])
def _pools(request, ray_local):
    """A job's operators in this process, or in actors whose start takes most of a test's time."""
    with local_data() if request.param == "here" else contextlib.nullcontext():
        yield


@pytest.mark.usefixtures("_pools")
def test_too_many_bad_rows_stop_the_job_and_what_is_encoded_stays(settings, tmp_path):
    for bad in (3, 7):
        (tmp_path / f"{bad}.jpg").unlink()
    with pytest.raises(
        UserError, match=r"2 of 12 rows are quarantined \(missing\), more than max_quarantine_share=0.05"
    ):
        features.main(settings)
    cache = Path(settings.output)
    table = pq.read_table(cache / "quarantine.parquet")
    assert table["sample_id"].to_pylist() == ["s3", "s7"] and set(table["error_class"].to_pylist()) == {"missing"}
    with pytest.raises(UserError, match="is not finished"):
        open_cache(settings.output)
    written = {path: path.stat().st_mtime_ns for path in cache.glob("shard-*")}
    assert written
    features.main(settings.model_copy(update={"max_quarantine_share": 0.2}))
    assert {path: path.stat().st_mtime_ns for path in cache.glob("shard-*")} == written
    open_cache(settings.output)


@pytest.mark.usefixtures("_pools")
def test_a_finished_cache_is_unfinished_while_it_is_changed(settings, tmp_path, monkeypatch):
    features.main(settings)
    (tmp_path / "5.jpg").write_bytes((tmp_path / "6.jpg").read_bytes())

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(features, "_encode", killed)
    with pytest.raises(KeyboardInterrupt):
        features.main(settings)
    with pytest.raises(UserError, match="is not finished"):
        open_cache(settings.output)
