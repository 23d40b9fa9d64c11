"""Settings: what is read, and the one line that each mistake gives."""

import re
from pathlib import Path

import pytest
import yaml

import jobs
from jobs.demo.settings import DemoSettings
from jobs.settings.convert import ExportSettings, ImportSettings
from jobs.settings.corpus import FeaturesSettings, PrepareSettings
from jobs.settings.data import DataSettings
from jobs.settings.evaluate import CaptionSettings, DoctorSettings, EvaluateSettings
from jobs.settings.loading import load, resolved_yaml
from jobs.settings.serve import ServeSettings
from jobs.settings.train import TrainSettings
from pipelines.data.media.frame_sampling import Sampling
from qformer.errors import UserError

CONFIGS = Path(jobs.__file__).parent / "configs"
CLASSES = {
    "prepare": PrepareSettings,
    "train": TrainSettings,
    "features": FeaturesSettings,
    "evaluate": EvaluateSettings,
    "doctor": DoctorSettings,
    "caption": CaptionSettings,
    "import": ImportSettings,
    "export": ExportSettings,
    "serve": ServeSettings,
    "demo": DemoSettings,
}
STAGE1 = CONFIGS / "recipes" / "blip2_stage1.yaml"


def message(model, config=None, *overrides):
    with pytest.raises(UserError) as caught:
        load(model, config, list(overrides))
    return str(caught.value)


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.name)
def test_every_config_in_the_repository_loads_by_the_command_in_its_first_line(path):
    line = path.read_text().splitlines()[0]
    job = re.search(r"# (?:qformer|`make) (\w+)", line)[1]
    files = [CONFIGS / name for name in re.findall(r"--config jobs/configs/(\S+)", line)] or [path]
    assert files[-1] == path
    load(CLASSES[job], files)


def written(folder, *contents):
    files = [folder / f"{index}.yaml" for index in range(len(contents))]
    for file, content in zip(files, contents, strict=True):
        file.write_text(content)
    return files


def test_later_files_are_merged_over_earlier_ones(tmp_path):
    files = written(
        tmp_path,
        # what the second file does not name stays, also inside a mapping that it names
        "optim: {learning_rate: 1, warmup_steps: 7, betas: [0.5, 0.6]}\nmodel: {lora: {rank: 2, alpha: 3}, prompt: a}",
        # a list is replaced as a whole, null and a number too
        "optim: {learning_rate: 2, betas: [0.1, 0.2]}\nmodel: {lora: null, prompt: b}\nvalidation: {every: 3}",
        # a mapping over null is itself; nothing is as good as no file
        "model: {lora: {rank: 5}}\nvalidation:",
        "",
    )
    loaded = load(TrainSettings, [STAGE1, *files], ["steps=9"])
    optim, model = loaded.optim, loaded.model
    assert (optim.learning_rate, optim.warmup_steps, optim.betas, optim.weight_decay) == (2, 7, (0.1, 0.2), 0.05)
    assert (model.lora.rank, model.lora.alpha, model.prompt, model.vision.layer) == (5, 32.0, "b", -2)
    assert loaded.validation is None and loaded.steps == 9
    assert load(TrainSettings, [STAGE1, *reversed(files)]).model.prompt == "a"
    assert load(TrainSettings, [STAGE1]) == load(TrainSettings, STAGE1)


@pytest.mark.parametrize(
    ("contents", "place", "problem"),
    [
        # the file that holds the value, also where a later one touches its neighbour
        (("stpes: 6", "steps: 5"), "0.yaml", "unknown key 'stpes'; did you mean steps?"),
        (("steps: 5", "stpes: 6"), "1.yaml", "unknown key 'stpes'"),
        (("optim: {warmup_steps: -1}", "optim: {learning_rate: 1}"), "0.yaml", "optim.warmup_steps = -1"),
        # the last of two that name it
        (("steps: 0", "steps: -1"), "1.yaml", "steps = -1"),
        (("model: {vision: {layer: x}}", "model:\n  vision: {layer: y}"), "1.yaml", "model.vision.layer = 'y'"),
        # something else in place of a mapping, and in a list
        (("optim: {warmup_steps: 1}", "optim: 3"), "1.yaml", "optim = 3"),
        (("data: {manifest: [{path: a}, {path: 3}]}", "data: {split: x}"), "0.yaml", "data.manifest.list"),
        # two values that go together only in their own file: told of the file that came last
        (
            ("model: {qformer: {num_heads: 12}}", "model: {qformer: {hidden_size: 100}}"),
            "1.yaml",
            "num_heads=12 does not",
        ),
    ],
)
def test_a_mistake_in_one_of_several_files_names_it(tmp_path, contents, place, problem):
    text = message(TrainSettings, [STAGE1, *written(tmp_path, *contents)])
    assert all(line.startswith(f"{tmp_path / place}: ") for line in text.splitlines())
    assert problem in text


