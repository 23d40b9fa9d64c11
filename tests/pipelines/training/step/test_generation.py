"""Stage 2's kinds of training: T5, instruction tuning, MiniGPT-4's recipe, LoRA, a start from BERT."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.settings.model import ModelSettings
from jobs.train.inputs import model_choice
from pipelines.data.storage import checkpoint_folders
from pipelines.inference.models import load_captioner
from pipelines.training.records.accounting import Accounting
from pipelines.training.run.checkpoint import write_checkpoint
from pipelines.training.run.model import TrainingRun
from pipelines.training.run.vocabulary import learn_text_tokenizer
from qformer.config import GenerationSettings, LanguageSpec, LoraConfig, QFormerSizes, VisionSpec
from qformer.errors import UserError
from qformer.text import load_text_tokenizer
from tests.pipelines.training.loops import backward, make_training
from tests.pipelines.training.step.test_loop import CAPTIONS, MODELS, QFORMER, batches, choice, encoded, train
from tests.qformer.test_language import tiny_language


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    learn_text_tokenizer(lambda: [*CAPTIONS, "what is in the picture"], folder)
    return folder


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    language = tiny_language("t5")
    language.model.save_pretrained(folder)
    language.tokenizer.save_pretrained(folder)
    return str(folder)


def make_run(chosen, init_from=None):
    return TrainingRun(chosen, torch.device("cpu"), precision="fp32", seed=5, init_from=init_from)


def newest(folder):
    return Path(checkpoint_folders.newest_checkpoint(str(folder)))


@pytest.fixture(scope="module")
def stage1(tokenizer, tmp_path_factory):
    """A finished run of stage 1."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    train(make_run(choice(1, tokenizer)), folder)
    return str(folder)


@torch.no_grad()
def loss_of(run):
    """Over all the pictures it trains on, without dropout."""
    run.stage.trainables.eval()
    return sum(backward(run.stage, batch)["lm"] for batch in batches())


def kinds(tokenizer, t5):
    """The ways to train stage 2, as settings."""
    plain, t5 = choice(2, tokenizer), LanguageSpec(str(t5))
    return {
        "t5": dataclasses.replace(plain, language=t5),
        "instructed": dataclasses.replace(plain, prompt="what is in the picture", qformer_reads_prompt=True),
        "instructed_t5": dataclasses.replace(plain, language=t5, prompt="small", qformer_reads_prompt=True),
        "frozen": dataclasses.replace(plain, freeze_qformer=True),
        "lora": dataclasses.replace(plain, lora=LoraConfig(rank=2)),
    }


