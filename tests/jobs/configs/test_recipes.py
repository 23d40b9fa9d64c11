"""Every recipe of jobs/configs: what it resolves to, and a run at toy size through `train.main`.

Ray Train runs its function in this process (its local mode), which saves the start of a worker group for each recipe;
rows, decoding, checkpoints and summary go the whole way. The first recipe of each corpus, and the one that the toy file
names, get their rows from actors, the others from this process.
"""

import contextlib
import math
from pathlib import Path

import pytest
import yaml

from jobs.cli import main as cli
from jobs.demo.toy import RECIPES, write_toy
from jobs.settings.loading import load
from jobs.settings.train import TrainSettings
from jobs.train import job as train
from pipelines.data.storage import checkpoint_folders
from pipelines.inference.models import load_captioner, load_retriever
from pipelines.training.records.metrics_log import read_metrics
from qformer.bridges.concatenate import ConcatenateConfig
from qformer.conversion.checkpoint import read_weights
from qformer.errors import UserError
from tests.local_data import local_data, local_training

FILES = {
    "blip2_stage1": ["blip2_stage1"],
    "blip2_stage2_opt": ["blip2_stage2_opt"],
    "blip2_stage2_flant5": ["blip2_stage2_flant5"],
    "retrieval_finetune": ["retrieval_finetune"],
    "caption_finetune": ["caption_finetune"],
    "vqa_finetune": ["vqa_finetune"],
    "instructblip": ["instructblip"],
    "minigpt4": ["minigpt4"],
    "minigpt4_second": ["minigpt4", "minigpt4_second"],
    "video_llama_vision": ["video_llama_vision"],
    "video_llama_vision_instruct": ["video_llama_vision", "video_llama_vision_instruct"],
    "video_llama_audio": ["video_llama_vision", "video_llama_audio"],
    "video_llama_audio_finetune": ["video_llama_vision", "video_llama_audio", "video_llama_audio_finetune"],
    "video_qformer_stage1": ["video_qformer_stage1"],
    "video_qformer_stage1_second": ["video_qformer_stage1", "video_qformer_stage1_second"],
    "video_qformer_stage2": ["video_qformer_stage2"],
}
BEFORE = {
    "blip2_stage2_opt": "blip2_stage1",
    "blip2_stage2_flant5": "blip2_stage1",
    "retrieval_finetune": "blip2_stage1",
    "caption_finetune": "blip2_stage2_opt",
    "vqa_finetune": "blip2_stage2_opt",
    "instructblip": "blip2_stage2_flant5",
    "minigpt4": "blip2_stage2_flant5",
    "minigpt4_second": "minigpt4",
    "video_llama_vision": "blip2_stage2_flant5",
    "video_llama_vision_instruct": "video_llama_vision",
    "video_llama_audio": "video_llama_vision_instruct",
    "video_llama_audio_finetune": "video_llama_audio",
    "video_qformer_stage1": "blip2_stage1",
    "video_qformer_stage1_second": "video_qformer_stage1",
    "video_qformer_stage2": "video_qformer_stage1_second",
}
"""The recipe whose run each starts from."""
AUDIO = ("video_llama_audio", "video_llama_audio_finetune")
ROWS_BY_ACTORS = ("blip2_stage1", "video_llama_audio")
"""The first of pictures and mute clips, and the first of clips with their sound."""
FROZEN = ("minigpt4", "video_llama")
"""Beginnings of those that keep a Q-Former as it was."""
T5_RECIPES = ("blip2_stage2_flant5", "instructblip")

VICUNA = "lmsys/vicuna-7b-v1.3"

