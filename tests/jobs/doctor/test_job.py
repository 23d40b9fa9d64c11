"""`qformer doctor` on real small runs: sound ones, one trained on shuffled pairs, and ones with something planted."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from jobs.cli.main import main
from jobs.doctor import job as doctor
from jobs.settings.data import DataSettings
from jobs.settings.evaluate import DoctorSettings
from jobs.settings.model import LossWeightSettings, OptimSettings
from pipelines.data.storage import checkpoint_folders
from qformer.errors import UserError
from tests.jobs.doctor_runs import MODELS, change_weights, finish, settings_of, small_world, train_run

STEPS = {1: 80, 2: 40}
RATES = {"learning_rate": 3e-3, "min_learning_rate": 3e-4, "warmup_steps": 10}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Matrices this small are done before a second thread is awake; on a busy machine it costs twenty times as much."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def world(one_thread, tmp_path_factory):
    """200 pictures to train on, and 96 of colour-shape pairs that those do not show."""
    return small_world(tmp_path_factory.mktemp("world"), num_images=200, num_test_images=96)


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):
    """Of both stages: one on true pairs, one on the same captions dealt to other pictures."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    shuffled = [row["captions"] for row in world.rows]
    random.Random(1).shuffle(shuffled)
    # The matching head needs longer than a test has.
    optim = OptimSettings(**RATES, loss_weights=LossWeightSettings(itm=0.0))
    for stage, steps in STEPS.items():
        for name, captions in (("true", None), ("shuffled", shuffled)):
            output = folder / f"{name}{stage}"
            changes = {"stage": stage, "steps": steps, "checkpoint_every": steps // 2, "log_every": 4, "optim": optim}
            found[name, stage] = train_run(world, settings_of(world, output, **changes), captions)
    return found


@pytest.fixture(scope="module")
def frozen_run(world, runs, tmp_path_factory):
    """A few steps of a stage 2 that trains the projection alone."""
    output, init_from = tmp_path_factory.mktemp("frozen") / "run", str(runs["true", 1])
    settings = settings_of(world, output, stage=2, steps=4, checkpoint_every=2, init_from=init_from)
    model = settings.model.model_copy(update={"freeze_qformer": True})
    return train_run(world, settings.model_copy(update={"model": model}))


def looked(run, rows=96, **changes):
    """Findings by topic, exit code, and what doctor.json holds."""
    code = doctor.main(DoctorSettings(run=str(run), rows=rows, use_gpu=False, **changes))
    values = json.loads((Path(changes.get("output") or run) / "doctor.json").read_text())
    return {finding["topic"]: finding for finding in values["findings"]}, code, values


def copied(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "run"))


def newest(run):
    return Path(checkpoint_folders.newest_checkpoint(str(run)))


@pytest.mark.parametrize("stage", [1, 2])
def test_a_run_on_true_pairs_is_fine(runs, stage):
    found, code, values = looked(runs["true", stage])
    measure = found["image use"]["figures"]["measures"]["itc" if stage == 1 else "lm"]
    print(f"stage {stage}: {found['image use']['text']}")
    assert (code, values["status"]) in [(0, "ok"), (0, "warning")]
    assert found["image use"]["status"] == "ok" and "the model uses the images" in found["image use"]["text"]
    assert measure["share"] > 0.75 and measure["z"] > 5
    topics = ("collapse of queries", "dead queries", "trainables", "frozen tensors", "frozen vision", "checkpoints")
    assert {topic: found[topic]["status"] for topic in topics} == dict.fromkeys(topics, "ok")
    assert not [topic for topic, finding in found.items() if finding["status"] in ("problem", "unknown")]
    if stage == 2:
        assert found["frozen language"]["status"] == "ok"


@pytest.mark.parametrize("stage", [1, 2])
def test_a_run_on_shuffled_pairs_does_not_use_its_images(runs, stage):
    found, code, _ = looked(runs["shuffled", stage])
    print(f"stage {stage}: {found['image use']['text']}")
    assert code == 1
    assert found["image use"]["status"] == "problem"
    assert "does not use the images" in found["image use"]["text"] and found["image use"]["advice"]
    measure = found["image use"]["figures"]["measures"]["itc" if stage == 1 else "lm"]
    assert measure["z"] < 3 and 0.3 < measure["share"] < 0.65


