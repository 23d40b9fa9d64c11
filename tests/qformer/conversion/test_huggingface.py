"""Hugging Face folders in and out: bit-equal, refused by name where they do not fit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from qformer.backbones import load_vision
from qformer.config import VisionSpec
from qformer.conversion.bundle import ImportOptions
from qformer.conversion.huggingface import export_huggingface, import_huggingface
from qformer.conversion.layouts import SIDE_FILE
from qformer.errors import UserError
from tests.qformer.folders import FRESH, assert_same_files, copied, eps_effect, imported, write_large_encoder
from tests.tiny_checkpoints import write_stage2
from tests.tiny_huggingface import ARCHITECTURES, write_folder


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_in_and_out_is_bit_equal(folders, name):
    _, stock, _, exported, report, _ = folders[name]
    assert_same_files(stock / "model.safetensors", exported / "model.safetensors")
    assert report.unexpected == [] and report.left_out == []
    # Only stage 1 has what the layout cannot hold: five tensors of the ITG head and the temperature.
    assert len(report.missing) == (6 if name.endswith("Retrieval") else 0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_out_and_in_is_bit_equal_with_the_side_file(folders, name, tmp_path):
    _, _, ours, exported, _, _ = folders[name]
    report = imported(exported, tmp_path / "again", ImportOptions()).report
    assert report.missing == []
    for file in ("bridge.safetensors", "vision/model.safetensors", "language/model.safetensors"):
        if (ours / file).is_file():
            assert_same_files(ours / file, tmp_path / "again" / file)
    assert (ours / "bridge.json").read_text() == (tmp_path / "again" / "bridge.json").read_text()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_half_precision_stays(tmp_path, name, dtype):
    write_folder(tmp_path / "stock", name, dtype)
    imported(tmp_path / "stock", tmp_path / "ours")
    export_huggingface(tmp_path / "ours", tmp_path / "exported")
    assert_same_files(tmp_path / "stock/model.safetensors", tmp_path / "exported/model.safetensors")


def test_missing_tensors_are_refused_unless_asked_for(folders, tmp_path):
    _, stock, _, _, _, _ = folders["Blip2ForImageTextRetrieval"]
    with pytest.raises(UserError, match=r"lacks 6 \(.*temperature.*allow_fresh=true"):
        import_huggingface(stock, tmp_path / "ours", ImportOptions())


def test_an_unexpected_tensor_is_refused_unless_asked_for(folders, tmp_path):
    _, _, _, exported, _, _ = folders["Blip2ForConditionalGeneration"]
    changed = copied(exported, tmp_path / "changed")
    (changed / "model.safetensors").unlink()
    save_file({**load_file(exported / "model.safetensors"), "foo.bar": torch.ones(1)}, changed / "model.safetensors")
    with pytest.raises(UserError, match=r"foo\.bar.*allow_unexpected=true"):
        import_huggingface(changed, tmp_path / "first", ImportOptions())
    bundle = import_huggingface(changed, tmp_path / "second", ImportOptions(allow_unexpected=True))
    assert bundle.report.unexpected == ["foo.bar"] and "unexpected 1 tensors (foo)" in str(bundle.report)


def refused(folder, tmp_path):
    with pytest.raises(UserError) as caught:
        import_huggingface(folder, tmp_path / "ours", FRESH)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("damage", ["foreign", "other metadata", "cut", "broken info", "other stage"])
def test_a_side_file_that_is_not_ours_is_refused(folders, tmp_path, damage):
    _, _, _, exported, _, _ = folders["Blip2ForConditionalGeneration"]
    folder = copied(exported, tmp_path / "changed")
    file = folder / SIDE_FILE
    content = file.read_bytes()
    file.unlink()
    match damage:
        case "foreign":
            save_file({"weight": torch.ones(2)}, file)
        case "other metadata":
            save_file({"weight": torch.ones(2)}, file, metadata={"format": "pt"})
        case "cut":
            file.write_bytes(content[:50])
        case "broken info":
            save_file({}, file, metadata={"bridge.json": '{"format_version"'})
        case "other stage":
            file.symlink_to(folders["Blip2ForImageTextRetrieval"][3] / SIDE_FILE)
    message = refused(folder, tmp_path)
    expected = {
        "cut": "missing or damaged",
        "broken info": "is damaged",
        "other stage": "of stage 1, not of a Blip2For",
    }
    assert str(SIDE_FILE) in message and expected.get(damage, "move it out of the folder") in message


def test_damaged_weights_and_sizes_are_refused(folders, tmp_path):
    _, stock, _, _, _, _ = folders["Blip2ForConditionalGeneration"]
    cut = copied(stock, tmp_path / "cut")
    (cut / "model.safetensors").unlink()
    (cut / "model.safetensors").write_bytes((stock / "model.safetensors").read_bytes()[:999])
    assert "model.safetensors' is missing or damaged" in refused(cut, tmp_path)
    wrong = copied(stock, tmp_path / "wrong")
    config = json.loads((stock / "config.json").read_text())
    config["qformer_config"]["num_attention_heads"] = 5
    (wrong / "config.json").unlink()
    (wrong / "config.json").write_text(json.dumps(config))
    assert "qformer_config of its config.json is no Q-Former's (num_heads=5 does" in refused(wrong, tmp_path)


def test_export_without_its_language_model_is_one_line(tmp_path):
    folder = write_stage2(tmp_path / "ours")
    (tmp_path / "ours-language").rename(tmp_path / "elsewhere")
    info = json.loads((folder / "bridge.json").read_text())
    write_large_encoder(load_vision(VisionSpec(**info["vision"])), tmp_path / "vision")
    info["vision"] = {"name": str(tmp_path / "vision")}
    (folder / "bridge.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match="no tokenizer of its language model '.*ours-language'") as caught:
        export_huggingface(folder, tmp_path / "exported")
    assert "\n" not in str(caught.value)


def test_the_eps_of_a_folder_of_ours_comes_back_and_its_effect_is_told(folders, tmp_path):
    """LAVIS' 1e-5 has no place beside the tower's 1e-6: it travels in the side file, with the effect measured."""
    _, _, ours, _, _, _ = folders["Blip2ForConditionalGeneration"]
    folder = copied(ours, tmp_path / "lavis-eps")
    (folder / "bridge.json").unlink()
    info = json.loads((ours / "bridge.json").read_text())
    assert info["qformer"]["vision_norm_eps"] == 1e-6
    info["qformer"]["vision_norm_eps"] = 1e-5
    (folder / "bridge.json").write_text(json.dumps(info))
    notes = export_huggingface(folder, tmp_path / "exported").notes
    assert 0 < eps_effect(notes) < 1e-4
    assert imported(tmp_path / "exported", tmp_path / "again").info.qformer.vision_norm_eps == 1e-5


def test_a_folder_of_another_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "opt", "architectures": ["OPTForCausalLM"]}))
    with pytest.raises(UserError, match="holds OPTForCausalLM; we import Blip2ForImageTextRetrieval"):
        import_huggingface(tmp_path, tmp_path / "ours", ImportOptions())


def test_the_side_file_is_not_read_by_stock(folders):
    _, _, _, exported, _, _ = folders["Blip2ForImageTextRetrieval"]
    assert set(load_file(exported / SIDE_FILE)) == {
        "temperature", "qformer.lm_bias", "qformer.lm_dense.weight", "qformer.lm_dense.bias",
        "qformer.lm_norm.weight", "qformer.lm_norm.bias",
    }  # fmt: skip