def test_what_is_missing_in_several_files_is_asked_of_the_first_that_has_its_place(tmp_path):
    files = written(tmp_path, "output: o\nmodel: {vision: x}\ndata: {split: a}\nsteps: 1", "stage: 1\nbatch_size: 3")
    assert message(TrainSettings, files) == (
        f"{files[0]}: 'data.manifest' is missing; write `manifest: …` in {files[0]} or add --set data.manifest=VALUE"
    )
    assert message(TrainSettings, files, "data.manifest=m", "batch_size=x").startswith("--set batch_size=x: ")
    files = written(tmp_path, "stage: 1\nmodel: {vision: x}\ndata: {manifest: a}\nsteps: 1", "batch_size: 3")
    assert message(TrainSettings, files).startswith(f"{files[0]}: 'output' is missing; write `output: …` in {files[0]}")
    assert "1.yaml is not valid YAML" in message(TrainSettings, written(tmp_path, "steps: 1", "steps: [1"))


def test_overrides_win_over_the_file_and_later_over_earlier():
    loaded = load(TrainSettings, STAGE1, ["steps=5", "steps=7", "optim.learning_rate=2e-3", "model.vision=a=b"])
    assert (loaded.steps, loaded.optim.learning_rate, loaded.model.vision.name) == (7, 2e-3, "a=b")
    assert loaded.optim.warmup_steps == 2000  # a sibling of an overridden key keeps the file's value


def test_lists_are_addressed_by_position():
    loaded = load(PrepareSettings, None, ["output=o", "sources.0.path=a", "sources.1.path=b", "sources.0.split=x"])
    assert [(source.path, source.split) for source in loaded.sources] == [("a", "x"), ("b", "train")]
    assert "no position" in message(PrepareSettings, None, "output=o", "sources=[]", "sources.3.path=a")


def test_resolved_yaml_is_read_back_the_same(tmp_path):
    loaded = load(TrainSettings, STAGE1, ["model.prompt='a photo: ü'"])
    (tmp_path / "again.yaml").write_text(resolved_yaml(loaded), encoding="utf-8")
    assert load(TrainSettings, tmp_path / "again.yaml") == loaded
    assert yaml.safe_load(resolved_yaml(loaded))["optim"]["clip_norm"] == 1.0  # a default, filled in


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        # misspelt beside its siblings
        (
            "optim.lerning_rate=1",
            "--set optim.lerning_rate=1: unknown key 'optim.lerning_rate'; did you mean optim.learning_rate?",
        ),
        # the right name in the wrong place
        ("learning_rate=1", "did you mean optim.learning_rate?"),
        ("model.batch_size=1", "did you mean batch_size?"),
        # like nothing there is: the valid keys of that place
        ("ray.zzz=1", "valid keys under ray: address, num_cpus"),
        # wrong type, out of range, not one of the choices
        ("steps=abc", "--set steps=abc: steps = 'abc': input should be a valid integer"),
        ("steps=0", "steps = 0: input should be greater than 0"),
        ("precision=fp8", "precision = 'fp8': input should be 'fp32', 'bf16' or 'fp16'"),
        ("output=", "output = null: input should be a valid string"),
        # no assignment
        ("steps", "--set steps: write --set key=value"),
        ("=3", "write --set key=value"),
        ("model..vision=x", "write --set key=value"),
        ("output=[", "not valid YAML"),
        ("steps.more=1", "the key before 'more' has the value 250000, which is no mapping"),
    ],
)
def test_mistakes_in_overrides(override, expected):
    text = message(TrainSettings, STAGE1, override)
    assert expected in text
    assert "\n" not in text


CAPTION = ("checkpoint=c", "media=[a.jpg]")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("generation.num_beam=3", "unknown key 'generation.num_beam'; did you mean generation.num_beams?"),
        ("max_new_tokens=3", "unknown key 'max_new_tokens'; did you mean generation.max_new_tokens?"),
        ("generation.num_beams=many", "generation.num_beams = 'many': input should be a valid integer"),
        ("generation.max_new_tokens=0", "max_new_tokens=0 and num_beams=1 must be at least 1; raise them"),
        ("generation={num_beams: 3, top_p: 0.9}", "top_p=0.9 samples, num_beams=3 searches; set one of them"),
        ("generation.temperature=0.5", "temperature=0.5 changes sampling alone; set top_p too"),
        ("generation.length_penalty=2", "length_penalty=2.0 ranks beams; set num_beams above 1 too"),
    ],
)
def test_mistakes_in_generation_settings(override, expected):
    text = message(CaptionSettings, None, *CAPTION, override)
    assert expected in text and "\n" not in text


