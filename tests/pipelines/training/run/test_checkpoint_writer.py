"""Checkpoints written beside training: whole or not there, the newest few, and a full disk ends no run."""

import contextlib
import dataclasses
import errno
import json
import resource

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from pipelines.data.storage import checkpoint_folders
from pipelines.training.records.accounting import Accounting
from pipelines.training.run.checkpoint import Checkpoint, TrainingState, copy_to_cpu
from pipelines.training.run.checkpoint_writer import CheckpointError, CheckpointWriter
from qformer.conversion.checkpoint import read_info, read_weights
from qformer.errors import UserError
from tests.tiny_checkpoints import write_stage1


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = write_stage1(tmp_path_factory.mktemp("base") / "one")
    return read_info(folder), read_weights(folder)


def checkpoint(base, step):
    info, weights = base
    state = TrainingState(step, {"state": {}}, Accounting().state(), "order")
    settled = dataclasses.replace(info, step=step)
    return Checkpoint(
        info=settled, weights=copy_to_cpu(weights), tokenizer=None, state=state, settings_yaml="stage: 1\n"
    )


@pytest.fixture
def alarms():
    return []


def written(base, output, steps, alarms, keep=3):
    writer = CheckpointWriter(str(output), num_newest=keep, warn=alarms.append)
    for step in steps:
        writer.submit(checkpoint(base, step))
    writer.close()
    return writer


@contextlib.contextmanager
def full_disk():
    """No file may grow beyond a few bytes: the operating system itself refuses, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_is_written_is_the_run_as_it_stood(tmp_path):
    live = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(live.parameters(), lr=0.1)
    live(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    taken = copy_to_cpu({"weights": live.state_dict(), "optimizer": optimizer.state_dict()})
    before = live.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(live.weight, before)
    assert torch.equal(taken["weights"]["weight"], before)
    assert taken["optimizer"]["state"][0]["step"] == 1


def test_the_newest_few_stay(base, tmp_path, alarms):
    written(base, tmp_path, [10, 20, 30, 40], alarms, keep=2)
    found = [checkpoint_folders.step_of(uri) for uri in checkpoint_folders.finished_checkpoints(str(tmp_path))]
    assert found == [40, 30] and alarms == []
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000030", "step-00000040"]
    checkpoint_folders.prune(str(tmp_path), 1, always=[30])
    assert len(checkpoint_folders.finished_checkpoints(str(tmp_path))) == 2


@pytest.mark.parametrize("harm", ["bit", "cut", "gone", "marker"])
def test_a_damaged_newest_checkpoint_is_told_and_the_one_before_used(base, tmp_path, alarms, caplog, harm):
    written(base, tmp_path, [10, 20], alarms)
    newest = tmp_path / "checkpoints" / "step-00000020"
    file = newest / ("complete.json" if harm == "marker" else "bridge.safetensors")
    content = bytearray(file.read_bytes())
    if harm == "gone":
        file.unlink()
    else:
        content[-1] ^= 1
        file.write_bytes(content if harm == "bit" else content[: len(content) // 2])
    used = checkpoint_folders.newest_whole_checkpoint(str(tmp_path))
    assert used is not None and used.name == "step-00000010"
    assert "step-00000020 is damaged" in caplog.text and file.name in caplog.text
    (tmp_path / "checkpoints" / "step-00000010" / "training.pt").unlink()
    with pytest.raises(UserError, match="every checkpoint of .* is damaged"):
        checkpoint_folders.newest_whole_checkpoint(str(tmp_path))


def test_a_full_disk_does_not_end_the_run(base, tmp_path, alarms):
    writer = CheckpointWriter(str(tmp_path), num_newest=3, warn=alarms.append)
    writer.submit(checkpoint(base, 10))
    writer._wait()
    with full_disk():
        writer.submit(checkpoint(base, 20))
        writer._wait()
    (alarm,) = alarms
    assert alarm.startswith("ALARM checkpoint of step 20 is not written") and "File too large" in alarm
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000010"]
    writer.submit(checkpoint(base, 30))
    writer.close()
    assert len(checkpoint_folders.finished_checkpoints(str(tmp_path))) == 2 and len(alarms) == 1


def test_the_last_checkpoint_is_tried_again_and_its_loss_ends_the_run(base, tmp_path, alarms):
    writer = CheckpointWriter(str(tmp_path), num_newest=3, warn=alarms.append)
    with full_disk():
        writer.submit(checkpoint(base, 10))
        with pytest.raises(CheckpointError, match=r"last checkpoint \(step 10\) cannot be written .* --resume"):
            writer.close()
    assert len(alarms) == 4
    writer.close()
    assert checkpoint_folders.finished_checkpoints(str(tmp_path))[0].endswith("step-00000010")


class AwayFileSystem(MemoryFileSystem):
    """Takes no file while `failures` are left."""

    protocol = "away"
    store = {}
    pseudo_dirs = [""]
    failures: list[Exception] = []

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.replace("away://", "memory://"))

    def put_file(self, lpath, rpath, **kwargs):
        if self.failures:
            raise self.failures.pop(0)
        super().put_file(lpath, rpath, **kwargs)


def test_a_store_that_is_away_for_a_moment_loses_nothing(base, alarms):
    fsspec.register_implementation("away", AwayFileSystem, clobber=True)
    AwayFileSystem.failures = [OSError(errno.EIO, "away"), ConnectionResetError("away")]
    written(base, "away://bucket/run", [10], alarms)
    assert AwayFileSystem.failures == [] and alarms == []
    folder = checkpoint_folders.newest_whole_checkpoint("away://bucket/run")
    assert folder is not None
    assert json.loads((folder / "complete.json").read_text())["step"] == 10
    AwayFileSystem.store.clear()
