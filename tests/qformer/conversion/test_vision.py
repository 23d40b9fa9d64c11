"""The frozen tower: EVA and ViT to Hugging Face's, everything that does not fit refused by name."""

import json

import pytest
import torch
from safetensors.torch import save_file

from qformer.backbones import load_vision
from qformer.config import VisionSpec
from qformer.conversion.vision import TIMM_NORM_EPS, export_tower, import_tower
from qformer.errors import UserError
from qformer.torch_build.torchvision import import_timm, import_torchvision

SMALL = {"img_size": 42, "embed_dim": 24, "depth": 3, "num_heads": 2, "mlp_ratio": 2.5}


def write_timm_folder(folder, architecture, dtype=torch.float32, **model_args):
    """A timm folder with distinct random weights everywhere (biases and norms too)."""
    torch.manual_seed(4)
    model_args = {**SMALL, **model_args}
    model = import_timm().create_model(architecture, num_classes=0, **model_args)
    weights = {k: (v + 0.3 * torch.randn(v.shape)).to(dtype) for k, v in model.state_dict().items()}
    size = [3, model_args["img_size"], model_args["img_size"]]
    pretrained_cfg = {"input_size": size, "mean": [0.5] * 3, "std": [0.4] * 3, "crop_pct": 1.0, "num_classes": 0}
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    config = {
        "architecture": architecture,
        "num_classes": 0,
        "model_args": model_args,
        "pretrained_cfg": pretrained_cfg,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def picture():
    return torch.randint(0, 256, (2, 1, 3, SMALL["img_size"], SMALL["img_size"]), dtype=torch.uint8)


@pytest.mark.parametrize("architecture", ["eva_giant_patch14_224", "vit_giant_patch14_224"])
@pytest.mark.parametrize("layer", [-2, -1, 0])
def test_a_tower_goes_out_and_comes_back(tmp_path, architecture, layer):
    """EVA's separate biases and ViT's single one; the tower ends at the layer that is read."""
    import_torchvision()
    from transformers import Blip2VisionConfig, Blip2VisionModel

    name = write_timm_folder(tmp_path / "timm", architecture)
    encoder = load_vision(VisionSpec(name, layer=layer))
    config, weights = export_tower(encoder, name)
    assert config["num_hidden_layers"] == {-2: 2, -1: 3, 0: 1}[layer]
    stock = Blip2VisionModel(Blip2VisionConfig(**config)).eval()
    norm = {f"post_layernorm.{k}": v for k, v in torch.nn.LayerNorm(24).state_dict().items()}
    stock.load_state_dict({**weights, **norm})
    pixels = picture()
    scaled = (pixels[:, 0].float() / 255 - 0.5) / 0.4
    with torch.no_grad():
        expected = torch.nn.functional.layer_norm(encoder(pixels)[:, 0], (24,), eps=TIMM_NORM_EPS)
        torch.testing.assert_close(stock(scaled).last_hidden_state, expected, atol=2e-5, rtol=1e-4)
    rest = import_tower(Blip2VisionConfig(**config), weights, encoder.preprocessing, tmp_path / "back")
    assert rest == {}
    back = load_vision(VisionSpec(str(tmp_path / "back"), layer=-1))
    assert back.preprocessing == encoder.preprocessing
    torch.testing.assert_close(back(pixels), encoder(pixels), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "model_args", "reason"),
    [
        ("xcit_nano_12_p8_224", {"img_size": 48, "cls_attn_layers": 1}, "blocks.0.attn.temperature"),
        ("vit_giant_patch14_224", {"init_values": 0.1}, "blocks.0.ls1.gamma"),  # layer scale
        ("vit_giant_patch14_224", {"pre_norm": True}, "norm_pre"),
        ("vit_giant_patch14_224", {"reg_tokens": 2}, "reg_token"),
        ("vit_giant_patch14_224", {"qk_norm": True}, "blocks.0.attn.k_norm"),
        ("vit_giant_patch14_224", {"class_token": False, "global_pool": "avg"}, "class_embedding"),
        ("vit_giant_patch14_224", {"no_embed_class": True}, "position_embedding"),
        ("vit_giant_patch14_224", {"act_layer": "quick_gelu"}, "computes otherwise"),
        ("vit_giant_patch14_224", {"act_layer": "gelu_tanh"}, "computes otherwise"),
        ("eva_giant_patch14_224", {"use_rot_pos_emb": True}, "computes otherwise"),  # in no tensor's name
        ("eva_giant_patch14_224", {"swiglu_mlp": True, "scale_mlp": True}, "blocks.0.mlp.fc1_g"),
        ("eva_giant_patch14_224", {"qkv_fused": False}, "blocks.0.attn.k_proj"),
        ("resnet18", None, "ResNet"),
    ],
)
def test_an_encoder_that_does_not_fit_is_refused_by_name(tmp_path, architecture, model_args, reason):
    if model_args is None:
        name, encoder = architecture, load_vision(VisionSpec(architecture, pretrained=False))
    else:
        name = write_timm_folder(tmp_path / "timm", architecture, **model_args)
        encoder = load_vision(VisionSpec(name))
    with pytest.raises(UserError, match="does not fit Hugging Face's BLIP-2 ViT") as caught:
        export_tower(encoder, name)
    assert reason in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("field", "value"), [("hidden_act", "quick_gelu"), ("layer_norm_eps", 1e-5)])
def test_a_config_that_a_timm_folder_cannot_say_is_refused(tmp_path, field, value):
    from transformers import Blip2VisionConfig

    name = write_timm_folder(tmp_path / "timm", "vit_giant_patch14_224")
    encoder = load_vision(VisionSpec(name))
    config, weights = export_tower(encoder, name)
    with pytest.raises(UserError, match=f"vision_config.{field}={value!r}"):
        import_tower(Blip2VisionConfig(**{**config, field: value}), weights, encoder.preprocessing, tmp_path / "back")


def test_half_precision_files_stay_half(tmp_path):
    name = write_timm_folder(tmp_path / "timm", "eva_giant_patch14_224", torch.float16)
    _, weights = export_tower(load_vision(VisionSpec(name)), name)
    assert {v.dtype for v in weights.values()} == {torch.float16}
