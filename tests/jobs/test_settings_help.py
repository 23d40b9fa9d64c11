"""What `--help` tells of the settings."""

import pytest

from jobs.cli import JOBS, _settings_class, main
from jobs.settings import PrepareSettings, TrainSettings
from jobs.settings_help import describe_settings


def test_every_key_stands_there_with_its_default_and_meaning():
    lines = describe_settings(TrainSettings).splitlines()
    assert "  output (required)" in lines
    assert "  optim.learning_rate = 0.0001" in lines
    assert "  model.language = null" in lines
    place = lines.index("  data.augmentation.horizontal_flip = false")
    assert lines[place + 1].startswith("      Off by default")


def test_items_of_lists_and_dataclasses_are_spelt_out():
    assert "  sources.0.path (required)" in describe_settings(PrepareSettings)
    assert "  generation.num_beams = 1" in describe_settings(_settings_class(JOBS["caption"]))


@pytest.mark.parametrize("name", JOBS)
def test_help_of_every_job_ends_with_its_keys(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert f"keys:\n{describe_settings(_settings_class(JOBS[name]))}" in capsys.readouterr().out
