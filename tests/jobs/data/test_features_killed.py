"""A features job killed in the middle: completed by the same command, bit for bit as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from jobs.data import features
from jobs.settings.corpus import FeaturesSettings
from jobs.settings.data import DataSettings
from pipelines.data import schema
from pipelines.data.corpus.manifest import write_table
from qformer.config import VisionSpec
from tests.pipelines.data.builders import image_manifest

REPOSITORY = Path(__file__).parents[3]
# Pictures of this size make shards of 111 rows, so that few rows make several shards.
IMAGE_SIZE, NUM_ROWS, NUM_SHARDS = 448, 400, 4
DEADLINE_S = 120.0


def _settings(folder, name):
    return FeaturesSettings(
        output=str(folder / name),
        vision=VisionSpec("test_vit", pretrained=False, image_size=IMAGE_SIZE),
        data=DataSettings(manifest=str(folder / "manifest.parquet")),
        frames_per_pass=8,
    )


def _files(folder):
    """All of the cache but what the job tells of itself."""
    names = {"settings.yaml", "summary.json"}
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name not in names}


def _start_and_kill(settings, folder):
    """SIGKILL the job and all its Ray processes once a shard is there."""
    config = folder / "features.yaml"
    config.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    command = [sys.executable, "-m", "jobs.features", "--config", str(config)]
    job = subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + DEADLINE_S
    while not list(Path(settings.output).glob("shard-*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()


@pytest.mark.slow
def test_a_cache_killed_and_resumed_is_bit_equal_to_one_written_in_one_go(ray_local, tmp_path, caplog, capsys):
    caplog.set_level("INFO")
    table = image_manifest(tmp_path, NUM_ROWS)
    (tmp_path / "150.jpg").write_bytes(b"no picture")
    write_table(table, str(tmp_path / "manifest.parquet"))
    whole = features.main(_settings(tmp_path, "whole"))
    assert (whole["rows_in"], whole["rows_quarantined"]) == (NUM_ROWS, 1)
    told = capsys.readouterr().out
    assert "bottleneck: " in told and f"rows in {NUM_ROWS} = rows used {NUM_ROWS - 1} + rows quarantined 1" in told
    # The forecast came first, with a time: these rows are worth measuring.
    lines = [record.getMessage() for record in caplog.records]
    (place,) = (number for number, line in enumerate(lines) if line.startswith(f"forecast: {NUM_ROWS} rows, "))
    assert " rows/s, limited by " in lines[place]
    assert place < min(number for number, line in enumerate(lines) if line.startswith("encoded "))

    killed = _settings(tmp_path, "killed")
    _start_and_kill(killed, tmp_path)
    finished = {path.stem for path in Path(killed.output).glob("shard-*.parquet")}
    assert 1 <= len(finished) < NUM_SHARDS and not (Path(killed.output) / "index.parquet").exists()
    before = {name: (Path(killed.output) / f"{name}.arrow").stat().st_mtime_ns for name in finished}
    again = features.main(killed)
    assert {name: (Path(killed.output) / f"{name}.arrow").stat().st_mtime_ns for name in finished} == before
    assert {**again, "stages": None} == {**whole, "stages": None}
    one, other = _files(tmp_path / "whole"), _files(killed.output)
    left_over = {name for name in other if name.endswith(".tmp")}
    assert {name: data for name, data in other.items() if name not in left_over} == one
    assert len(one) == 3 + 2 * NUM_SHARDS
    assert json.loads((tmp_path / "whole" / "summary.json").read_text()) == whole
    assert yaml.safe_load((tmp_path / "whole" / "settings.yaml").read_text())["vision"]["image_size"] == IMAGE_SIZE
    index = pq.read_table(Path(killed.output) / "index.parquet")
    assert index[schema.SAMPLE_ID].to_pylist() == table[schema.SAMPLE_ID].to_pylist()