@pytest.mark.parametrize("stage", [1, 2])
def test_planted_collapsed_queries(runs, stage, tmp_path):
    run = copied(runs["true", stage], tmp_path)

    def collapse(weights):
        weights["qformer.query_tokens"] = weights["qformer.query_tokens"][:, :1].repeat(1, 4, 1)

    change_weights(newest(run), collapse)
    found, code, _ = looked(run, rows=32)
    assert code == 1 and found["collapse of queries"]["status"] == "problem"
    assert found["collapse of queries"]["figures"]["cosine"] == pytest.approx(1.0, abs=1e-4)


def test_planted_dead_queries(runs, tmp_path):
    """Soft prompts that say the same of every image."""
    run = copied(runs["true", 2], tmp_path)

    def cut_off(weights):
        for name, tensor in weights.items():
            if "cross_attention" in name and name.endswith(("value.weight", "key.weight")):
                weights[name] = torch.zeros_like(tensor)

    change_weights(newest(run), cut_off)
    found, code, _ = looked(run, rows=32)
    assert code == 1 and found["dead queries"]["status"] == "problem"
    assert found["dead queries"]["figures"]["dead"] == [0, 1, 2, 3]
    assert found["image use"]["status"] == "problem"


def test_a_frozen_q_former_stayed(frozen_run):
    found, _, _ = looked(frozen_run, rows=32)
    assert found["frozen tensors"]["status"] == found["frozen qformer"]["status"] == "ok"
    assert "init_from" in found["frozen tensors"]["text"]
    assert found["trainables"]["figures"]["parts"] == {"language_projection": 2}


@pytest.mark.parametrize("name", ["vision_norm.weight", "qformer.layers.0.query_ffn.up.weight"])
def test_planted_frozen_tensor_that_moved(frozen_run, name, tmp_path):
    run = copied(frozen_run, tmp_path)
    change_weights(newest(run), lambda weights: weights[name].view(-1)[:1].add_(1e-3))
    found, code, _ = looked(run, rows=32)
    assert code == 1 and found["frozen tensors"]["status"] == "problem"
    moved = found["frozen tensors"]["figures"]["moved"]
    assert moved == {place: [name] for place in ("step-00000002", "init_from (step-00000080)")}
    assert (
        f"frozen layers moved, up to step-00000004, since init_from (step-00000080): {name}"
        in (found["frozen tensors"]["text"])
    )
    assert found["frozen qformer"]["status"] == ("problem" if name.startswith("qformer.") else "ok")


