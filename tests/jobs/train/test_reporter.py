"""What the first rank writes down, also when the disk has no room; and the notice that a machine goes away."""

import json
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray

from jobs.settings.data import TrainDataSettings
from jobs.settings.model import ModelSettings
from jobs.settings.train import TrainSettings
from jobs.train import reporter as train_reporter
from jobs.train.reporter import RunReporter, append_events
from jobs.train.worker import _PreemptionNotice, _start_limit, train_worker
from jobs.train.worker_job import FeedHandle, WorkerJob
from pipelines.data import storage
from pipelines.data.batches.batch import SampleBatch
from pipelines.data.failures import Failure
from pipelines.training.records.accounting import Accounting
from pipelines.training.records.run_status import RunStatus
from tests.actors import kill_actor


@pytest.fixture
def status(ray_local):
    actor = ray.remote(RunStatus).options(num_cpus=0).remote()
    yield actor
    ray.kill(actor)


def settings(output):
    data = TrainDataSettings(manifest="m")
    return TrainSettings(
        output=str(output), stage=1, model=ModelSettings(vision="v"), data=data, steps=10, batch_size=2
    )


def reporter(status, output, start_step=0):
    return RunReporter(status, settings(output), start_step)


def messages(status):
    return ray.get(status.read.remote())[1]


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_start_after_the_coordinator_died_ends_the_run_in_a_line(ray_local, tmp_path):
    coordinator = ray.remote(RunStatus).options(num_cpus=0).remote()
    ray.get(coordinator.user_error.remote())
    kill_actor(coordinator)
    feed = FeedHandle(actor=coordinator, cache=None, rows_per_epoch=1, steps_per_epoch=1)
    job = WorkerJob(settings=settings(tmp_path), coordinator=coordinator, training=feed, validation=None, order="order")
    mistake = train_worker({"job": job})["mistake"]
    assert "hands out the batches died" in mistake and "--resume" in mistake


def test_lines_of_an_earlier_start_stay_and_the_user_is_told(status, tmp_path):
    first = reporter(status, tmp_path)
    first.record_start({"step": 0, "workers": 2})
    first.log_event("hello")
    second = reporter(status, tmp_path, start_step=4)
    second.record_start({"step": 4, "workers": 1})
    second.record_bad_step({"step": 5, "sample_ids": ["a"]})
    assert messages(status) == ["hello"]
    assert [(start["step"], start["workers"]) for start in lines(tmp_path / "starts.jsonl")] == [(0, 2), (4, 1)]
    assert all(start["versions"]["torch"] and start["hardware"] for start in lines(tmp_path / "starts.jsonl"))
    assert [event["text"] for event in lines(tmp_path / "events.jsonl")] == ["hello"]
    assert lines(tmp_path / "bad_steps.jsonl") == [{"step": 5, "sample_ids": ["a"]}]


def test_bad_steps_that_are_done_again_are_forgotten(status, tmp_path):
    first = reporter(status, tmp_path)
    for step in (3, 4, 7):
        first.record_bad_step({"step": step})
    with open(tmp_path / "bad_steps.jsonl", "a") as file:
        file.write('{"step": 2, "rea')  # as its writer died
    second = reporter(status, tmp_path, start_step=4)  # steps 0 to 3 are in the checkpoint
    assert lines(tmp_path / "bad_steps.jsonl") == [{"step": 3}]
    second.record_bad_step({"step": 4})
    assert lines(tmp_path / "bad_steps.jsonl") == [{"step": 3}, {"step": 4}]


def test_the_quarantine_table_is_written_as_training_goes_on(status, tmp_path, monkeypatch):
    """Not only at checkpoints; and not at every log line, for it is written whole."""
    one, accounting = reporter(status, tmp_path), Accounting()
    figures = {"step": 1, "epoch": 0, "learning_rate": 1.0, "samples_per_s": 1.0, "data_wait_share": 0.0}

    def fails(name):
        accounting.add(batch_of(name), 0)
        accounting.combine()

    def written():
        return pq.read_table(tmp_path / "quarantine.parquet")["sample_id"].to_pylist()

    one.record_step(figures, accounting)
    assert not (tmp_path / "quarantine.parquet").exists()
    fails("a")
    one.record_step(figures, accounting)
    assert written() == ["a"]
    fails("b")
    one.record_step(figures, accounting)
    assert written() == ["a"]
    monkeypatch.setattr(train_reporter, "_QUARANTINE_PAUSE_S", 0.0)
    one.record_step(figures, accounting)
    assert written() == ["a", "b"]


def batch_of(name):
    """One row, which failed."""
    return SampleBatch(
        step=0,
        rank=0,
        sample_ids=[name],
        captions=[""],
        image_ids=np.zeros(1, np.int64),
        is_valid=np.zeros(1, np.bool_),
        images=np.zeros((1, 1, 3, 2, 2), np.uint8),
        failures=[Failure(name, None, "decode", "corrupt", "torn")],
        frame_valid=np.ones((1, 1), np.bool_),
    )


def test_a_full_disk_ends_nothing_and_the_next_line_brings_the_lost_one(status, tmp_path):
    one = reporter(status, tmp_path)
    with mock.patch.object(storage, "write_text", side_effect=OSError(28, "No space left on device")):
        one.log_event("lost?")
    with mock.patch.object(storage, "open_output", side_effect=OSError(28, "No space left on device")):
        one.write_quarantine(Accounting())
    one.log_event("room again")
    texts = [event["text"][:20] for event in lines(tmp_path / "events.jsonl")]
    assert texts == ["lost?", "ALARM quarantine.par", "room again"]
    assert any("ALARM events.jsonl is not written" in text for text in messages(status))
    one.write_quarantine(Accounting())
    assert pq.read_table(tmp_path / "quarantine.parquet").num_rows == 0


def test_what_workers_died_of_is_kept_by_those_that_come_after(status, tmp_path):
    ray.get(status.record_failure.remote("ALARM worker 1 died: no more memory"))
    one = reporter(status, tmp_path)
    one.save_events(ray.get(status.take_failures.remote()))
    append_events(str(tmp_path), ["ALARM worker 0 died, and nobody came after"])
    append_events(str(tmp_path), ray.get(status.take_failures.remote()))
    texts = [event["text"] for event in lines(tmp_path / "events.jsonl")]
    assert texts == ["ALARM worker 1 died: no more memory", "ALARM worker 0 died, and nobody came after"]
    assert messages(status) == texts[:1]  # once


def test_a_run_that_never_reaches_its_next_checkpoint_is_given_up(status, tmp_path):
    data = TrainDataSettings(manifest="m")
    elastic = TrainSettings(
        output=str(tmp_path), stage=1, model=ModelSettings(vision="v"), data=data, steps=9, batch_size=2, min_workers=1
    )
    assert [_start_limit(status, elastic, 0) for _ in range(10)] == [None] * 10
    assert [_start_limit(status, elastic, 5) for _ in range(10)] == [None] * 10  # it got on
    limited = elastic.model_copy(update={"max_failures": 1000})
    assert _start_limit(status, limited, 5) is None
    assert "started 12 times from step 5 and never reached the next checkpoint" in _start_limit(status, elastic, 5)


def test_a_notice_of_preemption_counts_once():
    told = []
    with mock.patch.object(ray.train, "get_preemption_info", side_effect=[None, "first", "first", "second", None]):
        notice = _PreemptionNotice(told.append)
        assert [notice() for _ in range(5)] == [False, True, False, True, False]
    assert len(told) == 2 and "taking a checkpoint first" in told[0]
