"""What `--help` tells of the settings."""

import pytest

from jobs.cli.main import JOBS, _settings_class, main
from jobs.settings.corpus import PrepareSettings
from jobs.settings.help import describe_settings
from jobs.settings.loading import load
from jobs.settings.train import TrainSettings


def test_every_key_stands_there_with_its_default_and_meaning():
    lines = describe_settings(TrainSettings).splitlines()
    assert "  output (required)" in lines
    assert "  optim.learning_rate = 0.0001" in lines
    assert "  model.language = null" in lines
    place = lines.index("  data.augmentation.horizontal_flip = false")
    assert lines[place + 1].startswith("      Whether half of the images are mirrored")


def test_items_of_lists_and_dataclasses_are_spelt_out():
    assert "  sources.0.path (required)" in describe_settings(PrepareSettings)
    assert "  generation.num_beams = 1" in describe_settings(_settings_class(JOBS["caption"]))


def test_every_key_can_be_set_as_it_is_spelt():
    """Optional parts, lists and tuples included: what the help shows is what --set takes."""
    lines = describe_settings(TrainSettings).splitlines()
    assert "  validation.every (required)" in lines and "  model.lora.rank = 16" in lines
    assert "  data.augmentation.crop_scale = [0.5, 1.0]" in lines and "  data.manifest.0.path (required)" in lines
    least = [
        "output=o",
        "stage=2",
        "model.vision=v",
        "data.manifest.0.path=m",
        "steps=1",
        "batch_size=1",
        "model.audio=a",
    ]
    least += ["validation.every=1"]
    shown = [line.strip().split(" = ") for line in lines if line.startswith("  ") and " = " in line[:70]]
    plain = [f"{key}={value}" for key, value in shown if not line_breaks(key, value) and "[kind: " not in value]
    assert len(plain) >= 75
    loaded = load(TrainSettings, None, [*least, *plain])
    assert loaded.model.lora is not None and loaded.optim.betas == (0.9, 0.98)
    kinds = [line.strip().removesuffix("]").split(" [kind: ") for line in lines if "[kind: " in line]
    for kind in {kind for _, kind in kinds}:
        own = [key.replace(" = ", "=") for key, of in kinds if of == kind]
        assert load(TrainSettings, None, [*least, *own]).model.bridge.kind == kind


def line_breaks(key, value):
    """Values that only stand for something that the other keys spell out."""
    return value.endswith("…") or key in ("validation", "model.lora", "model.audio", "model.bridge")


@pytest.mark.parametrize("name", JOBS)
def test_the_whole_help_of_every_job_ends_with_its_keys(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help-all"])
    assert ended.value.code == 0
    assert f"keys:\n{describe_settings(_settings_class(JOBS[name]))}" in capsys.readouterr().out
