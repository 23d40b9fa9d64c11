"""`qformer caption --manifest`: every row once, as `qformer caption` says it, also after kills and with bad files."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml

from jobs.cli import main as cli
from jobs.evaluate import caption
from jobs.settings.evaluate import CaptionSettings
from jobs.settings.loading import load
from pipelines.data import schema
from pipelines.data.batches.batch import unpack
from pipelines.data.corpus.manifest import write_table
from pipelines.data.features.shard_encoder import DecodeShards
from pipelines.data.media.samples import DecodeSettings
from pipelines.evaluation.protocols.caption_shards import CaptionShards, caption_blocks
from pipelines.inference.models import Captioner
from qformer.config import GenerationSettings
from qformer.errors import UserError
from tests.local_data import local_data
from tests.pipelines.data.builders import image_manifest
from tests.tiny_checkpoints import write_stage2

REPOSITORY = Path(__file__).parents[3]
NUM_ROWS = 12
DEADLINE_S = 600.0
GENERATION = GenerationSettings(max_new_tokens=8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_stage2(tmp_path_factory.mktemp("run") / "stage2")


def corpus(folder, num_rows, **columns):
    table = image_manifest(folder, num_rows)
    for name, values in columns.items():
        table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), [values])
    write_table(table, str(folder / "manifest.parquet"))
    return table


def settings_of(folder, checkpoint, **changes):
    values = {"checkpoint": str(checkpoint), "manifest": str(folder / "manifest.parquet"), "generation": GENERATION}
    return CaptionSettings(**{**values, "output": str(folder / "captions"), **changes})


def written(settings):
    files = sorted(Path(settings.output).glob("shard-*.parquet"))
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    return rows, {file.name: file.stat().st_mtime_ns for file in files}


def test_every_row_has_its_text_or_its_failure(ray_local, tmp_path, checkpoint, capsys):
    """The texts are those that `qformer caption FILE` prints, each asked its own question."""
    questions = [["red circle"] if row % 2 else [] for row in range(NUM_ROWS)]
    table = corpus(tmp_path, NUM_ROWS, instructions=questions)
    (tmp_path / "5.jpg").write_bytes(b"no picture")
    settings = settings_of(tmp_path, checkpoint, max_quarantine_share=0.1)
    assert caption.main(settings) == 0
    assert f"rows in {NUM_ROWS} = rows used {NUM_ROWS - 1} + rows quarantined 1" in capsys.readouterr().out
    rows, _ = written(settings)
    assert [row["sample_id"] for row in rows] == table[schema.SAMPLE_ID].to_pylist()
    (bad,) = (row for row in rows if row["text"] is None)
    assert bad["sample_id"] == "s5" and bad["error_class"] and bad["finish_reason"] is None
    quarantined = pq.read_table(Path(settings.output) / "quarantine.parquet")
    assert quarantined[schema.SAMPLE_ID].to_pylist() == ["s5"]
    for instruction in ("", "red circle"):
        asked = [row for row in rows if row["instruction"] == instruction and row["text"] is not None]
        files = [row["media"] for row in asked]
        caption.main(
            CaptionSettings(checkpoint=str(checkpoint), media=files, instruction=instruction, generation=GENERATION)
        )
        told = [line.split("\t")[1] for line in capsys.readouterr().out.splitlines()]
        assert [row["text"] for row in asked] == told and len(told) >= 5
    summary = json.loads((Path(settings.output) / "summary.json").read_text())
    assert (summary["rows_in"], summary["rows_used"], summary["rows_quarantined"]) == (NUM_ROWS, NUM_ROWS - 1, 1)
    assert summary["tokens"] == sum(row["num_tokens"] or 0 for row in rows) and summary["stages"]["generate"] > 0


@pytest.fixture
def _here(ray_local):
    with local_data():
        yield


@pytest.mark.usefixtures("_here")
def test_a_second_run_does_what_changed_and_nothing_else(tmp_path, checkpoint, caplog):
    caplog.set_level("INFO")
    corpus(tmp_path, NUM_ROWS)
    settings = settings_of(tmp_path, checkpoint)
    caption.main(settings)
    rows, times = written(settings)
    assert "captioned 12 of 12 rows" in caplog.text and "next: read" in caplog.text
    caption.main(settings)
    assert written(settings) == (rows, times) and "12 of 12 rows exist already" in caplog.text
    # Another question and a shorter manifest: no row of before is left.
    (Path(settings.output) / "shard-00000009.parquet").write_bytes(b"of a longer manifest")
    corpus(tmp_path, NUM_ROWS - 2)
    caption.main(settings.model_copy(update={"instruction": "red circle"}))
    asked = written(settings)[0]
    assert [row["sample_id"] for row in asked] == [f"s{row}" for row in range(NUM_ROWS - 2)]
    assert {row["instruction"] for row in asked} == {"red circle"}
    with pytest.raises(UserError, match="holds captions of another generation"):
        caption.main(settings.model_copy(update={"generation": GenerationSettings(max_new_tokens=9)}))
    assert (Path(settings.output) / "summary.json").exists()


def write_in_this_process(settings, table):
    """The actors' own code over every shard; gives the last one decoded, and the actor."""
    actor = CaptionShards(settings.checkpoint, settings.output, GENERATION, 4096, 4, "cpu")
    decode = DecodeSettings(preprocessing=actor._captioner.preprocessing, num_frames=4)
    decode_shard = DecodeShards(decode)
    for block in caption_blocks(table, decode, ""):
        decoded = decode_shard(block)
        actor(decoded)
    return decoded, actor


