"""Frozen backbones: any timm or Hugging Face vision encoder, any Hugging Face LM, by hub name or local folder.

Dimensions: B batch, F frames, C channels, Y/X pixel rows/columns, P image tokens, V encoder width.
`timm` and `transformers` are imported inside the loaders only, so that the rest of the library stays plain torch.
"""

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import qformer.torch_build.vector_math  # noqa: F401  # for its one call
from qformer.adapters.lora import own_weights
from qformer.config import LanguageSpec, VisionSpec
from qformer.errors import NotFiniteError, UserError
from qformer.preprocessing import Preprocessing, timm_preprocessing, transformers_preprocessing
from qformer.torch_build.torchvision import import_timm, import_torchvision

RANDOM_WEIGHTS_SEED = 0
FRAMES_PER_PASS = 64  # that an encoder works on at a time, however many clips a batch holds: this bounds its memory


class VisionEncoder(nn.Module):
    """A frozen encoder behind the preprocessing contract: uint8 pixels in, tokens of one layer out.

    Always in eval mode and without gradients, whatever the surrounding module is switched to.

    Args:
        model: A timm model with `forward_intermediates`, or a Hugging Face vision model with hidden states.
        preprocessing: Its data configuration.
        layer: Which block's output to read; -2 is the second-to-last (BLIP-2, section 3.4).
    """

    mean_1C11: Tensor
    std_1C11: Tensor

    def __init__(self, model: nn.Module, preprocessing: Preprocessing, layer: int) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.preprocessing = preprocessing
        self.layer = layer
        self.register_buffer("mean_1C11", torch.tensor(preprocessing.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std_1C11", torch.tensor(preprocessing.std).view(1, 3, 1, 1), persistent=False)
        sample = torch.zeros(1, 1, 3, preprocessing.height, preprocessing.width, dtype=torch.uint8)
        self.num_tokens, self.width = self(sample).shape[2:]

    def train(self, mode: bool = True) -> "VisionEncoder":
        """Stay in eval mode: a frozen encoder must not drop paths or update statistics."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixels_BFCYX: Tensor) -> Tensor:
        """Encode frames.

        Args:
            pixels_BFCYX: uint8 RGB at the contract's size.

        Returns:
            tokens_BFPV, in the encoder's dtype.

        Raises:
            ValueError: If the pixels are not uint8 or not of the contract's size.
        """
        expected = (3, self.preprocessing.height, self.preprocessing.width)
        if pixels_BFCYX.dtype != torch.uint8 or tuple(pixels_BFCYX.shape[2:]) != expected:
            raise ValueError(
                f"the encoder takes uint8 [B, F, {expected}], got {pixels_BFCYX.dtype} {tuple(pixels_BFCYX.shape)}; "
                "decode with this encoder's own preprocessing"
            )
        dtype, parts = next(self.model.parameters()).dtype, []
        for part in pixels_BFCYX.flatten(0, 1).split(FRAMES_PER_PASS):
            scaled = (part.float() / 255.0 - self.mean_1C11) / self.std_1C11
            parts.append(self._tokens(scaled.to(dtype)))
        return torch.cat(parts).unflatten(0, (-1, pixels_BFCYX.shape[1]))

    def features(self, pixels_BFCYX: Tensor) -> Tensor:
        """Run `forward`, in float32; a ValueError where the result is not finite."""
        tokens_BFPV = cast(Tensor, self(pixels_BFCYX)).float()
        require_finite(tokens_BFPV, torch.ones(len(tokens_BFPV), dtype=torch.bool, device=tokens_BFPV.device))
        return tokens_BFPV

    def _tokens(self, images: Tensor) -> Tensor:
        """Tokens of the chosen layer, class and register tokens first: [G, P, V]."""
        if not hasattr(self.model, "forward_intermediates"):
            return self._hidden_states(images)
        forward = cast(Any, self.model).forward_intermediates
        # Convolutional encoders know neither prefix tokens nor the token layout.
        has_prefix = "return_prefix_tokens" in inspect.signature(forward).parameters
        layout = {"return_prefix_tokens": True, "output_fmt": "NLC", "norm": False} if has_prefix else {}
        (output,) = forward(images, indices=[self.layer], stop_early=True, intermediates_only=True, **layout)
        if isinstance(output, tuple):
            spatial, prefix = output
            return torch.cat([prefix, spatial], dim=1)
        return output.flatten(2).transpose(1, 2) if output.dim() == 4 else output

    def _hidden_states(self, images: Tensor) -> Tensor:
        """The chosen block's output of a Hugging Face model, whose first hidden state is the embedding."""
        # Where a model cannot interpolate its positions by itself, it takes this argument.
        takes_size = "interpolate_pos_encoding" in inspect.signature(self.model.forward).parameters
        resized = {"interpolate_pos_encoding": True} if takes_size else {}
        states = self.model(pixel_values=images, output_hidden_states=True, **resized).hidden_states
        hidden = states[self.layer + 1 if self.layer >= 0 else self.layer]
        return hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden


def load_vision(spec: VisionSpec, *, dtype: torch.dtype = torch.float32) -> VisionEncoder:
    """Load and freeze a timm or Hugging Face encoder.

    Args:
        spec: The encoder; a local folder holds config.json and model.safetensors of either library. Random weights are
            the same in every process.
        dtype: Type of the frozen weights.

    Raises:
        UserError: If the name is unknown, the folder is no model, the hub cannot be reached, or the model cannot take
            another size.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_WEIGHTS_SEED)
        load = _load_transformers_vision if _is_transformers_name(spec.name) else _load_timm_vision
        model, preprocessing = load(spec.name, spec.pretrained, spec.image_size)
        try:
            return VisionEncoder(model.to(dtype), preprocessing, spec.layer)
        except (IndexError, AssertionError, ValueError, RuntimeError, TypeError) as error:
            raise UserError(
                f"model.vision: {spec.name!r} cannot run with layer={spec.layer}, image_size={spec.image_size}; choose "
                f"a layer it has, and a size of at least one patch ({str(error).strip()[:200]})"
            ) from error


def _load_timm_vision(name: str, pretrained: bool, image_size: int | None) -> tuple[nn.Module, Preprocessing]:
    timm = import_timm()
    source = name
    if _is_folder_name(name):
        if not (Path(name) / "config.json").is_file():
            raise UserError(f"model.vision: folder {name!r} has no config.json; give a timm model folder or a hub name")
        source = f"local-dir:{name}"
    # timm interpolates a checkpoint's positions to the size that the model is built for.
    resized = {} if image_size is None else {"img_size": image_size}
    setting = "model.vision" if image_size is None else f"model.vision (with image_size={image_size})"
    try:
        try:
            model = timm.create_model(source, pretrained=pretrained, num_classes=0, **resized)
        except TypeError:
            # Convolutional encoders have no positions and take any size.
            model = timm.create_model(source, pretrained=pretrained, num_classes=0)
    except Exception as error:
        raise model_error(setting, name, error, timm.list_models()) from error
    if not hasattr(model, "forward_intermediates"):
        raise UserError(f"model.vision: {name!r} offers no intermediate layers; choose a ViT or another timm encoder")
    config = timm.data.resolve_model_data_config(model)
    if image_size is not None:
        config["input_size"] = (3, image_size, image_size)
    return model, timm_preprocessing(config)


def _load_transformers_vision(name: str, pretrained: bool, image_size: int | None) -> tuple[nn.Module, Preprocessing]:
    import_torchvision()
    from transformers import AutoConfig, AutoModel
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        if pretrained:
            model = AutoModel.from_pretrained(name, dtype=torch.float32)
        else:
            model = AutoModel.from_config(AutoConfig.from_pretrained(name))
        values, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except Exception as error:
        raise model_error("model.vision", name, error, []) from error
    # A two-tower model such as CLIP keeps its image side apart.
    return getattr(model, "vision_model", model), transformers_preprocessing(values, image_size)


def load_language(spec: LanguageSpec, *, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
    """Load and freeze a Hugging Face language model with its tokenizer: decoder-only, or encoder-decoder as T5.

    Returns:
        The model in eval mode, and the tokenizer.

    Raises:
        UserError: If the name is unknown, the folder is no model, or the hub cannot be reached.
    """
    import_torchvision()
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    try:
        is_encoder_decoder = AutoConfig.from_pretrained(spec.name).is_encoder_decoder
        tokenizer = AutoTokenizer.from_pretrained(spec.name)
        model_class = AutoModelForSeq2SeqLM if is_encoder_decoder else AutoModelForCausalLM
        model = model_class.from_pretrained(spec.name, dtype=dtype)
    except Exception as error:
        raise model_error("model.language", spec.name, error, []) from error
    return model.requires_grad_(False).eval(), tokenizer


def require_finite(tokens_BFPV: Tensor, is_valid_B: Tensor, sample_ids: Sequence[str] = ()) -> None:
    """Name the samples whose features cannot be used.

    Args:
        tokens_BFPV: From the frozen encoder, or a cache of it.
        is_valid_B: False for samples that do not count.
        sample_ids: Their names; without, rows are numbered.

    Raises:
        NotFiniteError: If a valid sample's features hold NaN or infinity.
    """
    bad_B = is_valid_B & ~tokens_BFPV.isfinite().flatten(1).all(dim=1)
    rows = bad_B.nonzero().flatten().tolist()
    if rows:
        names = [sample_ids[row] if sample_ids else f"row {row}" for row in rows]
        raise NotFiniteError(
            f"NaN or infinity in the encoder's features of {len(rows)} of {len(bad_B)} samples: "
            f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}; run the encoder with precision=fp32 (and "
            "rebuild a feature cache so), or take these files out"
        )


def weights_fingerprint(model: nn.Module | Mapping[str, Tensor]) -> str:
    """SHA-256 over names and bytes of a model's own weights (not LoRA's), to show that a frozen model did not move."""
    digest = hashlib.sha256()
    for name, tensor in sorted((own_weights(model) if isinstance(model, nn.Module) else model).items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _is_transformers_name(name: str) -> bool:
    """A folder is recognised by its config.json; on the hub, timm's own names have no owner, or "timm"."""
    if _is_folder_name(name):
        config = Path(name) / "config.json"
        try:
            return config.is_file() and "model_type" in json.loads(config.read_text())
        except ValueError as error:
            raise UserError(f"model.vision: {config} is damaged ({error}); copy the model again") from error
    return "/" in name and not name.startswith(("timm/", "hf-hub:", "hf_hub:"))


def _is_folder_name(name: str) -> bool:
    return name.startswith((".", "/", "~")) or Path(name).is_dir()


def model_error(setting: str, name: str, error: Exception, known: list[str]) -> UserError:
    """One line that says whether the name is wrong or the hub out of reach."""
    import difflib

    near = difflib.get_close_matches(name, known, n=1)
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if near and near[0] != name:
        hint = f"did you mean {near[0]!r}?"
    elif _is_folder_name(name):
        hint = "the folder must hold config.json and model.safetensors in the library's ordinary layout"
    else:
        hint = "check the name; without network give a local folder (or model.vision.pretrained=false for a dry run)"
    return UserError(f"{setting}: cannot load {name!r}: {hint} ({reason[:200]})")
