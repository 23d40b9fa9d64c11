"""The loop, checkpoints and accounting in one process, with the demo's real frozen models."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from jobs.settings.model import ModelSettings
from jobs.train.inputs import model_choice
from pipelines.data.batches.batch import SampleBatch
from pipelines.data.failures import Failure
from pipelines.data.features.shard_encoder import EncoderChoice
from pipelines.data.storage import checkpoint_folders
from pipelines.data.storage.local_copies import local_folder
from pipelines.inference.models import load_captioner, load_retriever
from pipelines.training.records.accounting import Accounting
from pipelines.training.run.checkpoint import write_checkpoint
from pipelines.training.run.model import TrainingRun
from pipelines.training.run.model_choice import ModelChoice
from pipelines.training.run.vocabulary import learn_text_tokenizer
from pipelines.training.step.ema import Ema
from pipelines.training.step.guard import DivergedError, StepGuard
from pipelines.training.step.loop import LoopSettings
from qformer.config import GenerationSettings, LanguageSpec, QFormerSizes, VisionSpec
from qformer.conversion.checkpoint import read_info
from qformer.errors import UserError
from tests.pipelines.training.loops import make_loop, make_training

MODELS = Path(__file__).parents[4] / "jobs" / "demo" / "models"
CAPTIONS = ["a small red circle", "a large blue square", "a small green star", "a large yellow cross"]
QFORMER = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "intermediate_size": 48,
    "num_queries": 4,
    "embed_dim": 16,
}
NUM_STEPS = 8


def choice(stage, tokenizer):
    return ModelChoice(
        stage=stage,
        vision=VisionSpec(str(MODELS / "vision")),
        language=LanguageSpec(str(MODELS / "language")),
        tokenizer=str(tokenizer),
        max_text_tokens=16,
        prompt="",
        num_frames=2,
        qformer=QFormerSizes(**{**QFORMER, "dropout": 0.1}),
    )


def make_run(stage, tokenizer, init_from=None):
    return TrainingRun(choice(stage, tokenizer), torch.device("cpu"), precision="fp32", seed=5, init_from=init_from)


def batches(start=0, failed=(), size=4):
    """The same pictures at the same step, whatever step one starts from."""
    for step in range(start, NUM_STEPS):
        pixels = np.random.default_rng(step).integers(0, 255, (size, 1, 3, 64, 64), dtype=np.uint8)
        is_valid = np.array([index not in failed for index in range(size)])
        failures = [Failure(f"s{index}", "x.jpg", "decode", "corrupt", "broken") for index in failed]
        names = [f"s{index}" for index in range(size)]
        frame_valid = np.ones(pixels.shape[:2], dtype=np.bool_)
        yield SampleBatch(step, 0, names, CAPTIONS[:size], np.arange(size), is_valid, pixels, failures, frame_valid)


def encoded(run, plain):
    """What a feature cache in fp16 would hand over in place of pixels."""
    tokens = run.frozen["vision"](torch.from_numpy(plain.images)).half().numpy()
    return dataclasses.replace(plain, images=tokens)


def settings(**changes):
    values = {
        "steps": NUM_STEPS,
        "steps_per_epoch": 1,
        "rows_per_epoch": 4,
        "learning_rate": 1e-3,
        "min_learning_rate": 1e-4,
        "warmup_steps": 2,
        "clip_norm": 1.0,
        "checkpoint_every": 4,
        "log_every": 2,
        "seed": 5,
        "max_quarantine_share": 0.3,
    }
    return LoopSettings(**{**values, **changes})


def train(run, output, start_step=0, accounting=None, training=None, stop_at=None, given=None, bad=None, **changes):
    training, accounting, logged = training or make_training(run), accounting or Accounting(), []

    def save(done):
        write_checkpoint(str(output), run.checkpoint(done, training, accounting, settings="stage: 1\n"))
        if done == stop_at:
            raise InterruptedError

    guard = StepGuard(2, [].append if bad is None else bad.append, print)
    options = {"training": training, "accounting": accounting, "guard": guard}
    loop = make_loop(run, settings(**changes), **options, log=logged.append, save=save)
    loop.run(given or batches(start_step), start_step)
    return logged


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    learn_text_tokenizer(lambda: CAPTIONS, folder)
    return folder


@pytest.mark.parametrize("stage", [1, 2])
def test_a_resumed_run_ends_with_the_same_bytes(stage, tokenizer, tmp_path):
    whole = make_run(stage, tokenizer)
    train(whole, tmp_path / "whole")
    with pytest.raises(InterruptedError):
        train(make_run(stage, tokenizer), tmp_path / "cut", stop_at=4)
    resumed = make_run(stage, tokenizer)
    training = make_training(resumed)
    newest = checkpoint_folders.newest_checkpoint(str(tmp_path / "cut"))
    state = resumed.restore(Path(newest), training)
    assert state.step == 4
    train(resumed, tmp_path / "cut", 4, Accounting.from_state(state.accounting), training)
    expected = whole.stage.trainables.state_dict()
    for name, tensor in resumed.stage.trainables.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_dropout_and_negatives_of_a_step_are_drawn_from_streams_of_their_own(tokenizer, tmp_path):
    run, seeds = make_run(1, tokenizer), []

    def call(inputs, noise_key):
        seeds.append((torch.initial_seed(), noise_key))
        return run.stage.trainables(inputs, noise_key=noise_key)

    make_loop(run, settings(steps=3), call=call).run(batches(), 0)
    assert len({seed for pair in seeds for seed in pair}) == 6


def test_the_lavis_reduction_is_a_setting_of_stage_1(tokenizer):
    model = ModelSettings(
        vision=str(MODELS / "vision"), language=str(MODELS / "language"), lavis_reduction=True, qformer=QFORMER
    )
    chosen = model_choice(model, stage=1, num_frames=2, tokenizer=str(tokenizer))
    run = TrainingRun(chosen, torch.device("cpu"), precision="fp32", seed=5, init_from=None)
    assert run.stage.trainables.lavis_reduction and not make_run(1, tokenizer).stage.trainables.lavis_reduction
    with pytest.raises(UserError, match=r"model\.lavis_reduction belongs to stage 1"):
        TrainingRun(dataclasses.replace(chosen, stage=2), torch.device("cpu"), precision="fp32", seed=5, init_from=None)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_compiled_layers_train_to_the_same_weights(stage, tokenizer, tmp_path):
    """With the real compiler; dropout off, whose draws differ. The checkpoint keeps its names."""
    torch._dynamo.reset()
    chosen = dataclasses.replace(choice(stage, tokenizer), qformer=QFormerSizes(**{**QFORMER, "dropout": 0.0}))
    runs = []
    for is_compiled in (False, True):
        run = TrainingRun(
            chosen, torch.device("cpu"), precision="fp32", seed=5, init_from=None, is_compiled=is_compiled
        )
        # Two steps: later ones tell how rounding grows, not whether the compiler is right.
        train(run, tmp_path / str(is_compiled), given=batches(), steps=2)
        runs.append(run)
    plain, compiled = (run.stage.trainables.state_dict() for run in runs)
    assert plain.keys() == compiled.keys()
    for name, tensor in compiled.items():
        torch.testing.assert_close(tensor, plain[name], atol=1e-4, rtol=1e-3, msg=name)


def test_loss_falls_and_backbones_do_not_move(tokenizer, tmp_path):
    run = make_run(2, tokenizer)
    fingerprints = dict(run.fingerprints)
    logged = train(run, tmp_path / "run", learning_rate=3e-3)
    assert logged[-1]["loss/total"] < logged[0]["loss/total"]
    run.assert_frozen()
    assert run.fingerprints == fingerprints
    with torch.no_grad():
        next(run.frozen["vision"].parameters()).add_(1e-3)
    with pytest.raises(RuntimeError, match="frozen vision model changed"):
        run.assert_frozen()


@pytest.mark.parametrize("stage", [1, 2])
def test_training_on_cached_features_equals_training_on_pixels(stage, tokenizer, tmp_path):
    """Within the rounding of fp16: every logged loss within 1e-3, and the same encoder is written down."""
    chosen = dataclasses.replace(choice(stage, tokenizer), qformer=QFormerSizes(**{**QFORMER, "dropout": 0.0}))
    spec = EncoderChoice(vision=chosen.vision, precision="fp32", num_frames=2, dtype="fp16").load()[1]
    runs = {
        name: TrainingRun(chosen, torch.device("cpu"), precision="fp32", seed=5, init_from=None, features=features)
        for name, features in (("pixels", None), ("cache", spec))
    }
    logged = {"pixels": train(runs["pixels"], tmp_path / "pixels")}
    cached = [encoded(runs["pixels"], batch) for batch in batches()]
    logged["cache"] = train(runs["cache"], tmp_path / "cache", given=iter(cached))
    for one, other in zip(logged["pixels"], logged["cache"], strict=True):
        assert one["loss/total"] == pytest.approx(other["loss/total"], abs=1e-3)
    assert logged["pixels"] != logged["cache"]
    assert runs["cache"].fingerprints == runs["pixels"].fingerprints
    assert "vision" not in runs["cache"].frozen
    assert runs["cache"].info(8) == runs["pixels"].info(8)


def test_a_cache_of_another_encoder_is_refused(tokenizer):
    chosen = choice(1, tokenizer)
    other = EncoderChoice(
        vision=dataclasses.replace(chosen.vision, layer=-1), precision="fp32", num_frames=2, dtype="fp16"
    ).load()[1]
    with pytest.raises(UserError, match="layer: -1 in the cache, -2 here"):
        TrainingRun(chosen, torch.device("cpu"), precision="fp32", seed=5, init_from=None, features=other)


@pytest.mark.parametrize("stage", [1, 2])
def test_bf16_trains_fp32_weights_to_nearly_the_same_losses(stage, tokenizer, tmp_path):
    chosen = dataclasses.replace(choice(stage, tokenizer), qformer=QFormerSizes(**{**QFORMER, "dropout": 0.0}))
    logged = {}
    for precision in ("fp32", "bf16"):
        run = TrainingRun(chosen, torch.device("cpu"), precision=precision, seed=5, init_from=None)
        logged[precision] = train(run, tmp_path / precision, training=make_training(run, precision=precision))
        assert all(p.dtype == torch.float32 for p in run.stage.trainables.parameters())
        frozen_dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        assert next(run.frozen["vision"].parameters()).dtype == frozen_dtype
    # bf16 keeps three digits; hard negatives are drawn from similarities that differ by as much.
    assert logged["bf16"][0]["loss/total"] == pytest.approx(logged["fp32"][0]["loss/total"], rel=0.05)


def test_the_trainable_names_are_the_bridge_alone(tokenizer):
    names = make_run(1, tokenizer).trainable_names
    assert {name.split(".")[0] for name in names} == {
        "qformer",
        "vision_norm",
        "vision_projection",
        "text_projection",
        "itm_head",
        "temperature",
    }
    names = make_run(2, tokenizer).trainable_names
    assert {name.split(".")[0] for name in names} == {"qformer", "vision_norm", "language_projection"}
    assert not any("text" in name or "embeddings" in name for name in names)


def test_stage_2_starts_from_stage_1(tokenizer, tmp_path):
    first = make_run(1, tokenizer)
    train(first, tmp_path / "one")
    second = make_run(2, tokenizer, init_from=str(tmp_path / "one"))
    own, theirs = second.stage.trainables.state_dict(), first.stage.trainables.state_dict()
    shared = own.keys() & theirs.keys()
    assert "qformer.query_tokens" in shared and "qformer.layers.0.query_ffn.up.weight" in shared
    assert all(torch.equal(own[name], theirs[name]) for name in shared)
    assert own.keys() - shared == {"language_projection.weight", "language_projection.bias"}


def test_checkpoints_become_models_with_the_same_preprocessing(tokenizer, tmp_path):
    first, second = make_run(1, tokenizer), make_run(2, tokenizer)
    train(first, tmp_path / "one")
    train(second, tmp_path / "two")
    retriever = load_retriever(Path(checkpoint_folders.newest_checkpoint(str(tmp_path / "one"))))
    captioner = load_captioner(Path(checkpoint_folders.newest_checkpoint(str(tmp_path / "two"))))
    assert retriever.preprocessing == captioner.preprocessing == first.preprocessing
    pixels = torch.zeros(2, 1, 3, 64, 64, dtype=torch.uint8)
    embeds, tokens = retriever.embed_image(pixels)
    assert embeds.shape == (2, 4, 16) and retriever.match(tokens, CAPTIONS[:2]).shape == (2,)
    assert len(captioner.answer(pixels, settings=GenerationSettings(max_new_tokens=3))) == 2
    with pytest.raises(UserError, match="stage-1"):
        load_captioner(Path(checkpoint_folders.newest_checkpoint(str(tmp_path / "one"))))


def test_failed_rows_are_counted_once_an_epoch_and_too_many_stop_the_run(tokenizer, tmp_path):
    run = make_run(1, tokenizer)

    def loop(failed, share):
        accounting = Accounting()
        make_loop(run, settings(max_quarantine_share=share), accounting=accounting).run(batches(failed=failed), 0)
        return accounting

    accounting = loop((1,), 0.3)
    assert (accounting.rows_in, accounting.rows_used, len(accounting.quarantined)) == (32, 24, 8)
    assert accounting.line == "rows in 32 = rows used 24 + rows quarantined 8"
    with pytest.raises(UserError, match=r"2 of 4 rows of epoch 1 .*corrupt.*max_quarantine_share=0.3"):
        loop((1, 2), 0.3)


def test_steps_that_are_not_finite_change_nothing_and_too_many_end_the_run(tokenizer, tmp_path, capsys):
    run, bad = make_run(1, tokenizer), []
    with torch.no_grad():
        run.stage.trainables.temperature.fill_(float("nan"))
    before = {name: tensor.clone() for name, tensor in run.stage.trainables.state_dict().items()}
    with pytest.raises(ValueError, match=r"at step 1, the 2\. bad step in a row; samples \['s0'"):
        train(run, tmp_path / "run", bad=bad)
    after = run.stage.trainables.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items() if name != "temperature")
    assert [one["step"] for one in bad] == [0, 1] and bad[0]["sample_ids"] == ["s0", "s1", "s2", "s3"]
    assert "ALARM step 0 is left out" in capsys.readouterr().out


def test_one_bad_step_is_as_if_it_had_not_been(tokenizer, tmp_path):
    """A loss that overflows once: the weights are those of a run whose optimizer left the step out."""
    runs, spoilt = [make_run(2, tokenizer), make_run(2, tokenizer)], 3
    backward = runs[0].stage.backward

    def overflowing(call, batch, noise_key, objective, precision):
        objective.scale *= float("inf") if batch.step == spoilt else 1.0
        return backward(call, batch, noise_key, objective, precision)

    runs[0].stage.backward = overflowing
    logged = train(runs[0], tmp_path / "bad")
    assert [record["bad_steps"] for record in logged] == [0, 1, 1, 1]
    training = make_training(runs[1])
    update, calls = training.optimizer.step, []

    def all_but_one():
        calls.append(None)
        if len(calls) - 1 != spoilt:
            update()

    training.optimizer.step = all_but_one
    train(runs[1], tmp_path / "plain", training=training)
    one, other = (run.stage.trainables.state_dict() for run in runs)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_features_that_are_not_finite_leave_their_step_out(tokenizer, tmp_path, capsys):
    """As one bad gradient does; too many in a row end the run."""
    run, bad = make_run(1, tokenizer), []
    encode, spoilt = run.stage.encode, {3}

    def spoiling(batch):
        tokens = encode(batch).clone()
        if batch.step in spoilt:
            tokens[1] = float("nan")
        return tokens

    run.stage.encode = spoiling
    logged = train(run, tmp_path / "one", bad=bad)
    assert [one["step"] for one in bad] == [3] and "features of 1 of 4 samples: s1" in bad[0]["reason"]
    assert logged[-1]["bad_steps"] == 1 and len(logged) == NUM_STEPS // 2
    spoilt.update(range(NUM_STEPS))
    with pytest.raises(DivergedError, match=r"the 2\. bad step in a row"):
        train(run, tmp_path / "all")


def test_spikes_are_told_with_their_samples_and_do_not_become_usual():
    told = []
    guard = StepGuard(3, print, told.append)
    for step in range(60):
        assert guard.admits(step, 1.0 + step % 3, {}, ["a"])
    assert guard.num_spikes == 0 and told == []
    assert guard.admits(60, 100.0, {}, ["b", ""]) and guard.admits(61, 100.0, {}, ["c"]) and guard.num_spikes == 2
    assert told[0] == "gradient norm 100 at step 60, more than 10 times the usual 1.82; it is clipped; samples ['b']"


def test_a_norm_that_rises_for_good_is_told_a_few_times():
    told = []
    guard = StepGuard(3, print, told.append)
    for step in range(200):
        guard.admits(step, 1.0 if step < 60 else 30.0, {}, [])
    assert guard.num_spikes == len(told) == 10
    guard.admits(200, 1000.0, {}, [])
    assert guard.num_spikes == 11


def test_the_average_is_saved_and_a_resumed_run_goes_on_with_both(tokenizer, tmp_path):
    def prepared():
        run = make_run(1, tokenizer)
        return run, make_training(run, ema=Ema(run.stage.trainables, 0.9))

    whole, training = prepared()
    train(whole, tmp_path / "whole", training=training)
    cut, training = prepared()
    with pytest.raises(InterruptedError):
        train(cut, tmp_path / "cut", training=training, stop_at=4)
    resumed, training = prepared()
    newest = Path(checkpoint_folders.newest_checkpoint(str(tmp_path / "cut")))
    state = resumed.restore(newest, training)
    train(resumed, tmp_path / "cut", 4, Accounting.from_state(state.accounting), training)
    files = [tmp_path / name / "checkpoints" / "step-00000008" / "bridge.safetensors" for name in ("whole", "cut")]
    averages = [load_file(file) for file in files]
    raw = whole.stage.trainables.state_dict()
    assert all(torch.equal(tensor, averages[1][name]) for name, tensor in averages[0].items())
    assert all(torch.equal(tensor, raw[name]) for name, tensor in resumed.stage.trainables.state_dict().items())
    assert any(not torch.equal(tensor, raw[name]) for name, tensor in averages[0].items())


def test_the_average_is_what_its_formula_says():
    layer = torch.nn.Linear(1, 1, bias=False)
    ema, expected = Ema(layer, 0.5), layer.weight.detach().clone()
    for step, value in enumerate((1.0, 2.0, 3.0, 4.0)):
        with torch.no_grad():
            layer.weight.fill_(value)
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    torch.testing.assert_close(ema.over(layer.state_dict())["weight"], expected)


def test_an_unfinished_checkpoint_does_not_count(tokenizer, tmp_path):
    run = make_run(1, tokenizer)
    train(run, tmp_path / "run")
    newest = Path(checkpoint_folders.newest_checkpoint(str(tmp_path / "run")))
    assert newest.name == "step-00000008" and read_info(newest).step == 8
    (newest / "complete.json").unlink()
    assert Path(checkpoint_folders.newest_checkpoint(str(tmp_path / "run"))).name == "step-00000004"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("order", "position in the data is lost"),
        ("width", "model settings differ"),
        ("version", "format_version"),
        ("prompt", "prompt is '' in .* and 'a' in the settings"),
        ("num_frames", "num_frames is 2 in .* and 3 in the settings"),
        ("vision", "the vision model has other weights"),
    ],
)
def test_what_does_not_fit_is_refused_on_resume(change, message, tokenizer, tmp_path):
    train(make_run(1, tokenizer), tmp_path / "run")
    newest = checkpoint_folders.newest_checkpoint(str(tmp_path / "run"))
    chosen, order = choice(1, tokenizer), "order"
    if change == "order":
        order = "other"
    elif change in ("prompt", "num_frames"):
        chosen = dataclasses.replace(chosen, **{change: {"prompt": "a", "num_frames": 3}[change]})
    elif change == "vision":
        run = make_run(1, tokenizer)
        run.fingerprints["vision"] = "of other weights"
        with pytest.raises(UserError, match=message):
            run.restore(Path(newest), make_training(run))
        return
    elif change == "width":
        chosen = ModelChoice(
            **{
                **{f: getattr(chosen, f) for f in ModelChoice.__dataclass_fields__},
                "qformer": QFormerSizes(**{**QFORMER, "hidden_size": 64}),
            }
        )
    else:
        file = Path(newest) / "bridge.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "format_version": 99}))
    run = TrainingRun(chosen, torch.device("cpu"), precision="fp32", seed=5, init_from=None)
    training = dataclasses.replace(make_training(run), order=order)
    with pytest.raises(UserError, match=message):
        run.restore(Path(newest), training)


def test_checkpoints_lie_on_any_filesystem(tokenizer):
    output = "memory://runs/one"
    run = make_run(1, tokenizer)
    train(run, output)
    newest = checkpoint_folders.newest_checkpoint(output)
    assert newest.endswith("step-00000008")
    assert read_info(local_folder(newest)).step == 8
