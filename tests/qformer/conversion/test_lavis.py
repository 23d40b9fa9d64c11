"""LAVIS files into checkpoints of ours: the goldens' weights, as LAVIS saves them and as safetensors."""

import dataclasses
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.inference.models import load_retriever
from qformer.backbones import VisionEncoder, load_vision
from qformer.config import VisionSpec
from qformer.conversion.checkpoint import load_weights, read_info, read_weights
from qformer.conversion.lavis import MEAN, STD, import_lavis
from qformer.errors import UserError
from qformer.objectives.stage1 import Stage1
from qformer.objectives.stage2 import Stage2
from tests.qformer.lavis import facts, our_weights, write_encoder

FILES = ["stage1_weights", "stage2_opt_weights", "stage2_t5_weights"]
TIED = "Qformer.cls.predictions.decoder.bias"
LEFT_OUT = {"stage1_weights": 3, "stage2_opt_weights": 1, "stage2_t5_weights": 1}


def as_lavis_saves(weights, file):
    """The runner's file: state dict, optimizer, settings and counters in one pickle."""
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    config = {"run": {"max_epoch": 10, "lr_sched": "linear_warmup_cosine_lr"}}
    torch.save({"model": weights, "optimizer": optimizer.state_dict(), "config": config, "epoch": 9}, file)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_every_tensor_arrives_bit_equal(goldens_dir, tmp_path, options, name, suffix):
    """Against the map that the golden tests use, whose losses and gradients are LAVIS' own."""
    file = goldens_dir / f"{name}.safetensors"
    source = file
    if suffix == ".pth":
        source = tmp_path / "checkpoint_best.pth"
        as_lavis_saves(load_file(file), source)
    bundle = import_lavis(source, tmp_path / "ours", options(name))
    bundle.save(tmp_path / "ours")
    expected, written = our_weights(file), read_weights(tmp_path / "ours")
    assert written.keys() == expected.keys() and written
    for key, tensor in expected.items():
        assert torch.equal(written[key], tensor), key
    report = bundle.report
    frozen = [k for k in report.left_out if k.startswith(("opt_model.", "t5_model."))]
    assert len(report.left_out) - len(frozen) == LEFT_OUT[name] and bool(frozen) == name.startswith("stage2")
    assert report.missing == [] and report.unexpected == [] and len(report.loaded) == len(expected)
    info = read_info(tmp_path / "ours")
    width = 1 if info.stage == 1 else written["language_projection.weight"].shape[0]
    model = Stage1(info.qformer) if info.stage == 1 else Stage2(info.qformer, language_width=width)
    load_weights(model, tmp_path / "ours")
    assert info.answer_end_id == (50118 if name == "stage2_opt_weights" else None)
    config, shape = facts(goldens_dir, name), info.qformer
    crossing = [i for i in range(shape.num_layers) if shape.has_cross_attention(i)]
    assert crossing == [*range(0, config["bert"]["num_hidden_layers"], config["cross_attention_freq"])]
    assert shape.vision_norm_eps == 1e-5 and shape.num_queries == config["num_query_tokens"]


def test_the_imported_stage_1_answers(goldens_dir, tmp_path, options):
    config = facts(goldens_dir, "stage1_weights")
    import_lavis(goldens_dir / "stage1_weights.safetensors", tmp_path / "ours", options()).save(tmp_path / "ours")
    retriever = load_retriever(tmp_path / "ours")
    size = retriever.preprocessing.height
    queries, _ = retriever.embed_image(torch.randint(0, 256, (2, 1, 3, size, size), dtype=torch.uint8))
    texts = retriever.embed_text(["w5 w6", "w7"])
    assert queries.shape == (2, config["num_query_tokens"], config["embed_dim"])
    assert texts.shape == (2, config["embed_dim"])
    assert retriever.stage1.dec_id == config["dec_bos_token_id"]


