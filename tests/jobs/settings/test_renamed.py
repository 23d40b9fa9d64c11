"""Former keys: one line that names the present key; what an earlier run wrote is read."""

from pathlib import Path

import pytest

from jobs.settings.convert import ImportSettings
from jobs.settings.corpus import FeaturesSettings
from jobs.settings.loading import load, load_saved, resolved_yaml
from jobs.settings.renamed import RENAMED
from jobs.settings.train import TrainSettings
from qformer.config import AudioSpec, LanguageSpec, VisionSpec
from qformer.errors import UserError

FORMER = (Path(__file__).parent / "former_train.yaml").read_text()
TRAIN = ["output=o", "stage=2", "model.vision=v", "data.manifest=m", "steps=1", "batch_size=1"]
FEATURES = ["output=o", "vision=v", "data.manifest=m"]


@pytest.mark.parametrize("old", RENAMED)
def test_a_former_key_is_one_line_with_the_present_one(old, tmp_path):
    model, given = (TrainSettings, TRAIN) if old.startswith("model.") else (FeaturesSettings, FEATURES)
    with pytest.raises(UserError) as caught:
        load(model, None, [*given, f"{old}=1"])
    assert str(caught.value) == f"--set {old}=1: {old} is now {RENAMED[old]}; rename it"
    file = tmp_path / "old.yaml"
    *parents, name = old.split(".")
    file.write_text(f"{parents[0]}: {{{name}: 1}}" if parents else f"{name}: 1")
    with pytest.raises(UserError) as caught:
        load(model, file, given)
    assert str(caught.value) == f"{file}: {old} is now {RENAMED[old]}; rename it"


def test_a_job_without_the_present_key_does_not_name_it():
    with pytest.raises(UserError, match="unknown key 'audio_pretrained'; "):
        load(ImportSettings, None, ["source=s", "output=o", "audio_pretrained=true"])


def test_the_settings_of_an_earlier_run_are_read():
    saved = load_saved(TrainSettings, FORMER)
    vision = VisionSpec("eva_giant_patch14_clip_224.laion400m", image_size=364)
    assert (saved.model.vision, saved.model.audio) == (vision, AudioSpec("ast"))
    assert (saved.model.language, saved.model.lora.rank) == (LanguageSpec("facebook/opt-2.7b"), 4)
    assert load_saved(TrainSettings, resolved_yaml(saved)) == saved
    silent = load_saved(TrainSettings, FORMER.replace("  audio: ast\n", "  audio: null\n"))
    assert silent.model.audio is None


@pytest.mark.parametrize("text", ["", "a: [", "- 1", "stage: 1", "\x00"])
def test_what_is_no_settings_of_the_job_is_none(text):
    assert load_saved(TrainSettings, text) is None
