"""A training run whose folder and media lie on an object store: written, resumed, looked at."""

import json

import fsspec
import pytest

from jobs.demo.world.corpus import write_world
from jobs.settings.data import TrainDataSettings
from jobs.settings.train import ValidationSettings
from pipelines.data import storage
from pipelines.data.storage import checkpoint_folders
from pipelines.training.records.metrics_log import read_metrics
from pipelines.training.run.vocabulary import learn_text_tokenizer
from tests.jobs.train.test_job import settings
from tests.jobs.train_jobs import Job
from tests.pipelines.data.object_store import CREDENTIALS, moto_program, s3_server

pytestmark = pytest.mark.slow
PATIENCE_S = 900
"""Every write of a run is a request to the server, which is slow."""


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """A bucket that holds the world under world/; the environment names its server."""
    folder = tmp_path_factory.mktemp("s3")
    with s3_server(moto_program(folder)) as address, pytest.MonkeyPatch.context() as patch:
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": address}.items():
            patch.setenv(name, value)
        s3 = fsspec.get_filesystem_class("s3")
        s3.clear_instance_cache()  # of another test's server
        store = fsspec.filesystem("s3")
        store.mkdir("runs")
        write_world(folder / "world", num_images=60, num_clips=20, num_test_images=6, num_test_clips=4, seed=3)
        store.put(f"{folder / 'world'}/", "s3://runs/world/", recursive=True)
        yield "s3://runs"
        s3.clear_instance_cache()


def test_a_run_on_a_store_is_written_and_resumed(bucket, tmp_path):
    output = f"{bucket}/stage1"
    data = TrainDataSettings(manifest=f"{bucket}/world/manifest.jsonl", num_frames=2)
    learn_text_tokenizer(lambda: ["a small red circle is left of a blue square"], tmp_path / "tokenizer")
    model = settings(tmp_path, "x").model.model_copy(update={"tokenizer": str(tmp_path / "tokenizer")})
    validation = ValidationSettings(split="test", every=4)
    chosen = settings(
        tmp_path, output, data=data, model=model, validation=validation, steps=4, batch_size=20, checkpoint_every=2
    )
    with Job(chosen, tmp_path / "first.log") as job:
        assert job.process.wait(PATIENCE_S) == 0, job.log.read_text()[-3000:]
    with Job(chosen.model_copy(update={"steps": 8}), tmp_path / "second.log", resume=True) as job:
        assert job.process.wait(PATIENCE_S) == 0, job.log.read_text()[-3000:]
    for name in ("first", "second"):
        assert "ALARM" not in (tmp_path / f"{name}.log").read_text()
    fsspec.filesystem("s3").invalidate_cache()
    summary = json.loads(storage.read_bytes(f"{output}/summary.json", 10**6))
    assert (summary["resumed_from_step"], summary["steps"]) == (4, 8)
    assert [record["step"] for record in read_metrics(output)] == [2, 4, 6, 8]
    assert checkpoint_folders.newest_checkpoint(output).endswith("step-00000008")
    names = {name.partition("/")[0] for name in storage.list_files(output)}
    assert names >= {"best.json", "events.jsonl", "quarantine.parquet", "settings.yaml", "starts.jsonl", "tensorboard"}
