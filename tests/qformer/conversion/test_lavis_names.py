"""What a LAVIS file does not say and the user names: encoder, language model, tokenizer, heads; and its pictures."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pipelines.data.media.transforms import resize_and_crop
from qformer.backbones import load_vision
from qformer.config import LanguageSpec, VisionSpec
from qformer.conversion.lavis import DEFAULT_VISION, MEAN, STD, import_lavis
from qformer.errors import UserError
from qformer.torch_build.torchvision import import_timm, import_torchvision
from tests.qformer.lavis import facts, write_encoder, write_tokenizer


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("nothing", f"add --set vision={DEFAULT_VISION}"),
        ("vision", "{encoder} wide but .* trained on {width}; name the encoder"),
        ("tokenizer", r"has {vocab} ids with \[DEC\] but the Q-Former vocab_size={more}; give the tokenizer"),
        ("heads", r"num_heads: {heads} do not divide the Q-Former's width of {hidden}; add --set num_heads=N"),
    ],
)
def test_a_wrong_option_is_refused(goldens_dir, tmp_path, options, setting, message):
    config = facts(goldens_dir, "stage1_weights")
    width, vocab, hidden = config["encoder_width"], config["bert"]["vocab_size"], config["bert"]["hidden_size"]
    wrong = {
        "nothing": lambda: {"vision": None},
        "vision": lambda: {"vision": VisionSpec(write_encoder(tmp_path / "wider", width + 2))},
        "tokenizer": lambda: {"tokenizer": write_tokenizer(tmp_path / "smaller", vocab - 1)},
        "heads": lambda: {"num_heads": hidden - 1},
    }[setting]()
    message = message.format(
        encoder=width + 2, width=width, vocab=vocab, more=vocab + 1, heads=hidden - 1, hidden=hidden
    )
    with pytest.raises(UserError) as caught:
        import_lavis(
            goldens_dir / "stage1_weights.safetensors", tmp_path / "ours", dataclasses.replace(options(), **wrong)
        )
    assert re.search(message, str(caught.value)) and "\n" not in str(caught.value)


def test_a_narrow_q_former_needs_its_number_of_heads(tmp_path, options):
    """64 channels a head is BERT's, of which 48 has none."""
    layer = "Qformer.bert.encoder.layer.0.crossattention.self.key.weight"
    weights = {"query_tokens": torch.ones(1, 2, 48), "vision_proj.weight": torch.ones(8, 48), layer: torch.ones(48, 5)}
    save_file(weights, tmp_path / "narrow.safetensors")
    asked = dataclasses.replace(options(), num_heads=None)
    with pytest.raises(UserError, match="num_heads: 64 channels a head do not divide the Q-Former's width of 48"):
        import_lavis(tmp_path / "narrow.safetensors", tmp_path / "ours", asked)


def write_language(goldens_dir, folder, name, **changes):
    """The config alone of a recording's language model."""
    from transformers import OPTConfig, T5Config

    values = {**facts(goldens_dir, name)["llm"], **changes}
    (T5Config if "d_model" in values else OPTConfig)(**values).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", ["stage2_opt", "stage2_t5"])
def test_the_language_model_must_fit_the_projection(goldens_dir, tmp_path, options, name):
    file, given = goldens_dir / f"{name}_weights.safetensors", options(f"{name}_weights")
    key = "word_embed_proj_dim" if name == "stage2_opt" else "d_model"
    width = facts(goldens_dir, name)["llm"][key]

    def imported(language):
        return import_lavis(file, tmp_path / "ours", dataclasses.replace(given, language=LanguageSpec(language))).report

    right = write_language(goldens_dir, tmp_path / "right", name)
    assert "language model" not in str(imported(right))
    wrong = write_language(goldens_dir, tmp_path / "wrong", name, **{key: width + 4})
    with pytest.raises(UserError, match=rf"wrong' is {width + 4} wide but the projection of .* makes {width}; name"):
        imported(wrong)
    told = imported("some-model").lines()[-1]
    assert told.startswith("language model unchecked: no config of 'some-model'") and f"{width} wide" in told


def test_pictures_are_prepared_as_lavis_does(goldens_dir, tmp_path, options):
    """Its own torchvision pipeline (`BlipImageEvalProcessor`) on a picture that a centre crop would cut."""
    torchvision = import_torchvision()
    from torchvision import transforms

    given = options("stage2_opt_weights")
    bundle = import_lavis(goldens_dir / "stage2_opt_weights.safetensors", tmp_path / "ours", given)
    contract = bundle.info.preprocessing
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (61, 97, 3), dtype=np.uint8))
    size, mode = (contract.height, contract.width), torchvision.transforms.InterpolationMode.BICUBIC
    expected = transforms.Compose([transforms.Resize(size, interpolation=mode), transforms.ToTensor()])(image)
    assert torch.equal(torch.from_numpy(resize_and_crop(image, contract)), (expected * 255).round().to(torch.uint8))
    notes = "; ".join(bundle.report.notes)
    assert "resized straight to 42x42, bicubic, as LAVIS evaluates" in notes and "by itself has crop=center" in notes
    # The named encoder was trained on another normalisation, and keeps it.
    assert contract.mean == load_vision(given.vision).preprocessing.mean and "where LAVIS has CLIP's" in notes


def test_the_encoder_that_is_suggested_is_lavis_own():
    """EVA-CLIP, of whose names timm's first is the tuned one; its size and normalisation are LAVIS'."""
    timm = import_timm()
    assert f"{DEFAULT_VISION}.laion400m" in timm.list_pretrained("eva_giant*")
    config = timm.get_pretrained_cfg(DEFAULT_VISION)
    assert (config.tag, config.mean, config.std, config.input_size) == ("laion400m", MEAN, STD, (3, 224, 224))
