"""`qformer train` with real Ray Train workers on a small world."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pyarrow.parquet as pq
import pytest
import yaml
from fsspec.implementations.memory import MemoryFileSystem

from jobs.data import features
from jobs.demo.world.corpus import write_world
from jobs.settings.corpus import FeaturesSettings
from jobs.settings.data import DataSettings, TrainDataSettings
from jobs.settings.model import ModelSettings, OptimSettings
from jobs.settings.train import TrainSettings, ValidationSettings
from jobs.train import job as train
from jobs.train.rows import training_rows
from pipelines.data.storage import checkpoint_folders
from pipelines.data.storage.retries import with_retries
from pipelines.training.records.metrics_log import read_metrics
from qformer.config import QFormerSizes, VisionSpec
from qformer.errors import UserError
from tests.jobs.train_jobs import Job
from tests.local_data import local_data, local_training

MODELS = Path(__file__).parents[3] / "jobs" / "demo" / "models"
TINY = QFormerSizes(
    hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48, num_queries=4, embed_dim=16, dropout=0.1
)

JOINT = {
    **{"vision": "v", "language": "l", "audio": "a", "bridge": {"kind": "cascaded", "freeze_frames": False}},
    "audio_branch": {"is_joint": True},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """100 images and 50 clips to train on, of which two images and a clip are broken; straight from the writer.

    And 18 rows of the split "test", with one more whose file is missing.
    """
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, num_images=100, num_clips=50, num_test_images=10, num_test_clips=8, seed=3)
    with open(folder / "manifest.jsonl", "a") as file:
        gone = {"sample_id": "gone", "media": "gone.png", "captions": ["nothing"], "split": "test"}
        file.write(json.dumps(gone) + "\n")
    return folder


def settings(world, output, **changes):
    values = {
        "output": str(output),
        "stage": 1,
        "model": ModelSettings(
            vision=str(MODELS / "vision"), language=str(MODELS / "language"), tokenizer="corpus", qformer=TINY
        ),
        "data": TrainDataSettings(manifest=str(world / "manifest.jsonl"), num_frames=2),
        "optim": OptimSettings(learning_rate=1e-3, warmup_steps=2),
        "steps": 10,
        "batch_size": 30,
        "workers": 2,
        "checkpoint_every": 3,
        "log_every": 2,
        "max_quarantine_share": 0.1,
    }
    return TrainSettings(**{**values, **changes})


@pytest.fixture(scope="module")
def cache(ray_local, world, tmp_path_factory):
    """The world as the frozen encoder sees it."""
    chosen = FeaturesSettings(
        output=str(tmp_path_factory.mktemp("features") / "cache"),
        vision=str(MODELS / "vision"),
        data=DataSettings(manifest=str(world / "manifest.jsonl"), num_frames=2),
    )
    with local_data():
        summary = features.main(chosen)
    assert (summary["rows_in"], summary["rows_quarantined"]) == (150, 3)
    return chosen


def test_a_second_features_run_encodes_nothing_and_another_encoder_is_refused(cache, caplog):
    caplog.set_level("INFO")
    shards = {path: path.stat().st_mtime_ns for path in Path(cache.output).glob("shard-*")}
    assert shards
    assert features.main(cache)["rows_used"] == 147
    assert "150 of 150 rows exist already" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in Path(cache.output).glob("shard-*")} == shards
    with pytest.raises(UserError, match="layer: -2 in the cache, -1 here"):
        features.main(cache.model_copy(update={"vision": VisionSpec(str(MODELS / "vision"), layer=-1)}))


@pytest.mark.parametrize("source", ["pixels", pytest.param("features", marks=pytest.mark.slow)])
def test_two_workers_train_account_and_refuse_a_used_folder(ray_local, world, cache, source, tmp_path, caplog):
    caplog.set_level("INFO")
    data = settings(world, "x").data
    validation = ValidationSettings(split="test", every=5) if source == "pixels" else None
    if source == "features":
        data = data.model_copy(update={"features": cache.output})
    summary = train.main(settings(world, tmp_path / "run", data=data, validation=validation))
    assert "weights re-initialised: everything" in caplog.text and "0 texts were cut" in caplog.text
    # 10 steps of 30 rows: 6 steps an epoch (4 of images, 2 of clips), one of them not full.
    assert summary["rows_in"] == summary["rows_used"] + summary["rows_quarantined"]
    assert 250 <= summary["rows_in"] <= 280
    broken = set(json.loads((world / "truth.json").read_text())["broken"])
    table = pq.read_table(tmp_path / "run" / "quarantine.parquet")
    first_epoch = [row["sample_id"] for row in table.to_pylist() if row["epoch"] == 0]
    assert sorted(first_epoch) == sorted(broken)
    steps = [record["step"] for record in read_metrics(str(tmp_path / "run"))]
    assert steps == [2, 4, 6, 8, 10]
    assert checkpoint_folders.newest_checkpoint(str(tmp_path / "run")).endswith("step-00000010")
    assert any((tmp_path / "run" / "tensorboard").iterdir())
    assert yaml.safe_load((tmp_path / "run" / "settings.yaml").read_text())["batch_size"] == 30
    (start,) = (json.loads(line) for line in (tmp_path / "run" / "starts.jsonl").read_text().splitlines())
    assert (start["step"], start["workers"]) == (0, 2) and start["versions"]["torch"]
    assert start["trainable"]["names"] == summary["trainable_names"]
    assert start["frozen_sha256"] == summary["frozen_sha256"]
    if source == "pixels":
        assert_validated(tmp_path / "run", caplog.text)
    with pytest.raises(UserError, match="already used"):
        train.main(settings(world, tmp_path / "run"))


def assert_validated(run, log):
    """Over the 18 good rows of the split after steps 5 and 10, with a checkpoint each; and what was said."""
    best = json.loads((run / "best.json").read_text())
    assert best["step"] in (5, 10) and 0 < best["loss"] < 30
    assert (run / "checkpoints" / "step-00000005" / "complete.json").exists()
    for step in (5, 10):
        told = "18 of 19 rows (1 could not be used, see validation_quarantine.parquet)"
        assert f"validation at step {step} over {told}: total" in log
    (failed,) = pq.read_table(run / "validation_quarantine.parquet").to_pylist()
    assert (failed["sample_id"], failed["error_class"]) == ("gone", "missing")
    events = [json.loads(line)["text"] for line in (run / "events.jsonl").read_text().splitlines()]
    assert events[0].startswith("starting at step 0 with 2 worker(s) on ") and "validation at step 10" in events[-1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 1000}, r"batch_size=1000 is larger than the 150 rows"),
        ({"batch_size": 1}, "gives some of the 2 workers nothing"),
        ({"stage": 2, "model": ModelSettings(vision="x")}, "model.language is not set"),
        ({"init_from": "/nowhere"}, "/nowhere does not exist"),
        ({"stage": 2, "init_from": "/nowhere"}, "/nowhere does not exist"),
        ({"resume": True}, "does not exist"),
        ({"min_workers": 3}, "min_workers=3 is more than workers=2"),
        ({"validation": ValidationSettings(every=5)}, "split 'val' of .* is empty; it has test, train"),
        ({"validation": ValidationSettings(every=5, features="/c")}, "validation.features='/c': the encoder runs for"),
        (
            {"data": {"manifest": "M", "features": "/c", "augmentation": {"random_resized_crop": True}}},
            "data.augmentation cannot change it",
        ),
        ({"data": {"manifest": "M", "features": "/nowhere"}}, "/nowhere holds no feature cache"),
        (
            {"stage": 2, "model": ModelSettings(**JOINT), "data": {"manifest": "M", "num_frames": 4}},
            "one segment a frame, but data.audio.num_segments=8 and data.num_frames=4; make them equal",
        ),
    ],
)
def test_mistakes_end_before_any_worker_starts(changes, message, world, tmp_path):
    if "data" in changes:
        data = TrainDataSettings(**{**changes["data"], "manifest": str(world / "manifest.jsonl")})
        changes = {**changes, "data": data}
    with pytest.raises(UserError, match=message):
        train.main(settings(world, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("media", "error", "message"),
    [
        (
            "nosuch://b/a.jpg",
            None,
            r"data.manifest cannot be read: nosuch://b/a.jpg: no such protocol; use a local path",
        ),
        ("memory://b/a.jpg", ConnectionRefusedError("nobody"), "memory://b/a.jpg: ConnectionRefusedError: nobody"),
        ("memory://b/t.tar#offset=512&length=9", PermissionError("no"), "memory://b/t.tar: access denied"),
        ("memory://b/gone.jpg", None, None),
    ],
)
def test_media_whose_store_does_not_answer_end_before_any_worker_starts(media, error, message, monkeypatch, tmp_path):
    """A wrong endpoint would have every row wait for itself; a file that is missing is one row's matter."""
    monkeypatch.setattr(with_retries, "__kwdefaults__", {"budget_s": 0.05})
    if error is not None:
        monkeypatch.setattr(MemoryFileSystem, "info", mock.Mock(side_effect=error))
    manifest = tmp_path / "rows.jsonl"
    manifest.write_text("".join(json.dumps({"media": media, "caption": "a red circle"}) + "\n" for _ in range(30)))
    chosen = settings(tmp_path, tmp_path / "run", data=TrainDataSettings(manifest=str(manifest)))
    if message is None:
        assert training_rows(chosen).corpus.num_rows == 30
        return
    with pytest.raises(UserError, match=message):
        training_rows(chosen)


