"""The metrics log on a full disk, or with a last line that a crash cut short."""

import pytest

from pipelines.data import storage
from pipelines.training.records.metrics_log import METRICS_FILE, MetricsLog, read_metrics


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
    warnings = []
    log = MetricsLog(str(tmp_path), None, 0, warnings.append)
    log.write(record(1))
    full(True)
    log.write(record(2))
    log.write(record(3))
    full(False)
    assert len(warnings) == 2 and "No space left" in warnings[0]
    log.write(record(4))
    assert read_metrics(str(tmp_path)) == [record(step) for step in (1, 2, 3, 4)]
    log.close()


def test_a_line_that_was_cut_short_is_left_out_and_the_file_mended(ray_local, tmp_path):
    file = tmp_path / METRICS_FILE
    file.write_text('{"step": 1, "epoch": 0, "loss/total": 1.0}\n{"step": 2, "ep')
    assert read_metrics(str(tmp_path)) == [record(1)]
    log = MetricsLog(str(tmp_path), None, 1)
    log.write(record(2))
    log.close()
    assert [line[:10] for line in file.read_text().splitlines()] == ['{"step": 1', '{"step": 2']
