"""`--config` takes the name of a shipped file, from any working directory."""

import pytest
import yaml

from jobs.cli import main as cli
from jobs.settings.loading import CONFIGS, find_config

STAGE1 = CONFIGS / "recipes" / "blip2_stage1.yaml"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("blip2_stage1", STAGE1),
        ("recipes/blip2_stage1", STAGE1),
        ("recipes/blip2_stage1.yaml", STAGE1),
        ("jobs/configs/recipes/blip2_stage1.yaml", STAGE1),  # as the examples write it
        ("prepare", CONFIGS / "examples" / "prepare.yaml"),
        ("prepare.yaml", None),  # a person's own file, which is missing
        ("examples/blip2_stage1", None),
        ("blip2_stage", None),
        ("recipes", None),
        ("nowhere/jobs/configs/recipes/blip2_stage1.yaml", None),
    ],
)
def test_names_of_shipped_files(name, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = type(CONFIGS)(name)
    assert find_config(path) == (found or path)


def test_a_file_of_the_working_directory_comes_first(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "blip2_stage1.yaml").write_text(STAGE1.read_text() + "\nseed: 4321\n")
    for name, seed in (("recipes/blip2_stage1.yaml", 4321), ("blip2_stage1", 0)):
        assert cli.main(["train", "--config", name, "--set", "output=out", "--show-config"]) == 0
        assert yaml.safe_load(capsys.readouterr().out)["seed"] == seed


def test_a_missing_file_names_the_fix(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--config", "stage1.yaml"]) == 2
    said = capsys.readouterr().err
    assert "stage1.yaml does not exist" in said and "recipes/blip2_stage1" in said and said.count("\n") == 1