@pytest.mark.parametrize("projection", ["llm_proj", "t5_proj"])
def test_instructblip_keeps_its_text_branch(goldens_dir, tmp_path, options, projection):
    """Its file is stage 1's Q-Former without heads, and a projection."""
    heads = ("vision_proj.", "text_proj.", "itm_head.", "temp", "Qformer.cls.")
    whole = load_file(goldens_dir / "stage1_weights.safetensors")
    weights = {name: tensor for name, tensor in whole.items() if not name.startswith(heads)}
    hidden = weights["query_tokens"].shape[-1]
    weights |= {f"{projection}.weight": torch.randn(40, hidden), f"{projection}.bias": torch.randn(40)}
    save_file(weights, tmp_path / "instruct.safetensors")
    bundle = import_lavis(tmp_path / "instruct.safetensors", tmp_path / "ours", options())
    bundle.save(tmp_path / "ours")
    info, written = read_info(tmp_path / "ours"), read_weights(tmp_path / "ours")
    assert info.stage == 2 and info.qformer.has_text_branch and not info.qformer.has_lm_head
    vocab_size = facts(goldens_dir, "stage1_weights")["vocab_size_after_adding_DEC"]
    assert bundle.tokenizer.vocab_size == info.qformer.vocab_size == vocab_size and not bundle.report.missing
    load_weights(Stage2(info.qformer, language_width=40), tmp_path / "ours")
    expected = our_weights(goldens_dir / "stage1_weights.safetensors")
    assert torch.equal(written["language_projection.bias"], weights[f"{projection}.bias"])
    assert all(torch.equal(v, expected[k]) for k, v in written.items() if not k.startswith("language_projection"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_stays(goldens_dir, tmp_path, options, dtype):
    weights = load_file(goldens_dir / "stage2_opt_weights.safetensors")
    save_file(
        {k: v.to(dtype) if v.is_floating_point() else v for k, v in weights.items()}, tmp_path / "half.safetensors"
    )
    bundle = import_lavis(tmp_path / "half.safetensors", tmp_path / "ours", options("stage2_opt_weights"))
    bundle.save(tmp_path / "ours")
    assert {v.dtype for v in read_weights(tmp_path / "ours").values()} == {dtype}


@pytest.mark.parametrize("side", [42, 70])
def test_a_tuned_vit_in_the_file_becomes_the_encoder(goldens_dir, tmp_path, options, side):
    """LAVIS keeps `visual_encoder.*` when it trained it, often on larger pictures, cut after the block it reads."""
    width = facts(goldens_dir, "stage2_opt_weights")["encoder_width"]
    vision = write_encoder(tmp_path / "tuned", width, img_size=side)
    tuned = load_file(f"{vision}/model.safetensors")
    tower = {f"visual_encoder.{k}": v + 1 for k, v in tuned.items() if not k.startswith(("blocks.2.", "fc_norm."))}
    weights = {
        k: v for k, v in load_file(goldens_dir / "stage2_opt_weights.safetensors").items() if "opt_model" not in k
    }
    save_file({**weights, **tower}, tmp_path / "tuned.safetensors")
    bundle = import_lavis(tmp_path / "tuned.safetensors", tmp_path / "ours", options("stage2_opt_weights"))
    bundle.save(tmp_path / "ours")
    info = read_info(tmp_path / "ours")
    encoder = load_vision(info.vision)
    named = load_vision(VisionSpec(vision, layer=-2))
    state = named.model.state_dict()
    named.model.load_state_dict({k: v + 1 if f"visual_encoder.{k}" in tower else v for k, v in state.items()})
    pixels = torch.randint(0, 256, (1, 1, 3, side, side), dtype=torch.uint8)
    contract = info.preprocessing
    assert contract == encoder.preprocessing and (contract.height, contract.width) == (side, side)
    assert (contract.crop, contract.interpolation, contract.mean, contract.std) == ("squash", "bicubic", MEAN, STD)
    expected = VisionEncoder(named.model, contract, named.layer)  # the named one normalises otherwise
    torch.testing.assert_close(encoder(pixels), expected(pixels), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("ln_vision.bias"), "lacks 1 (vision_norm.bias); add --set allow_fresh=true"),
        (lambda w: w.update(foo=torch.ones(1)), "no place for: 1 (foo); add --set allow_unexpected=true"),
        (lambda w: w.update(temp=torch.ones(3)), "temperature is (3,)"),
        (lambda w: w.pop("vision_proj.weight"), "no BLIP-2 file of LAVIS"),
        (
            # no copy of what it is tied to
            lambda w: w.update({TIED: torch.ones_like(w["Qformer.cls.predictions.bias"])}),
            TIED,
        ),
        (lambda w: w.update(query_tokens=torch.ones(3, 4)), "query_tokens is (3, 4), not 1 x queries x width"),
    ],
    ids=["missing", "unexpected", "shape", "kind", "untied", "queries"],
)
def test_a_mismatch_is_refused(goldens_dir, tmp_path, options, change, message):
    weights = load_file(goldens_dir / "stage1_weights.safetensors")
    change(weights)
    save_file(weights, tmp_path / "changed.safetensors")
    with pytest.raises(UserError) as caught:
        import_lavis(tmp_path / "changed.safetensors", tmp_path / "ours", options())
    assert message in str(caught.value)


def test_a_mismatch_asked_for_passes_and_is_reported(goldens_dir, tmp_path, options):
    weights = load_file(goldens_dir / "stage1_weights.safetensors")
    del weights["temp"]
    save_file({**weights, "foo": torch.ones(1)}, tmp_path / "changed.safetensors")
    asked = dataclasses.replace(options(), allow_fresh=True, allow_unexpected=True)
    bundle = import_lavis(tmp_path / "changed.safetensors", tmp_path / "ours", asked)
    assert bundle.report.missing == ["temperature"] and bundle.report.unexpected == ["foo"]
    assert bundle.trainables.temperature.item() == pytest.approx(0.07)


class Harmful:
    """Pickles to a call, as a malicious checkpoint would."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path, options):
    torch.save(
        {"model": {"query_tokens": torch.ones(1, 2, 4)}, "config": Harmful(tmp_path / "run")}, tmp_path / "bad.pth"
    )
    with pytest.raises(UserError, match="cannot be read as weights only"):
        import_lavis(tmp_path / "bad.pth", tmp_path / "ours", options())
    assert not (tmp_path / "run").exists()