@pytest.fixture(params=["here", pytest.param("workers", marks=pytest.mark.slow)])
def _trainer(request, ray_local):
    """A training in this process, or in workers whose start takes most of a test's time."""
    if request.param == "workers":
        yield
        return
    with local_training(), local_data():
        yield


@pytest.mark.usefixtures("_trainer")
def test_an_unknown_encoder_is_one_line_told_once_and_leaves_the_folder_free(world, tmp_path, caplog):
    caplog.set_level("INFO")
    model = settings(world, "x").model.model_copy(
        update={"vision": VisionSpec("vit_tiny_patch16_22", pretrained=False)}
    )
    with pytest.raises(UserError, match="vit_tiny_patch16_224"):
        train.main(settings(world, tmp_path / "run", model=model, workers=1, max_failures=3))
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.usefixtures("_trainer")
def test_a_run_whose_files_are_all_broken_stops_and_keeps_its_quarantine_table(tmp_path):
    rows = [{"media": f"gone/{index}.jpg", "caption": "a red circle"} for index in range(1000)]
    manifest = tmp_path / "rows.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = TrainDataSettings(manifest=str(manifest), num_frames=2)
    with pytest.raises(UserError, match="rows in 16 = rows used 0 . rows quarantined 16.*quarantine.parquet"):
        train.main(settings(tmp_path, tmp_path / "run", data=data, batch_size=8, steps=4, workers=1))
    table = pq.read_table(tmp_path / "run" / "quarantine.parquet")
    assert table["error_class"].to_pylist() == ["missing"] * 16


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_storage_that_refuses_ends_the_run_at_once_also_where_restarts_are_allowed(ray_local, workers, tmp_path):
    """The rank that meets it raises alone, in the middle of the loop; the others wait for it."""
    rows = [{"media": f"nosuch://bucket/{index}.jpg", "caption": "a red circle"} for index in range(64)]
    rows[0]["media"] = "here.jpg"  # what is looked at before the start
    manifest = tmp_path / "rows.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = TrainDataSettings(manifest=str(manifest), num_frames=2)
    chosen = settings(tmp_path, tmp_path / "run", data=data, batch_size=8, steps=4, workers=workers, max_failures=3)
    with pytest.raises(UserError, match=r"nosuch://bucket/\d+.jpg: no such protocol; use a local path"):
        train.main(chosen)
    assert len((tmp_path / "run" / "starts.jsonl").read_text().splitlines()) == 1
    events = [json.loads(line)["text"] for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert any(text.startswith("ALARM worker ") and "no such protocol" in text for text in events)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": 8}, r"workers=8 and decode_workers=1 need 9 CPUs, this machine's Ray has 4; lower them"),
        ({"use_gpu": True}, r"workers=2 need 2 GPUs, this machine's Ray has 0; set use_gpu=false"),
    ],
)
def test_what_this_machine_lacks_is_told_at_once(ray_local, world, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train.main(settings(world, tmp_path / "run", **changes))
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint_every", [1000, 1])
def test_a_killed_train_worker_is_restarted_and_every_row_counts_once(checkpoint_every, world, tmp_path):
    """SIGKILL one of two ranks, before any checkpoint and after some; `max_failures` starts both again."""
    output, steps = tmp_path / "run", 60
    chosen = settings(
        world, output, steps=steps, checkpoint_every=checkpoint_every, max_failures=1, log_every=1, decode_workers=1
    )
    with Job(chosen, tmp_path / "log") as job:
        job.wait_for_step(5)
        job.kill_one("RayTrainWorker")
        assert job.end() == 0, job.log.read_text()[-2000:]
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["resumed_from_step"] > 0) == (checkpoint_every == 1)
    assert [record["step"] for record in read_metrics(str(output))] == list(range(1, steps + 1))
    # 60 steps are 10 epochs of 150 rows, three of them broken.
    counts = [summary[f"rows_{name}"] for name in ("in", "used", "quarantined")]
    assert counts == [1500, 1470, 30]
    assert "ALARM worker " in (output / "events.jsonl").read_text()