# learning rate, its end, warm-up, second beta; steps, batch, precision; pixels (None: 224), language model, prompt
PUBLISHED = {
    "blip2_stage1": (1e-4, 1e-5, 2000, 0.98, 250_000, 1680, "fp16", None, None, ""),
    "blip2_stage2_opt": (1e-4, 5e-5, 2000, 0.98, 80_000, 1920, "fp16", None, "facebook/opt-2.7b", ""),
    "blip2_stage2_flant5": (1e-4, 5e-5, 2000, 0.98, 80_000, 1520, "bf16", None, "google/flan-t5-xl", ""),
    "retrieval_finetune": (1e-5, 0.0, 1000, 0.999, 5 * 566_747 // 224, 224, "fp16", 364, None, ""),
    "caption_finetune": (1e-5, 0, 1000, 0.999, 5 * 566_747 // 256, 256, "fp16", 364, "facebook/opt-2.7b", "a photo of"),
    "vqa_finetune": (1e-5, 0.0, 1000, 0.999, 5 * 658_111 // 128, 128, "fp16", 490, "facebook/opt-2.7b", ""),
    "instructblip": (1e-5, 0.0, 1000, 0.999, 60_000, 192, "bf16", None, "google/flan-t5-xl", ""),
    "minigpt4": (1e-4, 8e-5, 5000, 0.999, 4 * 5000, 4 * 64, "fp16", None, "lmsys/vicuna-7b-v1.3", ""),
    "minigpt4_second": (
        *(3e-5, 1e-5, 200, 0.999, 5 * 200, 12, "fp16", None, "lmsys/vicuna-7b-v1.3"),
        "###Human: Describe this image in detail. ###Assistant:",
    ),
    "video_llama_vision": (1e-4, 8e-5, 2500, 0.999, 5 * 2500, 32, "fp16", None, VICUNA, ""),
    "video_llama_vision_instruct": (3e-5, 1e-5, 1000, 0.999, 3 * 1000, 4, "fp16", None, VICUNA, ""),
    "video_llama_audio": (1e-4, 8e-5, 5000, 0.999, 5 * 5000, 32, "fp16", None, VICUNA, ""),
    "video_llama_audio_finetune": (3e-5, 1e-5, 400, 0.999, 3 * 1000, 4, "fp16", None, VICUNA, ""),
    "video_qformer_stage1": (1e-4, 1e-5, 2000, 0.98, 58_000, 256, "fp16", None, None, ""),
    "video_qformer_stage1_second": (1e-4, 1e-5, 2000, 0.98, 220_000, 256, "fp16", None, None, ""),
    "video_qformer_stage2": (1e-4, 8e-5, 2000, 0.999, 3 * 100_000 // 64, 64, "fp16", None, VICUNA, ""),
}
# how frames are joined, how many there are, and what is frozen of that
VIDEO = {
    "video_llama_vision": ("cascaded", 8, "head_tail", {"freeze_frames"}),
    "video_llama_vision_instruct": ("cascaded", 8, "head_tail", {"freeze_frames"}),
    "video_llama_audio": ("cascaded", 8, "head_tail", {"freeze_frames"}),
    "video_llama_audio_finetune": ("cascaded", 8, "head_tail", {"freeze_frames"}),
    "video_qformer_stage1": ("spatio_temporal", 16, "random_segment", {"freeze_attention"}),
    "video_qformer_stage1_second": ("spatio_temporal", 16, "random_segment", set()),
    "video_qformer_stage2": ("spatio_temporal", 16, "random_segment", set()),
}
# of `model`, where they differ from False
FLAGS = {
    "vqa_finetune": {"qformer_reads_prompt"},
    "instructblip": {"qformer_reads_prompt"},
    "minigpt4": {"freeze_qformer"},
    "minigpt4_second": {"freeze_qformer"},
}


def paths(name):
    return [RECIPES / f"{file}.yaml" for file in FILES[name]]


@pytest.mark.parametrize("name", FILES)
def test_a_recipe_resolves_to_what_was_published(name):
    chosen = load(TrainSettings, paths(name))
    model, optim = chosen.model, chosen.optim
    assert PUBLISHED[name] == (
        *(optim.learning_rate, optim.min_learning_rate, optim.warmup_steps, optim.betas[1]),
        *(chosen.steps, chosen.batch_size, chosen.precision),
        *(model.vision.image_size, model.language and model.language.name, model.prompt),
    )
    assert (optim.weight_decay, optim.betas[0]) == (0.05, 0.9)
    bridge = model.qformer
    assert (bridge.num_queries, bridge.hidden_size, bridge.num_layers, bridge.num_heads) == (32, 768, 12, 12)
    assert (bridge.intermediate_size, bridge.cross_attention_frequency, bridge.embed_dim) == (3072, 2, 256)
    assert (model.vision.name, model.vision.layer) == ("eva_giant_patch14_clip_224.laion400m", -2)
    assert {flag for flag in ("qformer_reads_prompt", "freeze_qformer") if getattr(model, flag)} == FLAGS.get(
        name, set()
    )
    before = load(TrainSettings, paths(BEFORE[name])).output if name in BEFORE else None
    assert chosen.init_from == before and chosen.stage == (1 if model.language is None else 2)


@pytest.mark.parametrize("name", FILES)
def test_a_recipe_joins_frames_as_was_published(name):
    chosen = load(TrainSettings, paths(name))
    model, bridge = chosen.model, chosen.model.bridge
    if name not in VIDEO:
        assert bridge == ConcatenateConfig()
        return
    frozen = set() if bridge.keeps_loaded is None else {bridge.keeps_loaded}
    assert VIDEO[name] == (bridge.kind, chosen.data.num_frames, chosen.data.sampling.strategy, frozen)
    sizes = {
        "cascaded": {"max_frames": 32, "num_queries": 32, "num_layers": 2},
        "spatio_temporal": {
            "max_frames": 32,
            "num_spatial_queries": 32,
            "num_temporal_queries": 32,
            "num_summary_queries": 1,
        },
    }[bridge.kind]
    assert {size: getattr(bridge, size) for size in sizes} == sizes
    branch = model.audio_branch
    assert (model.audio is not None, branch.trains_alone) == (name in AUDIO, name in AUDIO)
    assert (branch.num_queries, branch.num_layers, branch.max_segments, branch.is_joint) == (8, 2, 8, False)
    assert (chosen.data.audio.num_segments, chosen.data.audio.segment_s) == (8, 2.0)


def test_every_recipe_writes_a_folder_of_its_own():
    outputs = [load(TrainSettings, paths(name)).output for name in FILES]
    assert len(set(outputs)) == len(FILES)


@pytest.mark.parametrize("name", FILES)
def test_the_toy_file_leaves_what_a_recipe_is_about(name):
    plain, toy = load(TrainSettings, paths(name)), load(TrainSettings, [*paths(name), RECIPES / "toy.yaml"])
    kept = {"learning_rate", "min_learning_rate", "weight_decay", "betas", "loss_weights"}
    assert plain.optim.model_dump(include=kept) == toy.optim.model_dump(include=kept)
    kept = {"prompt", "qformer_reads_prompt", "freeze_qformer", "max_text_tokens", "lora", "bridge"}
    assert plain.model.vision.layer == toy.model.vision.layer
    assert plain.model.model_dump(include=kept) == toy.model.model_dump(include=kept)
    assert (plain.stage, plain.data.augmentation) == (toy.stage, toy.data.augmentation)


def test_the_first_line_of_the_toy_file_is_a_command(capsys):
    words = (RECIPES / "toy.yaml").read_text().splitlines()[0].removeprefix("# qformer ").split()
    words = [str(RECIPES.parents[2] / word) if word.endswith(".yaml") else word for word in words]
    assert cli.main([*words, "--show-config"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["steps"], shown["optim"]["weight_decay"]) == (4, 0.05)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    write_toy(folder)
    return folder


@pytest.fixture(scope="module")
def run(ray_local, toy):
    """Train a recipe once, after those that it starts from; returns its settings and summary."""
    done = {}

    def trained(name):
        if name not in done:
            before = trained(BEFORE[name])[0].output if name in BEFORE else "null"
            overrides = [f"output={toy / name}", f"data.manifest={toy}/corpus/manifest.jsonl", f"init_from={before}"]
            if name in T5_RECIPES:
                overrides.append(f"model.language={toy / 't5'}")
            if name in AUDIO:
                overrides += [f"model.audio={toy / 'ast'}", f"data.manifest={toy}/clips/manifest.jsonl"]
            rows_come = contextlib.nullcontext() if name in ROWS_BY_ACTORS else local_data()
            with rows_come:
                done[name] = train_here([*paths(name), RECIPES / "toy.yaml"], overrides)
        return done[name]

    return trained


def train_here(files, overrides=()):
    chosen = load(TrainSettings, files, overrides)
    with local_training():
        return chosen, train.main(chosen)


def trained_names(name):
    """Exactly what the recipe's authors train, of the toy's two layers, but never the encoder."""
    projection = linear("language_projection")
    if name.startswith("minigpt4"):
        return projection
    if name in AUDIO:  # a Q-Former like the cascade's second, with positions of its own
        branch = (names_of_video(name) | projection | {"positions.table_MD"}) - {"frames.positions.table_MD"}
        return {f"audio.{own}" for own in branch}
    if name in VIDEO:
        return names_of_video(name) | (heads() if "stage1" in name else projection)
    names = {"qformer.query_tokens", *norm("vision_norm"), *norm("qformer.embedding_norm")}
    for layer in ("qformer.layers.0", "qformer.layers.1"):
        attentions = ["attention", "cross_attention"] if layer.endswith("0") else ["attention"]  # in every second layer
        for attention in attentions:
            names |= norm(f"{layer}.{attention}.norm")
            names |= linear(*(f"{layer}.{attention}.{part}" for part in ("query", "key", "value", "output")))
        names |= feed_forward(f"{layer}.query_ffn")
    if name in ("blip2_stage1", "retrieval_finetune"):
        return names | heads()
    words = {"qformer.word_embeddings.weight", "qformer.position_embeddings.weight"}
    if name in ("vqa_finetune", "instructblip"):
        names |= words | feed_forward("qformer.layers.0.text_ffn")  # nothing reads the last layer's text
    return names | projection


def names_of_video(name):
    """Of a cascade the second Q-Former alone, which cross-attends in each layer; never its frames'."""
    is_cascade = VIDEO[name][0] == "cascaded"
    names = {"qformer.query_tokens", "frames.positions.table_MD", *norm("qformer.embedding_norm")}
    if not is_cascade:
        names |= {"frames.over_frames.query_HV", "frames.over_space.query_HV", *norm("vision_norm")}
    for layer in ("qformer.layers.0", "qformer.layers.1"):
        attentions = ["attention", "cross_attention"] if is_cascade or layer.endswith("0") else ["attention"]
        for attention in attentions if "freeze_attention" not in VIDEO[name][3] else []:
            names |= norm(f"{layer}.{attention}.norm")
            names |= linear(*(f"{layer}.{attention}.{part}" for part in ("query", "key", "value", "output")))
        for ffn in ["query_ffn"] if is_cascade else [f"query_ffn.experts.{kind}" for kind in range(3)]:
            names |= feed_forward(f"{layer}.{ffn}")
    return names


def heads():
    """Of stage 1, with the text branch."""
    names = {"qformer.word_embeddings.weight", "qformer.position_embeddings.weight", "qformer.lm_bias", "temperature"}
    names |= feed_forward("qformer.layers.0.text_ffn") | feed_forward("qformer.layers.1.text_ffn")
    names |= linear("qformer.lm_dense") | norm("qformer.lm_norm")
    return names | linear("vision_projection", "text_projection", "itm_head")


def linear(*modules):
    return {f"{module}.{part}" for module in modules for part in ("weight", "bias")}


norm = linear  # a layer norm's are called the same


def feed_forward(module):
    return linear(f"{module}.up", f"{module}.down") | norm(f"{module}.norm")


@pytest.mark.parametrize("name", FILES)
def test_a_recipe_runs_at_toy_size(run, name):
    chosen, summary = run(name)
    assert summary["trainable_names"] == sorted(trained_names(name))
    frozen = {"vision"} | ({"language"} if chosen.stage == 2 else set()) | ({"audio"} if name in AUDIO else set())
    assert summary["frozen_sha256"].keys() == frozen | ({"qformer"} if name.startswith(FROZEN) else set())
    records = read_metrics(chosen.output)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    terms = {"itc", "itm", "itg"} if chosen.stage == 1 else {"lm"}
    assert all(
        record[f"loss/{term}"] > 0 and math.isfinite(record[f"loss/{term}"]) for record in records for term in terms
    )
    assert all(math.isfinite(value) for record in records for value in record.values())
    assert summary["rows_used"] == 32 and not summary["texts_truncated"]
    if name in BEFORE:
        assert str(run(BEFORE[name])[0].output) in summary["load_report"]

    loaded = (load_retriever if chosen.stage == 1 else load_captioner)(newest(chosen))
    assert loaded.info.step == 4 and loaded.info.prompt == chosen.model.prompt
    if chosen.stage == 2:
        assert loaded.language.is_encoder_decoder == (name in T5_RECIPES)
        assert (loaded.tokenizer is not None) == chosen.model.qformer_reads_prompt


def newest(chosen):
    return Path(checkpoint_folders.newest_checkpoint(chosen.output))


def test_minigpt4_leaves_the_q_former_as_blip2_made_it(run):
    before, after = (read_weights(newest(run(name)[0])) for name in ("blip2_stage2_flant5", "minigpt4_second"))
    changed = {
        name for name in after if not name.startswith("language_projection") and not after[name].equal(before[name])
    }
    assert before.keys() == after.keys() and not changed
    assert not after["language_projection.weight"].equal(
        read_weights(newest(run("minigpt4")[0]))["language_projection.weight"]
    )


def test_the_toy_file_alone_suffices(ray_local, toy, tmp_path, monkeypatch):
    """Where runs/toy is, the command needs no override but that file's: retrieval goes on from the toy's bridge."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "toy").symlink_to(toy)
    (tmp_path / "jobs").symlink_to(RECIPES.parents[1])
    monkeypatch.chdir(tmp_path)
    chosen, summary = train_here([*paths("retrieval_finetune"), RECIPES / "toy.yaml"])
    assert "re-initialised 0 tensors; missing 0 tensors" in summary["load_report"]
    start, end = read_weights(toy / "bridge"), read_weights(newest(chosen))
    assert start.keys() == end.keys()
    # Four steps at 1e-5 move no number further than that.
    assert 0 < max((start[name] - end[name]).abs().max().item() for name in start) < 1e-4


def test_stage_1_starts_from_no_stage_2(run, toy, tmp_path):
    before, output = run("caption_finetune")[0].output, tmp_path / "run"
    overrides = [f"output={output}", f"data.manifest={toy}/corpus/manifest.jsonl", f"init_from={before}"]
    with pytest.raises(UserError, match=r"is a stage-2 checkpoint.*give stage 1 a stage-1 run"):
        train_here([*paths("retrieval_finetune"), RECIPES / "toy.yaml"], overrides)
    assert list(output.iterdir()) == []
