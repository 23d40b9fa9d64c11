"""The frozen vision tower: a timm ViT or EVA in this package, `Blip2VisionModel` in Hugging Face's layout.

Hugging Face's tower ends with the block that the bridge reads (39 of ViT-g's 40), and its post_layernorm is the trained
vision norm. An export is refused unless every tensor has a place and both towers agree on one picture.

Dimensions: P image tokens, V encoder width.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qformer.backbones import VisionEncoder
from qformer.conversion.bundle import read_tensors
from qformer.conversion.names import TIMM_VIT_TO_HF, from_layout, to_layout
from qformer.errors import UserError
from qformer.preprocessing import Preprocessing
from qformer.torch_build.torchvision import import_torchvision

TIMM_NORM_EPS = 1e-6
"""Layer-norm eps of timm's plain ViT; a timm folder cannot set another."""
TOWER_TOLERANCE = 2e-5
"""Largest difference of the two towers' tokens, as a share of the largest token value. Equal towers run the same
operations (measured 0 in fp32 on CPU); in three blocks the tanh GELU gives 1e-4, the quick GELU 5e-3, rotary positions
3e-1."""
_AFTER_THE_BLOCKS = ("norm.", "fc_norm.", "head.", "head_drop.")


def export_tower(encoder: VisionEncoder, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Translate an encoder, up to the block that is read.

    Args:
        encoder: Encoder that was loaded as `name`.
        name: Name for messages; for a local folder, tensors keep its files' dtypes.

    Returns:
        Fields of Hugging Face's vision config, and the tower's tensors under Hugging Face's names.

    Raises:
        UserError: If the encoder does not fit Hugging Face's ViT; the message names the part.
    """
    model = cast(Any, encoder.model)
    state = dict(model.state_dict())
    if Path(name).is_dir():
        # The encoder is in fp32; the export keeps the files' dtypes.
        files = read_tensors(Path(name))
        state = {k: v.to(files[k].dtype) if k in files else v for k, v in state.items()}
    if not hasattr(model, "blocks"):
        raise _refusal(name, f"it is a {type(model).__name__} without transformer blocks")
    depth = len(model.blocks)
    read_blocks = range(encoder.layer % depth + 1)
    state = {k: v for k, v in state.items() if _is_read(k, read_blocks)}
    placed, foreign = to_layout(_with_fused_bias(state), TIMM_VIT_TO_HF)
    if foreign:
        raise _refusal(name, f"it has {sorted(foreign)[0]!r} ({type(model).__name__})")
    preprocessing, weight = encoder.preprocessing, placed.get("embeddings.patch_embedding.weight")
    if preprocessing.height != preprocessing.width:
        raise _refusal(name, f"its pictures are {preprocessing.height}x{preprocessing.width}, not square")
    if weight is None or weight.dim() != 4 or weight.shape[2] != weight.shape[3]:
        raise _refusal(name, "it has no square patch embedding")
    first = model.blocks[0]
    config = {
        "hidden_size": encoder.width,
        "intermediate_size": first.mlp.fc1.out_features,
        "num_hidden_layers": len(read_blocks),
        "num_attention_heads": first.attn.num_heads,
        "image_size": preprocessing.height,
        "patch_size": weight.shape[2],
        "hidden_act": "gelu",
        "layer_norm_eps": first.norm1.eps,
        "qkv_bias": "encoder.layers.0.self_attn.qkv.bias" in placed,
    }
    _check_tower(encoder, name, config, placed)
    return config, placed


def import_tower(
    config: Any, weights: Mapping[str, Tensor], preprocessing: Preprocessing, folder: Path
) -> dict[str, Tensor]:
    """Write a Hugging Face tower as a timm folder whose last block is the one to read.

    Args:
        config: Vision config of the tower.
        weights: Tensors of the tower without the `vision_model.` prefix and without post_layernorm.
        preprocessing: Preprocessing, which becomes timm's data configuration.
        folder: Output folder, which must not exist.

    Returns:
        Tensors without a place in the timm ViT, under their own names.

    Raises:
        UserError: If a timm ViT folder cannot express the config, or a tensor is missing.
    """
    for field, wanted in (("hidden_act", "gelu"), ("layer_norm_eps", TIMM_NORM_EPS)):
        if getattr(config, field) != wanted:
            raise UserError(
                f"source: vision_config.{field}={getattr(config, field)!r} has no timm folder (only {wanted!r}); "
                "import the bridge alone from a LAVIS file and name a timm encoder"
            )
    names = _tower_names(config.num_hidden_layers, has_bias=config.qkv_bias)
    found, rest = from_layout(weights, names, TIMM_VIT_TO_HF)
    missing = sorted(set(names) - found.keys())
    if missing:
        raise UserError(f"source: the vision tower lacks {missing[0]!r} (timm's name); the folder is damaged")
    write_timm_vit(folder, found, num_heads=config.num_attention_heads, preprocessing=preprocessing)
    return rest


def write_timm_vit(
    folder: Path, weights: Mapping[str, Tensor], *, num_heads: int, preprocessing: Preprocessing
) -> None:
    """Write a timm ViT folder (config.json, model.safetensors) from tensors under timm's names."""
    from safetensors.torch import save_file

    weights = _with_fused_bias(weights)
    width, _, patch_size, _ = weights["patch_embed.proj.weight"].shape
    hidden = weights["blocks.0.mlp.fc1.weight"].shape[0]
    ratio = hidden / width
    if int(width * ratio) != hidden:
        ratio = math.nextafter(ratio, math.inf)  # timm rounds the product down
    size = (preprocessing.height, preprocessing.width)
    config = {
        "architecture": "vit_base_patch16_224",
        "num_classes": 0,
        "num_features": width,
        "model_args": {
            "img_size": preprocessing.height,
            "patch_size": patch_size,
            "embed_dim": width,
            "depth": len({k.split(".")[1] for k in weights if k.startswith("blocks.")}),
            "num_heads": num_heads,
            "mlp_ratio": ratio,
            "qkv_bias": "blocks.0.attn.qkv.bias" in weights,
            "final_norm": False,
        },
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": [3, *size],
            "fixed_input_size": True,
            "interpolation": preprocessing.interpolation,
            "crop_pct": min(size) / preprocessing.resize_short_side,
            "crop_mode": preprocessing.crop,
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors")


def norm_eps_effect(encoder: VisionEncoder, norm: nn.LayerNorm, eps: float) -> float:
    """Change of the vision norm's output with another eps on a noise picture, as a share of its largest value."""
    tokens_PV = encoder(_noise(encoder))[0, 0].float()
    shape, weight, bias = list(norm.weight.shape), norm.weight.float(), norm.bias.float()
    own_PV = F.layer_norm(tokens_PV, shape, weight, bias, norm.eps)
    other_PV = F.layer_norm(tokens_PV, shape, weight, bias, eps)
    return float((own_PV - other_PV).abs().max() / own_PV.abs().max())


def _check_tower(encoder: VisionEncoder, name: str, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Build Hugging Face's tower from the tensors and compare its tokens with the encoder's on one picture."""
    import_torchvision()
    from transformers import Blip2VisionConfig, Blip2VisionModel

    with torch.device("meta"):
        tower = Blip2VisionModel(Blip2VisionConfig(**config))
    own = {k: v for k, v in tower.state_dict().items() if not k.startswith("post_layernorm.")}
    for key in sorted(own.keys() | weights.keys()):
        if key not in weights:
            raise _refusal(name, f"it has nothing to fill {key!r} with")
        if key not in own or own[key].shape != weights[key].shape:
            wanted = tuple(own[key].shape) if key in own else None
            raise _refusal(name, f"its {key!r} is {tuple(weights[key].shape)} where {wanted} is wanted")
    tower.load_state_dict({k: v.float() for k, v in weights.items()}, strict=False, assign=True)
    tower = tower.eval()
    noise = _noise(encoder)
    pixels = (noise[0].float() / 255.0 - encoder.mean_1C11) / encoder.std_1C11
    with torch.no_grad():
        timm_PV = encoder(noise)[0, 0].float()
        hf_PV = tower.encoder(inputs_embeds=tower.embeddings(pixels)).last_hidden_state[0]
    difference = float((timm_PV - hf_PV).abs().max() / timm_PV.abs().max())
    if not difference <= TOWER_TOLERANCE:
        raise _refusal(name, f"it computes otherwise: tokens of one picture differ by {difference:.1e}")


def _noise(encoder: VisionEncoder) -> Tensor:
    size = (1, 1, 3, encoder.preprocessing.height, encoder.preprocessing.width)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _is_read(name: str, read_blocks: range) -> bool:
    """Whether a tensor affects the tokens of the last block that is read."""
    if name.startswith("blocks."):
        return int(name.split(".")[1]) in read_blocks
    return not name.startswith(_AFTER_THE_BLOCKS)


def _with_fused_bias(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fuse EVA's separate query and value biases (the key's is zero) into the one vector (q, k, v) of both ViTs."""
    fused = dict(weights)
    for name in [k for k in weights if k.endswith(".q_bias")]:
        block = name.removesuffix("q_bias")
        query = fused.pop(name)
        fused[f"{block}qkv.bias"] = torch.cat([query, torch.zeros_like(query), fused.pop(f"{block}v_bias")])
    return fused


def _tower_names(depth: int, *, has_bias: bool) -> list[str]:
    bare = ["cls_token", "pos_embed"]
    modules = [m for m in TIMM_VIT_TO_HF if m not in bare]
    names = [m.replace(".N.", f".{i}.") for m in modules for i in range(depth if ".N." in m else 1)]
    with_bias = [f"{m}.bias" for m in names if has_bias or not m.endswith("qkv")]
    return [*bare, *(f"{m}.weight" for m in names), *with_bias]


def _refusal(name: str, reason: str) -> UserError:
    return UserError(
        f"checkpoint: its encoder {name!r} does not fit Hugging Face's BLIP-2 ViT: {reason}; "
        "export needs a plain ViT or EVA (class token, absolute positions, pre-norm, exact GELU)"
    )