def test_a_row_that_the_model_fails_on_is_quarantined_alone(tmp_path, checkpoint, monkeypatch):
    """In the actor, called as Ray Data does; the pass of the others is repeated without it."""
    decoded, actor = write_in_this_process(settings_of(tmp_path, checkpoint), corpus(tmp_path, NUM_ROWS))
    expected = pq.read_table(tmp_path / "captions" / "shard-00000000.parquet")["text"].to_pylist()
    real, seventh = Captioner.soft_prompts, torch.from_numpy(unpack(decoded).images[7])

    def failing(self, pixels, *args, **kwargs):
        if any((one == seventh).all() for one in pixels):
            raise ValueError("features hold NaN")
        return real(self, pixels, *args, **kwargs)

    monkeypatch.setattr(Captioner, "soft_prompts", failing)
    done = actor(decoded)
    assert (done["rows"].to_pylist(), done["failed"].to_pylist()) == ([NUM_ROWS], [1])
    found = pq.read_table(tmp_path / "captions" / "shard-00000000.parquet")
    assert found["text"].to_pylist() == [*expected[:7], None, *expected[8:]]
    assert found[schema.ERROR_CLASS].to_pylist()[7] == "model" and "NaN" in found[schema.MESSAGE].to_pylist()[7]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["media=[a.jpg]", "manifest=b", "output=c"], "either media"),
        (["manifest=b"], "give both"),
        (["media=[a.jpg]", "output=c"], "give both"),
    ],
)
def test_files_and_a_corpus_are_not_mixed(overrides, expected):
    with pytest.raises(UserError, match=expected):
        load(CaptionSettings, None, ["checkpoint=x", *overrides])


def test_beams_are_refused_before_anything_is_loaded(tmp_path, capsys):
    words = ["caption", "--manifest", "rows.parquet", "--set", "checkpoint=x", "--set", f"output={tmp_path}/out"]
    assert cli.main([*words, "--set", "generation.num_beams=3"]) == 2
    assert "num_beams=3" in capsys.readouterr().err


def start_job(settings, folder):
    """The command of a user, in a session of its own, with its Ray processes."""
    config = folder / "caption.yaml"
    config.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    command = [sys.executable, "-m", "jobs.caption", "--config", str(config)]
    with (folder / "job.log").open("wb") as log:
        return subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True, stdout=log, stderr=log)


def start_and_kill(settings, folder, more_shards):
    """SIGKILL the job and all its Ray processes once so many more shards are there."""
    before, job = num_shards(settings), start_job(settings, folder)
    deadline = time.monotonic() + DEADLINE_S
    while num_shards(settings) < before + more_shards and time.monotonic() < deadline and job.poll() is None:
        time.sleep(0.02)
    was_running = job.poll() is None
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    assert was_running, f"the job ended before it could be killed: {(folder / 'job.log').read_text()[-3000:]}"


def num_shards(settings):
    return len(list(Path(settings.output).glob("shard-*.parquet")))


@pytest.mark.slow
def test_2000_rows_killed_twice_and_resumed_come_once_each(tmp_path, checkpoint):
    """And are those that one process writes without Ray."""
    table = corpus(tmp_path, 2000)
    (tmp_path / "150.jpg").write_bytes(b"no picture")
    settings = settings_of(tmp_path, checkpoint)
    for _ in range(2):
        start_and_kill(settings, tmp_path, more_shards=2)
    done = written(settings)[1]
    assert 4 <= len(done) < 8 and not (tmp_path / "captions" / "summary.json").exists()
    job = start_job(settings, tmp_path)
    assert job.wait(DEADLINE_S) == 0, (tmp_path / "job.log").read_text()[-3000:]
    rows, times = written(settings)
    assert len(times) == 8 and done.items() <= times.items()  # what was there stayed
    assert [row["sample_id"] for row in rows] == table[schema.SAMPLE_ID].to_pylist()
    assert [row["sample_id"] for row in rows if row["text"] is None] == ["s150"]
    summary = json.loads((tmp_path / "captions" / "summary.json").read_text())
    assert (summary["rows_in"], summary["rows_used"], summary["rows_quarantined"]) == (2000, 1999, 1)
    assert pq.read_table(tmp_path / "captions" / "quarantine.parquet")[schema.SAMPLE_ID].to_pylist() == ["s150"]
    plain = settings_of(tmp_path, checkpoint, output=str(tmp_path / "plain"))
    write_in_this_process(plain, table)
    assert written(plain)[0] == rows
