"""Frozen models in settings: as a mapping, or by the name alone."""

import pytest

from jobs.settings.corpus import FeaturesSettings
from jobs.settings.loading import load
from jobs.settings.train import TrainSettings
from qformer.config import AudioSpec, LanguageSpec, VisionSpec
from qformer.errors import UserError

LEAST = ["output=o", "stage=2", "data.manifest=m", "steps=1", "batch_size=1"]


def model_of(tmp_path, *contents, overrides=()):
    files = [tmp_path / f"{index}.yaml" for index in range(len(contents))]
    for file, content in zip(files, contents, strict=True):
        file.write_text(content)
    return load(TrainSettings, files, [*LEAST, *overrides]).model


@pytest.mark.parametrize(
    ("contents", "overrides", "expected"),
    [
        # the short form, the long form
        (("model: {vision: v}",), (), VisionSpec("v")),
        (("model: {vision: {name: v, layer: -1}}",), (), VisionSpec("v", layer=-1)),
        # the short form sets the name and leaves the rest, in a file and in an override
        (("model: {vision: {name: v, layer: -1}}", "model: {vision: w}"), (), VisionSpec("w", layer=-1)),
        (("model: {vision: {name: v, layer: -1}}",), ("model.vision=w",), VisionSpec("w", layer=-1)),
        # parts are added to the short form
        (("model: {vision: v}", "model: {vision: {layer: 3}}"), (), VisionSpec("v", layer=3)),
        (("model: {vision: v}",), ("model.vision.layer=-1",), VisionSpec("v", layer=-1)),
        ((), ("model.vision=v", "model.vision.image_size=96"), VisionSpec("v", image_size=96)),
        ((), ("model.vision.layer=-1", "model.vision=v"), VisionSpec("v", layer=-1)),
        # a mapping replaces, as everywhere in an override
        (("model: {vision: {name: v, layer: -1}}",), ("model.vision={name: w}",), VisionSpec("w")),
        ((), ("model={vision: v}", "model.vision.layer=2"), VisionSpec("v", layer=2)),
    ],
)
def test_short_and_long_forms_combine(tmp_path, contents, overrides, expected):
    assert model_of(tmp_path, *contents, overrides=overrides).vision == expected


def test_audio_and_language_have_both_forms_too(tmp_path):
    model = model_of(tmp_path, "model: {vision: v, audio: a}", overrides=["model.language=l"])
    assert (model.audio, model.language) == (AudioSpec("a"), LanguageSpec("l"))
    model = model_of(tmp_path, "model: {vision: v, audio: a}", overrides=["model.audio.pretrained=false"])
    assert (model.audio, model.language) == (AudioSpec("a", pretrained=False), None)
    assert model_of(tmp_path, "model: {vision: v, audio: a}", overrides=["model.audio=null"]).audio is None
    assert model_of(tmp_path, "model: {vision: v, audio: features}").audio.is_cached
    assert load(FeaturesSettings, None, ["output=o", "vision=v", "data.manifest=m"]).vision == VisionSpec("v")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.vision.image_size=0", "model.vision.image_size = 0: must be at least 1; leave it out for the enc"),
        ("model.vision.layer=x", "model.vision.layer = 'x': input should be a valid integer"),
        ("model.vision.lyer=1", "unknown key 'model.vision.lyer'; did you mean model.vision.layer?"),
        ("model.vision=''", "model.vision.name = '': must be a hub name or a local folder"),
        ("model.audio.pretrained=true", "'model.audio.name' is missing"),
    ],
)
def test_a_mistake_is_one_line_with_the_whole_key(override, expected):
    with pytest.raises(UserError) as caught:
        load(TrainSettings, None, [*LEAST, "model.vision=v", override])
    assert expected in str(caught.value) and "\n" not in str(caught.value)
