"""Whose a run folder is, and what a mistake leaves in it."""

import pytest

from jobs.folders.run import run_folder
from jobs.settings.data import TrainDataSettings
from jobs.settings.model import ModelSettings
from jobs.settings.train import TrainSettings
from qformer.errors import UserError


def settings(output, **changes):
    values = {
        "output": str(output),
        "stage": 1,
        "model": ModelSettings(vision="x"),
        "data": TrainDataSettings(manifest="m"),
        "steps": 1,
        "batch_size": 1,
    }
    return TrainSettings(**{**values, **changes})


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_used_folder_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="already used"), run_folder(settings(tmp_path)):
        pass
    assert files(tmp_path) == ["mine.txt"]


@pytest.mark.parametrize("theirs", ["mine: true\n", "a: [", "stage: 1\n"])
def test_resume_leaves_a_strangers_folder_alone(tmp_path, theirs):
    (tmp_path / "settings.yaml").write_text(theirs)
    (tmp_path / "summary.json").write_text("mine")
    with pytest.raises(UserError, match="by no training run"), run_folder(settings(tmp_path, resume=True)):
        pass
    assert (tmp_path / "settings.yaml").read_text() == theirs
    assert (tmp_path / "summary.json").read_text() == "mine"


def test_resume_takes_the_run_itself_and_refuses_another_stage(tmp_path):
    with run_folder(settings(tmp_path / "run")):
        pass
    with run_folder(settings(tmp_path / "run", resume=True)):
        pass
    with pytest.raises(UserError, match="of stage 1, the settings say stage=2"):
        run_folder(settings(tmp_path / "run", resume=True, stage=2)).__enter__()


@pytest.mark.parametrize("result", [None, "quarantine.parquet", "checkpoints"])
def test_a_mistake_before_the_first_result_frees_the_folder(tmp_path, result):
    with pytest.raises(UserError, match="typo"), run_folder(settings(tmp_path / "run")):
        (tmp_path / "run" / "tokenizer").mkdir()
        if result:
            (tmp_path / "run" / result).write_text("")
        raise UserError("typo")
    assert files(tmp_path / "run") == ([] if result is None else sorted([result, "settings.yaml", "tokenizer"]))


def test_a_crash_or_a_resumed_run_removes_nothing(tmp_path):
    with pytest.raises(RuntimeError), run_folder(settings(tmp_path / "run")):
        raise RuntimeError
    with pytest.raises(UserError), run_folder(settings(tmp_path / "run", resume=True)):
        raise UserError("typo")
    assert files(tmp_path / "run") == ["settings.yaml"]