@pytest.mark.slow
def test_a_killed_run_resumes_from_its_last_checkpoint(world, tmp_path):
    """SIGKILL the whole job in the middle; --resume goes on from the newest checkpoint to the same end."""
    output = tmp_path / "run"
    config = tmp_path / "train.yaml"
    config.write_text(yaml.safe_dump(settings(world, output, steps=400, checkpoint_every=5).model_dump(mode="json")))
    command = [sys.executable, "-m", "jobs.train", "--config", str(config)]
    first = subprocess.Popen(command, cwd=MODELS.parents[3], start_new_session=True)
    deadline = time.monotonic() + 180
    while len(list((output / "checkpoints").glob("step-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    reached = int(checkpoint_folders.newest_checkpoint(str(output))[-8:])
    assert 10 <= reached < 400
    total = str(reached + 10)
    done = subprocess.run(
        [*command, "--resume", "--set", f"steps={total}"], cwd=MODELS.parents[3], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads((output / "summary.json").read_text())
    assert summary["resumed_from_step"] == reached and summary["steps"] == reached + 10
    steps = [record["step"] for record in read_metrics(str(output))]
    assert steps == sorted(set(steps)) and steps[-1] == reached + 10
    assert summary["rows_in"] == summary["rows_used"] + summary["rows_quarantined"]
