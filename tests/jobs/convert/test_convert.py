"""`qformer import` and `qformer export`, as a person runs them."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from jobs.cli import main as cli
from tests.qformer.conversion.test_vision import write_timm_folder
from tests.qformer.lavis import facts
from tests.tiny_checkpoints import write_stage1, write_stage2
from tests.tiny_huggingface import write_folder

DEMO_VISION = str(Path(cli.__file__).parents[1] / "demo/models/vision")


def run(*words):
    return cli.main([words[0], *(w for pair in words[1:] for w in ("--set", pair))])


def test_a_folder_is_imported_captions_and_is_exported(tmp_path, capsys):
    """Import, caption a file, export: what comes out is what came in."""
    write_folder(tmp_path / "stock", "Blip2ForConditionalGeneration")
    assert run("import", f"source={tmp_path}/stock", f"output={tmp_path}/ours", "prompt=a small") == 0
    printed = capsys.readouterr().out
    assert "stage 2\nloaded " in printed and "missing 0 tensors\nleft out 0 tensors\nunexpected 0 tensors" in printed
    Image.new("RGB", (80, 60), "red").save(tmp_path / "red.png")
    assert cli.main(["caption", "--set", f"checkpoint={tmp_path}/ours", str(tmp_path / "red.png")]) == 0
    path, caption = capsys.readouterr().out.strip().split("\t")
    assert path.endswith("red.png") and caption
    assert run("export", f"checkpoint={tmp_path}/ours", f"output={tmp_path}/exported") == 0
    assert "into the side file" in capsys.readouterr().out
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("stock", "exported"))
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_a_moved_checkpoint_still_finds_its_models(tmp_path, capsys):
    write_folder(tmp_path / "stock", "Blip2ForConditionalGeneration")
    assert run("import", f"source={tmp_path}/stock", f"output={tmp_path}/ours") == 0
    (tmp_path / "ours").rename(tmp_path / "moved")
    Image.new("RGB", (80, 60), "red").save(tmp_path / "red.png")
    assert cli.main(["caption", "--set", f"checkpoint={tmp_path}/moved", str(tmp_path / "red.png")]) == 0


def test_a_lavis_file_is_imported(goldens_dir, tmp_path, capsys):
    config = facts(goldens_dir, "stage2_opt_weights")
    vision = write_timm_folder(
        tmp_path / "timm", "eva_giant_patch14_224", embed_dim=config["encoder_width"], num_heads=1
    )
    weights = load_file(goldens_dir / "stage2_opt_weights.safetensors")
    trainables = {k: v for k, v in weights.items() if not k.startswith("opt_model.")}
    torch.save({"model": trainables, "epoch": 9}, tmp_path / "checkpoint_9.pth")
    words = [f"source={tmp_path}/checkpoint_9.pth", f"output={tmp_path}/ours", f"vision={vision}"]
    words.append(f"num_heads={config['bert']['num_attention_heads']}")
    assert run("import", *words) == 2
    assert "add --set language=" in capsys.readouterr().err
    assert run("import", *words, "language=some-model") == 0
    printed = capsys.readouterr().out
    assert f"loaded {len(trainables) - 1} tensors (" in printed and "left out 1 tensors (Qformer.bert" in printed
    assert "\nlanguage model unchecked: no config of 'some-model'" in printed


@pytest.mark.parametrize("write", [write_stage1, write_stage2])
def test_an_encoder_without_a_place_is_one_clear_line(tmp_path, capsys, write):
    """The demo's XCiT attends over channels."""
    info_file = write(tmp_path / "ours") / "bridge.json"
    info_file.write_text(json.dumps({**json.loads(info_file.read_text()), "vision": {"name": DEMO_VISION}}))
    capsys.readouterr()
    assert run("export", f"checkpoint={tmp_path}/ours", f"output={tmp_path}/exported") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: checkpoint: its encoder {DEMO_VISION!r} does not fit") and error.count("\n") == 1
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["import", "source=nowhere", "output={tmp}/new"], "source=nowhere does not exist"),
        (["import", "source=nowhere", "output={tmp}"], "is already used"),
        (["import", "source={tmp}", "output={tmp}/new"], "is no Hugging Face folder"),
        (["export", "checkpoint=nowhere", "output={tmp}/new"], "nowhere does not exist"),
        (["export", "checkpoint=nowhere", "output=s3://bucket/new"], "is not local"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(tmp_path, capsys, words, message):
    (tmp_path / "used").write_text("")
    assert run(*(word.format(tmp=tmp_path) for word in words)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()
