"""Frozen backbones: any timm vision encoder, any Hugging Face causal LM, by hub name or local folder.

Dimensions: B batch, F frames, C channels, Y/X pixel rows/columns, P image tokens, V encoder width.
`timm` and `transformers` are imported inside the loaders only, so that the rest of the library stays plain torch.
"""

import hashlib
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from qformer.errors import UserError
from qformer.preprocessing import Preprocessing

RANDOM_WEIGHTS_SEED = 0


class VisionEncoder(nn.Module):
    """A frozen timm encoder behind the preprocessing contract: uint8 pixels in, tokens of one layer out.

    Always in eval mode and without gradients, whatever the surrounding module is switched to.

    Args:
        model: A timm model with `forward_intermediates`.
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
        frames = pixels_BFCYX.shape[1]
        dtype = next(self.model.parameters()).dtype
        scaled = (pixels_BFCYX.flatten(0, 1).float() / 255.0 - self.mean_1C11) / self.std_1C11
        return self._tokens(scaled.to(dtype)).unflatten(0, (-1, frames))

    def _tokens(self, images: Tensor) -> Tensor:
        """Tokens of the chosen layer, class and register tokens first: [G, P, V]."""
        forward = cast(Any, self.model).forward_intermediates
        try:
            (output,) = forward(
                images, indices=[self.layer], return_prefix_tokens=True, norm=False, stop_early=True,
                output_fmt="NLC", intermediates_only=True,
            )  # fmt: skip
        except (AssertionError, TypeError):
            # Convolutional encoders know neither prefix tokens nor the token layout.
            (output,) = forward(images, indices=[self.layer], stop_early=True, intermediates_only=True)
        if isinstance(output, tuple):
            spatial, prefix = output
            return torch.cat([prefix, spatial], dim=1)
        return output.flatten(2).transpose(1, 2) if output.dim() == 4 else output


def load_vision(
    name: str, *, pretrained: bool = True, layer: int = -2, dtype: torch.dtype = torch.float32
) -> VisionEncoder:
    """Load and freeze a timm encoder.

    Args:
        name: timm hub name ("eva_giant_patch14_224"), or a local folder with config.json and model.safetensors.
        pretrained: False builds it with random weights of a fixed seed, the same in every process.
        layer: See `VisionEncoder`.
        dtype: Of the frozen weights.

    Raises:
        UserError: If the name is unknown, the folder is no timm model, or the hub cannot be reached.
    """
    timm = import_timm()
    source = name
    if _is_folder_name(name):
        if not (Path(name) / "config.json").is_file():
            raise UserError(f"model.vision: folder {name!r} has no config.json; give a timm model folder or a hub name")
        source = f"local-dir:{name}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_WEIGHTS_SEED)
        try:
            model = timm.create_model(source, pretrained=pretrained, num_classes=0)
        except Exception as error:
            raise _model_error("model.vision", name, error, timm.list_models()) from error
    if not hasattr(model, "forward_intermediates"):
        raise UserError(f"model.vision: {name!r} offers no intermediate layers; choose a ViT or another timm encoder")
    return VisionEncoder(model.to(dtype), timm_preprocessing(timm.data.resolve_model_data_config(model)), layer)


def timm_preprocessing(config: dict[str, Any]) -> Preprocessing:
    """Translate timm's data configuration into the contract."""
    _, height, width = config["input_size"]
    return Preprocessing(
        height=height,
        width=width,
        resize_short_side=max(int(min(height, width) / config.get("crop_pct", 1.0)), height, width),
        interpolation=config.get("interpolation", "bicubic"),
        crop="squash" if config.get("crop_mode") == "squash" else "center",
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )


def load_language(name: str, *, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
    """Load and freeze a Hugging Face causal LM with its tokenizer.

    Returns:
        The model in eval mode, and the tokenizer.

    Raises:
        UserError: If the name is unknown, the folder is no model, or the hub cannot be reached.
    """
    import_torchvision()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except Exception as error:
        raise _model_error("model.language", name, error, []) from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"model.language: the tokenizer of {name!r} has no end token; set eos_token in its config")
    return model.requires_grad_(False).eval(), tokenizer


def weights_fingerprint(module: nn.Module) -> str:
    """SHA-256 over names and bytes of all weights, to show that a frozen model did not move."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def import_timm() -> ModuleType:
    """Import timm, also beside a CPU build of torch (see `import_torchvision`)."""
    import_torchvision()
    import timm

    return cast(ModuleType, timm)


def import_torchvision() -> ModuleType:
    """Import torchvision even where its compiled operators cannot load.

    The registry's torchvision is compiled for CUDA. Beside a CPU-only torch its operator library does not load, and
    its import then fails on describing two operators that nobody declared. We use none of them, but timm imports
    torchvision; declaring the two signatures lets the import pass.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision

        # The declaration lives as long as the library object does.
        torchvision.declared_operators = library
    return cast(ModuleType, torchvision)


def _is_folder_name(name: str) -> bool:
    return name.startswith((".", "/", "~")) or Path(name).is_dir()


def _model_error(setting: str, name: str, error: Exception, known: list[str]) -> UserError:
    """One line that says whether the name is wrong or the hub out of reach."""
    import difflib

    near = difflib.get_close_matches(name, known, n=1)
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if near and near[0] != name:
        hint = f"did you mean {near[0]!r}?"
    elif _is_folder_name(name):
        hint = "the folder must hold config.json and model.safetensors in the library's ordinary layout"
    else:
        hint = "check the name; without network give a local folder (or model.vision_pretrained=false for a dry run)"
    return UserError(f"{setting}: cannot load {name!r}: {hint} ({reason[:200]})")
