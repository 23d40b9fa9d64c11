"""LAVIS files into checkpoints of ours: the goldens' weights, as LAVIS saves them and as safetensors."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from qformer.backbones import load_vision
from qformer.bridge import load_retriever, load_weights, read_info, read_weights
from qformer.conversion.bundle import ImportOptions, write_bundle
from qformer.conversion.lavis import import_lavis
from qformer.errors import UserError
from qformer.stage1 import Stage1
from qformer.stage2 import Stage2
from tests.qformer.lavis import our_weights
from tests.qformer.test_conversion_vision import write_timm_folder

FILES = ["stage1_weights", "stage2_opt_weights", "stage2_t5_weights"]
LEFT_OUT = {"stage1_weights": 3, "stage2_opt_weights": 1, "stage2_t5_weights": 1}


@pytest.fixture
def vision(tmp_path):
    """An encoder of the goldens' width (48)."""
    return write_timm_folder(tmp_path / "timm", "eva_giant_patch14_224", embed_dim=48)


@pytest.fixture
def tokenizer(tmp_path):
    """BERT's kind with the goldens' 200 words; [DEC] is the 201st."""
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(5, 200))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    made = BertTokenizerFast(vocab=str(tmp_path / "vocab.txt"))
    assert len(made) == 200
    made.save_pretrained(tmp_path / "bert")
    return str(tmp_path / "bert")


@pytest.fixture
def options(vision, tokenizer):
    return ImportOptions(vision=vision, language="a-named-model", tokenizer=tokenizer, num_heads=4)


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
    bundle = import_lavis(source, tmp_path / "ours", options)
    write_bundle(tmp_path / "ours", bundle)
    named, written = our_weights(file), read_weights(tmp_path / "ours")
    expected = {k.replace("t5_proj.", "language_projection."): v for k, v in named.items() if "t5_model." not in k}
    assert written.keys() == expected.keys() and len(written) > 50
    for key, tensor in expected.items():
        assert torch.equal(written[key], tensor), key
    report = bundle.report
    frozen = [k for k in report.left_out if k.startswith(("opt_model.", "t5_model."))]
    assert len(report.left_out) - len(frozen) == LEFT_OUT[name] and bool(frozen) == name.startswith("stage2")
    assert report.fresh == [] and report.unexpected == [] and len(report.loaded) == len(expected)
    info = read_info(tmp_path / "ours")
    width = 1 if info.stage == 1 else written["language_projection.weight"].shape[0]
    model = Stage1(info.qformer) if info.stage == 1 else Stage2(info.qformer, language_width=width)
    load_weights(model, tmp_path / "ours")
    assert info.qformer.vision_norm_eps == 1e-5 and info.qformer.cross_attention_frequency == 2


def test_the_imported_stage_1_answers(goldens_dir, tmp_path, options):
    bundle = import_lavis(goldens_dir / "stage1_weights.safetensors", tmp_path / "ours", options)
    write_bundle(tmp_path / "ours", bundle)
    retriever = load_retriever(tmp_path / "ours")
    size = retriever.preprocessing.height
    queries, _ = retriever.embed_image(torch.randint(0, 256, (2, 1, 3, size, size), dtype=torch.uint8))
    texts = retriever.embed_text(["w17 w20", "w99"])
    assert queries.shape == (2, 8, 32) and texts.shape == (2, 32)
    facts = json.loads((goldens_dir / "stage1_weights.json").read_text())["config"]
    assert retriever.stage1.dec_id == facts["dec_bos_token_id"]


@pytest.mark.parametrize("projection", ["llm_proj", "t5_proj"])
def test_instructblip_keeps_its_text_branch(goldens_dir, tmp_path, options, projection):
    """Its file is stage 1's Q-Former without heads, and a projection."""
    heads = ("vision_proj.", "text_proj.", "itm_head.", "temp", "Qformer.cls.")
    whole = load_file(goldens_dir / "stage1_weights.safetensors")
    weights = {name: tensor for name, tensor in whole.items() if not name.startswith(heads)}
    hidden = weights["query_tokens"].shape[-1]
    weights |= {f"{projection}.weight": torch.randn(40, hidden), f"{projection}.bias": torch.randn(40)}
    save_file(weights, tmp_path / "instruct.safetensors")
    bundle = import_lavis(tmp_path / "instruct.safetensors", tmp_path / "ours", options)
    write_bundle(tmp_path / "ours", bundle)
    info, written = read_info(tmp_path / "ours"), read_weights(tmp_path / "ours")
    assert info.stage == 2 and info.qformer.has_text_branch and not info.qformer.has_lm_head
    assert bundle.tokenizer.vocab_size == info.qformer.vocab_size == 201 and not bundle.report.fresh
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
    bundle = import_lavis(tmp_path / "half.safetensors", tmp_path / "ours", options)
    assert {v.dtype for v in bundle.weights.values()} == {dtype}