@pytest.mark.parametrize("kind", ["vision", "language"])
def test_planted_backbone_that_moved(runs, kind, tmp_path):
    run = copied(runs["true", 2], tmp_path)
    folder = shutil.copytree(MODELS / kind, tmp_path / kind)
    weights = load_file(folder / "model.safetensors")
    weights[sorted(weights)[0]].view(-1)[:1].add_(1e-3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    file = newest(run) / "bridge.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), kind: {"name": str(folder)}}))
    finish(newest(run))
    found, code, _ = looked(run, rows=32)
    other = {"vision": "language", "language": "vision"}[kind]
    assert code == 1 and found[f"frozen {kind}"]["status"] == "problem" and found[f"frozen {other}"]["status"] == "ok"
    assert f"the frozen {kind} model has moved" in found[f"frozen {kind}"]["text"]


def test_backbones_of_a_bf16_run_are_compared_in_bf16(world, tmp_path):
    settings = settings_of(world, tmp_path / "run", stage=2, steps=2, checkpoint_every=1, precision="bf16")
    found, _, _ = looked(train_run(world, settings), rows=32)
    assert found["frozen language"]["status"] == found["frozen vision"]["status"] == "ok"


@pytest.mark.parametrize(("share", "status", "code"), [(0.05, "ok", 0), (0.2, "warning", 0), (0.6, "problem", 1)])
def test_planted_data_bound_run(runs, share, status, code, tmp_path):
    """Waiting at the start alone does not count."""
    run = copied(runs["true", 2], tmp_path)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    half = len(records) // 2
    for place, record in enumerate(records):
        record |= {"data_wait_share": 0.9 if place < half else share, "data/decode_s": 5.0, "data/fetch_s": 1.0}
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    found, found_code, _ = looked(run, rows=32)
    assert (found["data-bound share"]["status"], found_code) == (status, code)
    assert found["data-bound share"]["figures"]["share"] == pytest.approx(share)
    if status != "ok":
        assert "data-bound" in found["data-bound share"]["text"] and "decode" in found["data-bound share"]["text"]
        assert "decode_workers (1 now)" in found["data-bound share"]["advice"]


def test_an_old_run_says_what_it_did_not_record(runs, tmp_path):
    run = copied(runs["true", 2], tmp_path)
    for name in ("metrics.jsonl", "starts.jsonl", "events.jsonl"):
        (run / name).unlink()
    found, code, values = looked(run, rows=32)
    assert code == 0 and values["status"] == "unknown"
    missing = ("losses", "data-bound share", "trainables", "frozen tensors", "frozen models", "starts", "alarms")
    assert all(found[topic]["text"].startswith("not recorded: ") for topic in missing)
    assert found["image use"]["status"] == "ok"


def test_a_damaged_checkpoint_is_stepped_over_and_told(runs, tmp_path):
    run = copied(runs["true", 2], tmp_path)
    (newest(run) / "training.pt").write_bytes(b"cut off")
    found, code, _ = looked(run, rows=32)
    assert code == 1 and found["checkpoints"]["status"] == "problem"
    assert "step-00000040 is damaged (training.pt has 7 bytes" in found["checkpoints"]["text"]
    assert "step-00000020" in found["weights"]["text"]


def test_a_run_without_checkpoints_or_settings_still_gets_a_report(runs, tmp_path):
    run = copied(runs["true", 1], tmp_path)
    shutil.rmtree(run / "checkpoints")
    found, code, _ = looked(run)
    assert code == 1 and "no finished checkpoint" in found["checkpoints"]["text"] and "losses" in found
    other = copied(runs["true", 2], tmp_path / "other")
    (other / "settings.yaml").write_text("stage: 9\n")
    found, code, _ = looked(other, rows=32)
    assert code == 0 and "settings.yaml is missing, or of another version" in found["image use"]["text"]


def test_other_rows_may_be_named(runs, world):
    data = DataSettings(manifest=str(world.manifest), split="train")
    found, _, _ = looked(runs["true", 2], rows=32, data=data)
    assert f"split 'train' of {world.manifest}" in found["image use"]["text"]
    with pytest.raises(UserError, match="split 'nowhere'"):
        looked(runs["true", 2], data=data.model_copy(update={"split": "nowhere"}))


def test_the_command(runs, tmp_path, capsys):
    output = tmp_path / "out"
    run = str(runs["shuffled", 2])
    assert main(["doctor", run, "--set", "rows=32", "--set", f"output={output}"]) == 1
    printed = capsys.readouterr().out
    assert "problem  image use" in printed and "-> see whether captions and media belong together" in printed
    assert printed.splitlines()[-1].endswith("1 problem: image use")
    assert json.loads((output / "doctor.json").read_text())["run"] == run
    assert main(["doctor", run, "--show-config"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "error: run=nowhere does not exist; give the folder of a `qformer train` run"),
        ([str(MODELS)], "holds no training run; give the folder that `qformer train` wrote"),
        ([], "error: settings: 'run' is missing"),
        (["nowhere", "--set", "rows=3"], "rows = 3: input should be greater than or equal to 16"),
    ],
)
def test_mistakes_are_one_line(words, message, capsys):
    assert main(["doctor", *words]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and printed.out == ""
