"""Vision encoders of both libraries: layer, preprocessing, resolution."""

import json

import pytest
import torch

from qformer.backbones import load_vision
from qformer.config import VisionSpec
from qformer.errors import UserError
from qformer.preprocessing import transformers_preprocessing
from qformer.torch_build.torchvision import import_timm, import_torchvision

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
PROCESSORS = {
    "clip": {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True},
    "siglip": {"size": {"height": 32, "width": 32}, "do_center_crop": None},
    "dinov2": {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True},
    "vit": {"size": 32},
}


def write_encoder(folder, kind):
    """A random Hugging Face encoder with distinct weights, in the library's ordinary files."""
    import_torchvision()
    import transformers as hf

    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(1)
    match kind:
        case "clip":
            model = hf.CLIPModel(hf.CLIPConfig(vision_config=SHAPE, text_config=text))
        case "siglip":
            model = hf.SiglipVisionModel(hf.SiglipVisionConfig(**SHAPE))
        case "dinov2":
            model = hf.Dinov2Model(hf.Dinov2Config(**SHAPE))
        case "vit":
            model = hf.ViTModel(hf.ViTConfig(**SHAPE), add_pooling_layer=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    values = {**PROCESSORS[kind], "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return getattr(model, "vision_model", model).eval()


def pixels(size):
    return torch.randint(0, 255, (2, 2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", PROCESSORS)
def test_a_hugging_face_encoder_gives_its_second_to_last_hidden_state(kind, tmp_path):
    model = write_encoder(tmp_path, kind)
    encoder = load_vision(VisionSpec(str(tmp_path)))
    scaled = pixels(32).flatten(0, 1) / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4]))
    with torch.no_grad():
        states = model(pixel_values=(scaled - mean) / std, output_hidden_states=True).hidden_states
    assert len(states) == 4  # the embedding and three blocks
    torch.testing.assert_close(encoder(pixels(32)).flatten(0, 1), states[-2], atol=1e-5, rtol=1e-4)
    second = load_vision(VisionSpec(str(tmp_path), layer=1))  # block 1 of 0, 1, 2
    assert torch.equal(second(pixels(32)), encoder(pixels(32)))
    assert not any(p.requires_grad for p in encoder.parameters()) and not encoder.train().training


@pytest.mark.parametrize("kind", PROCESSORS)
def test_a_hugging_face_encoder_takes_another_resolution(kind, tmp_path):
    write_encoder(tmp_path, kind)
    own, larger = load_vision(VisionSpec(str(tmp_path))), load_vision(VisionSpec(str(tmp_path), image_size=48))
    prefix = own.num_tokens - 16
    assert (larger.preprocessing.height, larger.num_tokens) == (48, prefix + 36)
    flat = torch.full((1, 1, 3, 48, 48), 128, dtype=torch.uint8)
    tokens = larger(flat)[0, 0, prefix:]
    # One grey everywhere: only positions tell tokens apart, and interpolated ones all differ.
    assert torch.pdist(tokens).min() > 1e-4
    with pytest.raises(ValueError, match=r"\(3, 48, 48\)"):
        larger(pixels(32))


def write_timm(folder):
    timm = import_timm()
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4}
    torch.manual_seed(1)
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0, **sizes)
    with torch.no_grad():
        model.pos_embed.add_(torch.randn_like(model.pos_embed))
    timm.models.save_for_hf(model, str(folder), model_config={"model_args": sizes})
    return model


def test_a_timm_encoder_interpolates_its_positions(tmp_path):
    model = write_timm(tmp_path)
    own, larger = load_vision(VisionSpec(str(tmp_path))), load_vision(VisionSpec(str(tmp_path), image_size=64))
    assert torch.equal(own.model.pos_embed, model.pos_embed)
    grid = model.pos_embed[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, size=(8, 8), mode="bicubic", antialias=True)
    torch.testing.assert_close(larger.model.pos_embed[:, 1:], expected.flatten(2).mT, atol=1e-5, rtol=1e-5)
    assert torch.equal(larger.model.pos_embed[:, :1], model.pos_embed[:, :1])
    assert (larger.preprocessing.width, larger.num_tokens) == (64, 65)
    assert torch.equal(larger.model.blocks[0].mlp.fc1.weight, model.blocks[0].mlp.fc1.weight)


def test_a_convolutional_encoder_takes_any_size():
    own, larger = (load_vision(VisionSpec("test_resnet", pretrained=False, image_size=size)) for size in (None, 192))
    assert larger.preprocessing.height == 192 and larger.num_tokens > own.num_tokens


@pytest.mark.parametrize("error", [TypeError, AssertionError])
def test_an_error_inside_a_vit_is_not_taken_for_a_convolutional_encoder(tmp_path, monkeypatch, error):
    """Once its own error, not a second try in another layout."""
    write_timm(tmp_path)
    encoder, calls = load_vision(VisionSpec(str(tmp_path))), []

    def fail(*_):
        calls.append(1)
        raise error("broken inside")

    monkeypatch.setattr(encoder.model.blocks[0], "forward", fail)
    with pytest.raises(error, match="broken inside"):
        encoder(pixels(32))
    assert len(calls) == 1


def test_a_size_or_layer_that_cannot_be_is_named(tmp_path):
    write_timm(tmp_path)
    with pytest.raises(UserError, match="image_size=4"):
        load_vision(VisionSpec(str(tmp_path), image_size=4))
    with pytest.raises(ValueError, match="image_size=0"):
        VisionSpec(str(tmp_path), image_size=0)
    with pytest.raises(UserError, match="layer=9"):
        load_vision(VisionSpec(str(tmp_path), layer=9))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        # size, crop -> height, resize_short_side, crop mode
        (PROCESSORS["clip"], (32, 36, "center")),
        (PROCESSORS["siglip"], (32, 32, "squash")),
        (PROCESSORS["vit"], (32, 32, "squash")),
        ({"size": 40, "crop_size": 32, "do_center_crop": True}, (32, 40, "center")),
        ({"size": {"shortest_edge": 32}}, (32, 32, "center")),
    ],
)
def test_image_processors_become_the_contract(values, expected):
    given = {**values, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
    found = transformers_preprocessing(given)
    assert (found.height, found.resize_short_side, found.crop) == expected and found.interpolation == "bicubic"
    twice = transformers_preprocessing(given, 64)
    assert (twice.height, twice.resize_short_side) == (64, 2 * expected[1])


def test_an_image_processor_without_normalisation_is_refused():
    with pytest.raises(UserError, match="image_mean"):
        transformers_preprocessing({"size": 32})


def test_a_damaged_configuration_is_the_users_mistake(tmp_path):
    (tmp_path / "config.json").write_text('{"architecture": ')
    with pytest.raises(UserError, match="config.json is damaged"):
        load_vision(VisionSpec(str(tmp_path)))