@pytest.mark.parametrize("side", [42, 70])
def test_a_tuned_vit_in_the_file_becomes_the_encoder(goldens_dir, tmp_path, options, side):
    """LAVIS keeps `visual_encoder.*` when it trained it, often on larger pictures, cut after the block it reads."""
    vision = write_timm_folder(tmp_path / "tuned", "eva_giant_patch14_224", embed_dim=48, img_size=side)
    tuned = load_file(f"{vision}/model.safetensors")
    tower = {f"visual_encoder.{k}": v + 1 for k, v in tuned.items() if not k.startswith(("blocks.2.", "fc_norm."))}
    weights = {
        k: v for k, v in load_file(goldens_dir / "stage2_opt_weights.safetensors").items() if "opt_model" not in k
    }
    save_file({**weights, **tower}, tmp_path / "tuned.safetensors")
    bundle = import_lavis(tmp_path / "tuned.safetensors", tmp_path / "ours", options)
    write_bundle(tmp_path / "ours", bundle)
    info = read_info(tmp_path / "ours")
    encoder = load_vision(info.vision, pretrained=info.vision_pretrained, layer=info.vision_layer)
    named = load_vision(vision, layer=-2)
    state = named.model.state_dict()
    named.model.load_state_dict({k: v + 1 if f"visual_encoder.{k}" in tower else v for k, v in state.items()})
    pixels = torch.randint(0, 256, (1, 1, 3, side, side), dtype=torch.uint8)
    assert info.preprocessing == encoder.preprocessing == named.preprocessing
    torch.testing.assert_close(encoder(pixels), named(pixels), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("ln_vision.bias"), "lacks 1 (vision_norm.bias); add --set allow_fresh=true"),
        (lambda w: w.update(foo=torch.ones(1)), "no place for: 1 (foo); add --set allow_unexpected=true"),
        (lambda w: w.update(temp=torch.ones(3)), "temperature is (3,)"),
        (lambda w: w.pop("vision_proj.weight"), "no BLIP-2 file of LAVIS"),
        (
            lambda w: w.update(
                {"Qformer.cls.predictions.decoder.bias": torch.ones(201)}
            ),  # no copy of what it is tied to
            "Qformer.cls.predictions.decoder.bias",
        ),
    ],
    ids=["missing", "unexpected", "shape", "kind", "untied"],
)
def test_a_mismatch_is_refused(goldens_dir, tmp_path, options, change, message):
    weights = load_file(goldens_dir / "stage1_weights.safetensors")
    change(weights)
    save_file(weights, tmp_path / "changed.safetensors")
    with pytest.raises(UserError) as caught:
        import_lavis(tmp_path / "changed.safetensors", tmp_path / "ours", options)
    assert message in str(caught.value)


def test_a_mismatch_asked_for_passes_and_is_reported(goldens_dir, tmp_path, vision, tokenizer):
    weights = load_file(goldens_dir / "stage1_weights.safetensors")
    del weights["temp"]
    save_file({**weights, "foo": torch.ones(1)}, tmp_path / "changed.safetensors")
    asked = ImportOptions(vision=vision, tokenizer=tokenizer, num_heads=4, allow_fresh=True, allow_unexpected=True)
    bundle = import_lavis(tmp_path / "changed.safetensors", tmp_path / "ours", asked)
    assert bundle.report.fresh == ["temperature"] and bundle.report.unexpected == ["foo"]
    assert bundle.weights["temperature"].item() == pytest.approx(0.07)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"vision": None}, "add --set vision="),
        ({"vision": "test_vit", "vision_pretrained": False}, "64 wide but"),
        ({"tokenizer": "bert"}, "has 201"),
    ],
)
def test_a_wrong_name_is_refused(goldens_dir, tmp_path, options, wrong, message):
    import dataclasses

    if "tokenizer" in wrong:
        from tests.tiny_huggingface import bert_tokenizer

        bert_tokenizer().save_pretrained(tmp_path / "small")
        wrong = {"tokenizer": str(tmp_path / "small")}
    with pytest.raises(UserError) as caught:
        import_lavis(
            goldens_dir / "stage1_weights.safetensors", tmp_path / "ours", dataclasses.replace(options, **wrong)
        )
    assert message in str(caught.value)


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
        import_lavis(tmp_path / "bad.pth", tmp_path / "ours", options)
    assert not (tmp_path / "run").exists()
