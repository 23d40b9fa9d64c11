import json

import pytest

from jobs.demo import steps as module
from jobs.demo.steps import Steps
from qformer.errors import UserError


def run(output, log, inputs=1):
    steps = Steps(output)
    steps.run("a", inputs, lambda: log.append("a"))
    steps.run("b", {}, lambda: log.append("b"), after=("a",))
    return steps


def test_what_is_unchanged_is_reused(tmp_path):
    log = []
    run(tmp_path / "demo", log)
    run(tmp_path / "demo", log)
    assert log == ["a", "b"]


def test_a_changed_input_runs_the_step_and_all_that_follow(tmp_path):
    log = []
    run(tmp_path / "demo", log)
    run(tmp_path / "demo", log, inputs=2)
    assert log == ["a", "b", "a", "b"]


def test_changed_code_runs_everything(tmp_path, monkeypatch):
    log = []
    run(tmp_path / "demo", log)
    monkeypatch.setattr(module, "_code_digest", lambda: "other")
    run(tmp_path / "demo", log)
    assert log == ["a", "b", "a", "b"]


def test_a_step_that_failed_is_not_remembered_and_starts_clean(tmp_path):
    steps = Steps(tmp_path / "demo")

    def fail():
        steps.folder("a").mkdir()
        (steps.folder("a") / "half").touch()
        raise InterruptedError

    with pytest.raises(InterruptedError):
        steps.run("a", 1, fail)
    steps = Steps(tmp_path / "demo")
    steps.run("a", 1, lambda: None)
    assert not (steps.folder("a") / "half").exists()
    assert "a" in json.loads((tmp_path / "demo" / "demo.json").read_text())["seconds"]


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds something else"):
        Steps(tmp_path)
    assert (tmp_path / "thesis.txt").exists()
