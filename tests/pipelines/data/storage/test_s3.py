"""Sources and outputs on S3: endpoint and credentials come from the environment alone."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data import storage
from pipelines.data.corpus.manifest import read_manifest
from tests.pipelines.data.builders import jpeg
from tests.pipelines.data.corpus.sources.reading import read
from tests.pipelines.data.corpus.sources.shards import write_shard
from tests.pipelines.data.object_store import CREDENTIALS, moto_program, s3_server

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).resolve().parents[4]


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """An empty bucket; the environment names its server."""
    folder = tmp_path_factory.mktemp("s3")
    with s3_server(moto_program(folder)) as address, pytest.MonkeyPatch.context() as patch:
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": address}.items():
            patch.setenv(name, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()  # of another test's server
        fsspec.filesystem("s3").mkdir("corpus")
        yield "s3://corpus"


def _fill(bucket, folder):
    contents = []
    for number in range(20):
        contents += [(f"{number:03d}.jpg", jpeg((number, 0, 0))), (f"{number:03d}.txt", f"of {number}".encode())]
    shard = write_shard(folder / "s.tar", contents)
    storage.write_bytes(f"{bucket}/shards/s.tar", shard.read_bytes())
    table = io.BytesIO()
    storage.write_bytes(f"{bucket}/photos/a b.jpg", jpeg((50, 0, 0)))
    pq.write_table(pa.table({"media": ["../photos/a b.jpg", "gone.jpg"], "caption": ["one", "two"]}), table)
    storage.write_bytes(f"{bucket}/tables/part-0.parquet", table.getvalue())
    storage.write_bytes(f"{bucket}/photos/a b.txt", b"beside")
    lines = [{"media": "photos/a b.jpg"}, {"media": "photos/late.jpg"}]
    storage.write_text(f"{bucket}/rows.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def _command(*words):
    return subprocess.run(
        [sys.executable, "-m", "jobs.cli", "prepare", *words, "--set", "decode_workers=1"],
        cwd=REPOSITORY,
        env={**os.environ},
        capture_output=True,
        text=True,
    )


def test_every_format_is_read(bucket, tmp_path):
    _fill(bucket, tmp_path)
    rows, failures = read(f"{bucket}/shards")
    assert failures == [] and [row["captions"] for row in rows] == [[f"of {n}"] for n in range(20)]
    for row in reversed(rows):
        assert storage.read_bytes(row["media"], 10**6) == jpeg((int(row["sample_id"].split("/")[1]), 0, 0))
    assert [row["sample_id"] for row in read(f"{bucket}/shards/s.tar")[0]] == [row["sample_id"] for row in rows]
    ((row,), (failure,)) = read(f"{bucket}/tables")
    assert row["media"] == f"{bucket}/tables/gone.jpg" and failure.media == "../photos/a b.jpg"
    ((row,), _) = read(f"{bucket}/photos")
    assert (row["media"], row["captions"]) == (f"{bucket}/photos/a b.jpg", ["beside"])


def test_prepare_from_s3_to_s3(bucket, tmp_path):
    _fill(bucket, tmp_path)
    output = f"{bucket}/out"
    config = tmp_path / "data.yaml"
    sources = [{"path": f"{bucket}/{name}"} for name in ("shards", "photos", "rows.jsonl")]
    config.write_text(json.dumps({"sources": sources, "output": output}))
    done = _command("--config", str(config))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "rows in 23 = rows used 22 + rows quarantined 1"
    manifest = read_manifest(output)
    assert manifest["source"].to_pylist() == ["shards"] * 20 + ["photos", "rows.jsonl"]
    storage.write_bytes(f"{bucket}/photos/late.jpg", jpeg((60, 0, 0)))
    done = _command("--config", str(config), "--retry-quarantined")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "rows in 23 = rows used 23 + rows quarantined 0" in done.stdout
    fsspec.filesystem("s3").invalidate_cache()  # another process replaced the file
    assert read_manifest(output).num_rows == 23


def test_what_cannot_be_reached_is_one_line(bucket, tmp_path, monkeypatch):
    config = tmp_path / "data.yaml"
    config.write_text(json.dumps({"sources": [{"path": "s3://no-such-bucket/a.jsonl"}], "output": str(tmp_path / "o")}))
    done = _command("--config", str(config))
    assert done.returncode == 2 and "no-such-bucket" in done.stderr and "Traceback" not in done.stderr
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    for name in CREDENTIALS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    done = _command("--config", str(config))
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-1000:]
