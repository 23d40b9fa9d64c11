"""A run's log on a disk that is full, or whose last line a crash cut short; a board that answers late."""

import logging
import time

import pytest

from pipelines.data import storage
from pipelines.training.records import telemetry
from pipelines.training.records.telemetry import METRICS_FILE, ProgressBoard, RunLog, read_metrics
from tests.actors import kill_actor


def record(step):
    return {"step": step, "epoch": 0, "loss/total": 1.0 / step}


@pytest.fixture
def full(monkeypatch):
    """Turns the disk full and empty again."""

    def no_room(*_):
        raise OSError(28, "No space left on device")

    def turn(is_full):
        if is_full:
            monkeypatch.setattr("builtins.open", no_room)
            monkeypatch.setattr(storage, "write_bytes", no_room)
        else:
            monkeypatch.undo()

    return turn


def test_a_full_disk_ends_nothing_and_the_next_line_brings_the_lost_ones(ray_local, tmp_path, full):
    told = []
    log = RunLog(str(tmp_path), None, 0, told.append)
    log.write(record(1))
    full(True)
    log.write(record(2))
    log.write(record(3))
    full(False)
    assert len(told) == 2 and "No space left" in told[0]
    log.write(record(4))
    assert read_metrics(str(tmp_path)) == [record(step) for step in (1, 2, 3, 4)]
    log.close()


def test_a_line_that_was_cut_short_is_left_out_and_the_file_mended(ray_local, tmp_path):
    file = tmp_path / METRICS_FILE
    file.write_text('{"step": 1, "epoch": 0, "loss/total": 1.0}\n{"step": 2, "ep')
    assert read_metrics(str(tmp_path)) == [record(1)]
    log = RunLog(str(tmp_path), None, 1)
    log.write(record(2))
    log.close()
    assert [line[:10] for line in file.read_text().splitlines()] == ['{"step": 1', '{"step": 2']


class BusyBoard(ProgressBoard):
    """Does something else at times, as `RunDesk` does."""

    def be_busy(self, seconds):
        time.sleep(seconds)


def test_what_a_busy_board_has_to_say_is_told_later(ray_local, monkeypatch, caplog):
    board = ray_local.remote(BusyBoard).options(num_cpus=0).remote()
    ray_local.get(board.say.remote("ALARM of a worker"))
    board.be_busy.remote(2.0)
    listener = telemetry._Listener(board)
    with caplog.at_level(logging.INFO):
        with monkeypatch.context() as patch:
            patch.setattr(telemetry, "_ANSWER_S", 0.5)
            assert listener.poll() == {} and not caplog.records
        ray_local.get(board.put.remote({"step": 1.0}))
        ray_local.get(board.say.remote("resuming"))
        assert [listener.poll() for _ in range(2)] == [{"step": 1.0}] * 2
    assert [record.message for record in caplog.records] == ["ALARM of a worker", "resuming"]
    kill_actor(board)
    assert listener.poll() == {}