@pytest.mark.parametrize(
    "key",
    ["hidden_size", "num_layers", "num_heads", "intermediate_size", "num_queries", "cross_attention_frequency",
     "embed_dim", "max_positions"],
)  # fmt: skip
def test_sizes_of_the_bridge_are_positive(key):
    text = message(TrainSettings, STAGE1, f"model.qformer.{key}=0")
    assert text.endswith(f"model.qformer.{key} = 0: must be at least 1")


def test_sizes_of_the_bridge_go_together():
    assert "num_heads=7 does not divide hidden_size=768" in message(TrainSettings, STAGE1, "model.qformer.num_heads=7")
    assert "model.qformer.dropout = 1" in message(TrainSettings, STAGE1, "model.qformer.dropout=1")


def test_nested_settings_of_the_library_are_read_and_written(tmp_path):
    loaded = load(CaptionSettings, None, [*CAPTION, "generation.top_p=0.9", "generation.seed=3"])
    assert (loaded.generation.top_p, loaded.generation.seed, loaded.generation.max_new_tokens) == (0.9, 3, 32)
    (tmp_path / "again.yaml").write_text(resolved_yaml(loaded))
    assert load(CaptionSettings, tmp_path / "again.yaml") == loaded
    lora = load(TrainSettings, STAGE1, ["model.lora.rank=4", "model.lora.targets=[q_proj]"]).model.lora
    assert (lora.rank, lora.targets) == (4, ("q_proj",))
    assert "rank >= 1" in message(TrainSettings, STAGE1, "model.lora.rank=0")


def test_unknown_key_inside_a_list_of_settings():
    text = message(PrepareSettings, None, "output=o", "sources.0.path=a", "sources.0.medai_root=b")
    assert text.endswith("unknown key 'sources.0.medai_root'; did you mean sources.0.media_root?")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("steps: 5\nstpes: 6\n", "unknown key 'stpes'; did you mean steps?"),
        ("- a\n- b\n", "holds a list"),
        ("steps: [1\n", "is not valid YAML"),
        ("steps: 1\nsteps: 2\n", "the key 'steps' is given twice (line 2, column 1)"),
        ("steps: !!python/object/apply:os.getcwd []\n", "is not valid YAML"),  # builds no objects
        ("\x00", "is not valid YAML"),
    ],
)
def test_mistakes_in_the_file_name_it(tmp_path, content, expected):
    path = tmp_path / "own.yaml"
    path.write_text(content)
    text = message(TrainSettings, path)
    assert expected in text
    assert all(str(path) in line for line in text.splitlines())


def test_missing_keys_one_line_each(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("output: o\nstage: 1\nmodel: {vision: x}\ndata: {}\nsteps: 1\n")
    first, second = message(TrainSettings, path).splitlines()
    assert "'data.manifest' is missing" in first and "--set data.manifest=VALUE" in first
    assert "'batch_size' is missing" in second


def test_a_missing_part_is_asked_for_by_a_key_that_takes_a_value():
    lines = message(TrainSettings, []).splitlines()
    assert any("'model.vision' is missing" in line and "--set model.vision=VALUE" in line for line in lines)
    assert any("'data.manifest' is missing" in line for line in lines)


def test_a_file_that_cannot_be_read(tmp_path):
    assert "nowhere.yaml does not exist" in message(TrainSettings, tmp_path / "nowhere.yaml")
    assert "cannot be read" in message(TrainSettings, tmp_path)
    (tmp_path / "image.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    assert "cannot be read" in message(TrainSettings, tmp_path / "image.jpg")


def test_settings_are_frozen():
    loaded = load(DemoSettings, None)
    with pytest.raises(ValueError, match="frozen"):
        loaded.demo = None


def test_sampling_is_checked_and_reaches_the_data_plane():
    data = DataSettings(manifest="m", sampling={"strategy": "fps", "fps": 2.0})
    assert data.sampling == Sampling(strategy="fps", fps=2.0)
    assert Sampling.from_dict(data.sampling.to_dict()) == data.sampling
    with pytest.raises(ValueError, match="give fps > 0"):
        DataSettings(manifest="m", sampling={"strategy": "fps"})