@pytest.mark.parametrize("kind", ["t5", "instructed", "instructed_t5", "frozen", "lora"])
def test_every_kind_learns_leaves_the_backbones_and_comes_back_from_its_checkpoint(
    kind, tokenizer, t5, stage1, tmp_path
):
    run = make_run(kinds(tokenizer, t5)[kind], stage1)
    before = loss_of(run)
    thrice = iter([*batches()] * 3)
    # A random T5 hardly hears its prompt: it takes larger steps to show that the bridge learns.
    rate = 2e-2 if "t5" in kind else 3e-3
    train(run, tmp_path / "two", learning_rate=rate, steps=24, checkpoint_every=24, given=thrice)
    assert loss_of(run) < before - 0.05, (before, loss_of(run))
    run.assert_frozen()
    names = {name.split(".")[0] for name in run.trainable_names}
    expected = {"qformer", "vision_norm", "language_projection"}
    assert names == {"frozen": {"language_projection"}, "lora": {*expected, "lora"}}.get(kind, expected)

    captioner = load_captioner(newest(tmp_path / "two"))
    trained, loaded = run.stage.trainables.state_dict(), captioner.stage2.state_dict()
    assert trained.keys() == loaded.keys() and all(torch.equal(trained[name], loaded[name]) for name in trained)
    assert (captioner.tokenizer is not None) == kind.startswith("instructed")
    pixels = torch.randint(0, 255, (3, 1, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    together = captioner.answer(pixels, settings=GenerationSettings(max_new_tokens=6))
    assert together == [
        captioner.answer(pixels[i : i + 1], settings=GenerationSettings(max_new_tokens=6))[0] for i in range(3)
    ]
    prompts = ["a", "", "a small red"]
    settings = GenerationSettings(max_new_tokens=6, num_beams=2)
    answers = captioner.answer(pixels, prompts, settings)
    assert answers == [captioner.answer(pixels[i : i + 1], prompts[i : i + 1], settings)[0] for i in range(3)]
    with pytest.raises(ValueError, match="2 instructions for 3 images"):
        captioner.answer(pixels, prompts[:2])


@pytest.mark.parametrize("kind", ["instructed", "frozen", "lora"])
def test_a_resumed_run_ends_with_the_same_bytes(kind, tokenizer, t5, stage1, tmp_path):
    chosen = kinds(tokenizer, t5)[kind]
    whole = make_run(chosen, stage1)
    train(whole, tmp_path / "whole")
    with pytest.raises(InterruptedError):
        train(make_run(chosen, stage1), tmp_path / "cut", stop_at=4)
    resumed = make_run(chosen, stage1)
    training = make_training(resumed)
    state = resumed.restore(newest(tmp_path / "cut"), training)
    train(resumed, tmp_path / "cut", state.step, Accounting.from_state(state.accounting), training)
    resumed.assert_frozen()
    expected = whole.stage.trainables.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.stage.trainables.state_dict().items())


def test_the_language_model_behind_lora_keeps_its_bytes(tokenizer, t5, stage1, tmp_path):
    """Loading it anew and attaching the trained updates gives the trained model's losses."""
    run = make_run(kinds(tokenizer, t5)["lora"], stage1)
    train(run, tmp_path / "two", learning_rate=1e-2)
    plain = make_run(choice(2, tokenizer), stage1)
    assert run.fingerprints == plain.fingerprints
    assert all(up.abs().max() > 0 for up in run.stage.trainables.lora.up.values())


def test_the_instruction_is_not_in_the_loss_and_reaches_both_models(tokenizer, t5, stage1):
    run = make_run(kinds(tokenizer, t5)["instructed"], stage1)
    seen = []
    batch = next(batches())

    def call(*inputs, **masks):
        seen.append(inputs)
        return run.stage.trainables(*inputs, **masks)

    backward(run.stage, batch, call=call)
    image, (ids, mask) = seen[0][:2]
    text = load_text_tokenizer(str(tokenizer), 16)
    assert [text.tokenizer.decode(row[1:-1]) for row in ids] == ["what is in the picture"] * 4 and mask.all()
    assert image.shape[:2] == (4, 1)
    labels = run.stage.language.tokenize(["what is in the picture"], ["a small red circle"], max_tokens=16)
    counted = labels.labels_BT[labels.labels_BT != -100][:-1]
    assert run.stage.language.tokenizer.decode(counted) == "a small red circle"


@torch.no_grad()
def test_a_sample_brings_its_own_instruction(tokenizer, t5, stage1):
    """Where it has one; the others take the prompt. Each sample's loss is that of a run with that prompt."""
    chosen = kinds(tokenizer, t5)["instructed"]
    run, batch = make_run(chosen, stage1), next(batches())
    run.stage.trainables.eval()
    instructions = ["what is in the picture", "a small", "", "a large blue"]
    given = dataclasses.replace(batch, instructions=instructions)
    together = backward(run.stage, given)["lm"]
    total, count = 0.0, 0
    for row, instruction in enumerate(instructions):
        alone = make_run(dataclasses.replace(chosen, prompt=instruction or chosen.prompt), stage1)
        alone.stage.trainables.eval()
        is_valid = batch.is_valid & (np.arange(4) == row)
        if not is_valid.any():
            continue
        one = dataclasses.replace(batch, is_valid=is_valid)
        prompts, captions = [instruction or chosen.prompt], [batch.captions[row]]
        tokens = int((alone.stage.language.tokenize(prompts, captions, max_tokens=16).labels_BT != -100).sum())
        total += backward(alone.stage, one)["lm"] * tokens
        count += tokens
    assert together == pytest.approx(total / count, rel=1e-4)
    plain = backward(run.stage, batch)["lm"]
    assert abs(plain - together) > 1e-4


def test_a_long_instruction_is_cut_and_counted_for_each_reader(tokenizer, t5, stage1):
    run, batch = make_run(kinds(tokenizer, t5)["instructed"], stage1), next(batches())
    given = dataclasses.replace(batch, instructions=["a small red circle " * 9, "", "", ""])
    backward(run.stage, given)
    assert run.num_truncated() == 2


def test_a_reading_qformer_keeps_the_words_of_stage_1(tokenizer, t5, stage1, tmp_path):
    """The tokenizer of init_from wins over the settings', whose ids mean other words."""
    learn_text_tokenizer(lambda: ["entirely other words"], tmp_path / "other")
    chosen = dataclasses.replace(kinds(tokenizer, t5)["instructed"], tokenizer=str(tmp_path / "other"))
    run = make_run(chosen, stage1)
    assert run.tokenizer.tokenizer.get_vocab() == load_text_tokenizer(str(tokenizer), 16).tokenizer.get_vocab()
    assert "qformer.word_embeddings" in run.load_report


def test_a_qformer_starts_from_a_bert_by_settings(tokenizer, tmp_path):
    from transformers import BertConfig, BertModel

    vocabulary = load_text_tokenizer(str(tokenizer), 16).vocab_size - 1
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    bert = BertModel(BertConfig(vocab_size=vocabulary, **shape))
    bert.save_pretrained(tmp_path / "bert")
    for stage in (1, 2):
        chosen = dataclasses.replace(choice(stage, tokenizer), qformer_init=str(tmp_path / "bert"))
        run = make_run(chosen)
        own = run.stage.trainables.qformer.layers[1].query_ffn.up.weight
        assert torch.equal(own, bert.encoder.layer[1].intermediate.dense.weight)
        assert f"from BERT '{tmp_path / 'bert'}': loaded" in run.load_report
    wider = dataclasses.replace(chosen, qformer=QFormerSizes(**{**QFORMER, "intermediate_size": 64}))
    with pytest.raises(UserError, match="init_mismatch=reinitialise"):
        make_run(wider)
    assert "missing 6 tensors" in make_run(dataclasses.replace(wider, init_mismatch="reinitialise")).load_report


@pytest.mark.parametrize("stage", [1, 2])
def test_features_that_are_not_finite_are_named_by_sample(stage, tokenizer):
    run = make_run(choice(stage, tokenizer))
    good = encoded(run, next(batches()))
    bad = good.images.astype(np.float32)
    bad[1, 0, 0, 0], bad[2, 0, 3, 1], bad[3] = np.nan, np.inf, np.nan
    run.stage.encode = lambda batch: torch.from_numpy(batch.images).float()
    is_valid = np.array([True, True, True, False])  # a quarantined row's content does not matter
    with pytest.raises(ValueError, match="features of 2 of 4 samples: s1, s2;"):
        batch = dataclasses.replace(good, images=bad, is_valid=is_valid)
        backward(run.stage, batch)


def test_a_quarantined_row_may_hold_nan_without_a_trace_in_the_gradients(tokenizer):
    results = []
    for value in (0.0, np.nan):
        run = make_run(choice(2, tokenizer))
        run.stage.trainables.eval()
        good = encoded(run, next(batches()))
        images = good.images.astype(np.float32)
        images[3] = value
        run.stage.encode = lambda batch: torch.from_numpy(batch.images)
        batch = dataclasses.replace(good, images=images, is_valid=np.array([True, True, True, False]))
        backward(run.stage, batch)
        results.append([p.grad for p in run.stage.trainables.parameters()])
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


@pytest.mark.parametrize("stage", [1, 2])
def test_truncated_texts_are_counted(stage, tokenizer):
    run = make_run(choice(stage, tokenizer))
    batch = next(batches())
    long = dataclasses.replace(batch, captions=["a small red circle " * 9, "a", "a small blue square " * 9, "a"])
    for given in (batch, long, long):
        backward(run.stage, given)
    assert run.num_truncated() == 4


def test_what_cannot_be_trained_is_refused(tokenizer):
    plain = choice(2, tokenizer)
    with pytest.raises(UserError, match="freeze_qformer=true needs .*init_from"):
        make_run(dataclasses.replace(plain, freeze_qformer=True))
    with pytest.raises(ValueError, match="longer than max_text_tokens=16"):
        make_run(dataclasses.replace(plain, prompt="a small red circle " * 9))
    with pytest.raises(UserError, match=r"targets=\['nothing'\] name no layer"):
        make_run(dataclasses.replace(plain, lora=LoraConfig(targets=("nothing",))))


def test_settings_become_a_choice():
    given = ModelSettings(
        vision={"name": "v", "image_size": 384}, lora={"rank": 4, "targets": ["q"]}, freeze_qformer=True,
        qformer_reads_prompt=True, qformer_init="b", init_mismatch="reinitialise",
    )  # fmt: skip
    chosen = model_choice(given, stage=2, num_frames=4, tokenizer="t")
    assert chosen.lora == LoraConfig(rank=4, targets=("q",))
    assert (chosen.freeze_qformer, chosen.qformer_reads_prompt, chosen.qformer_init) == (True, True, "b")
    assert (chosen.vision, chosen.init_mismatch) == (VisionSpec("v", image_size=384), "reinitialise")


def test_another_resolution_is_saved_with_the_bridge(tokenizer, tmp_path):
    chosen = choice(2, tokenizer)
    run = make_run(dataclasses.replace(chosen, vision=dataclasses.replace(chosen.vision, image_size=96)))
    assert run.preprocessing.height == 96
    checkpoint = run.checkpoint(1, make_training(run), Accounting(), settings="stage: 2\n")
    write_checkpoint(str(tmp_path / "two"), checkpoint)
    captioner = load_captioner(newest(tmp_path / "two"))
    assert captioner.preprocessing == run.preprocessing
    assert (
        len(
            captioner.answer(
                torch.zeros(1, 1, 3, 96, 96, dtype=torch.uint8), settings=GenerationSettings(max_new_tokens=2)
            )
        )
        == 1
    )
    assert str(MODELS) in captioner.info.vision.name
