"""Import of LAVIS checkpoints: BLIP-2 stage 1, stage 2 with OPT or T5, InstructBLIP with Vicuna or T5.

A LAVIS file holds the trained parts: Q-Former, vision norm, projection. The user names the backbones; a fine-tuned ViT
in the file becomes the encoder of the imported checkpoint.
Sources: LAVIS `blip2_qformer.py`, `blip2_opt.py`, `blip2_t5.py`, `blip2_vicuna_instruct.py`, `eva_vit.py`; goldens'
README.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from qformer.backbones import VisionEncoder, load_vision
from qformer.config import QFormerConfig, VisionSpec
from qformer.conversion.bundle import Bundle, ImportOptions, ImportTarget, read_tensors
from qformer.conversion.checkpoint import IN_CHECKPOINT, BridgeInfo
from qformer.conversion.frozen import language_width
from qformer.conversion.names import LAVIS, LAVIS_LLM, LAVIS_OPT, LAVIS_T5, NameTable, from_layout
from qformer.conversion.report import format_names
from qformer.conversion.vision import write_timm_vit
from qformer.errors import UserError
from qformer.preprocessing import Preprocessing
from qformer.text import load_text_tokenizer

DEFAULT_VISION = "eva_giant_patch14_clip_224"
"""timm's name of LAVIS' EVA-CLIP ViT-g; timm's `eva_giant_patch14_224` is a later one, fine-tuned on ImageNet."""
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""CLIP's pixel statistics, with which LAVIS normalises pictures for every encoder."""
VISION_FOLDER = "vision"
_BERT_HEAD_WIDTH = 64
_OPT_NEWLINE_ID = 50118
"""Newline, with which LAVIS trains every OPT to end an answer (`blip2_opt.py`)."""
_LN_VISION_EPS = 1e-5
_VISION_PREFIX = "visual_encoder."
_LANGUAGE_PREFIXES = ("opt_model.", "t5_model.", "llm_model.")
_BUFFERS = ("Qformer.bert.embeddings.position_ids",)
# Second names of tied parameters in a state dict: copy -> original.
_TIED = {
    "Qformer.cls.predictions.decoder.weight": "Qformer.bert.embeddings.word_embeddings.weight",
    "Qformer.cls.predictions.decoder.bias": "Qformer.cls.predictions.bias",
}


@dataclass(frozen=True, slots=True)
class _Kind:
    """One of LAVIS' models: its tensor names, and a tensor that identifies it."""

    stage: int
    table: NameTable
    marker: str
    """Name of a tensor that only this kind has."""
    answer_end_id: int | None = None
    """Token that ends an answer; see `BridgeInfo`."""


_KINDS = (
    _Kind(1, LAVIS, "vision_proj.weight"),
    _Kind(2, LAVIS_OPT, "opt_proj.weight", _OPT_NEWLINE_ID),
    _Kind(2, LAVIS_T5, "t5_proj.weight"),
    _Kind(2, LAVIS_LLM, "llm_proj.weight"),
)


def import_lavis(source: Path, output: Path, options: ImportOptions) -> Bundle:
    """Read a LAVIS file (.pth, or the same tensors as .safetensors).

    Args:
        source: LAVIS file.
        output: Folder of the future checkpoint; a ViT in the file is written below it.
        options: Import options, with the encoder and for stage 2 the language model.

    Raises:
        UserError: If the file is none of these kinds, a backbone is not named or has another width, or tensors
            mismatch in a way that `options` do not allow.
    """
    weights = read_tensors(source)
    kind = _kind_of(source, weights, options)
    config = lavis_config(weights, options.num_heads)
    width = weights[kind.marker].shape[0] if kind.stage == 2 else 1
    target = ImportTarget(stage=kind.stage, config=config, language_width=width)
    found, rest = from_layout(weights, target.build().state_dict(), kind.table)
    left_out = [name for name in rest if name in _BUFFERS or name.startswith(_LANGUAGE_PREFIXES)]
    left_out += [name for name, original in _TIED.items() if name in rest and _equal(rest[name], weights, original)]
    tower = {k.removeprefix(_VISION_PREFIX): v for k, v in rest.items() if k.startswith(_VISION_PREFIX)}
    unexpected = rest.keys() - set(left_out) - {_VISION_PREFIX + name for name in tower}
    trainables, report = target.fill(source, found, left_out, unexpected, options)
    vision, notes = _vision(source, config, tower, options, output / VISION_FOLDER)
    language = options.language if kind.stage == 2 else None
    if language is not None:
        notes += _check_language(source, language.name, width)
    info = BridgeInfo(
        stage=kind.stage,
        step=0,
        language=language,
        qformer=config,
        num_frames=options.num_frames,
        max_text_tokens=options.max_text_tokens,
        prompt=options.prompt,
        answer_end_id=kind.answer_end_id,
        **vision,
    )
    tokenizer = None
    if config.has_text_branch:
        tokenizer = load_text_tokenizer(options.tokenizer, options.max_text_tokens, config.vocab_size)
    return Bundle(info, trainables, tokenizer, replace(report, notes=notes))


def _kind_of(source: Path, weights: Mapping[str, Tensor], options: ImportOptions) -> _Kind:
    """Identify the model by its tensors, and check that `options` name its backbones."""
    kind = next((kind for kind in _KINDS if kind.marker in weights), None)
    if kind is None or "query_tokens" not in weights:
        markers = ", ".join(kind.marker for kind in _KINDS)
        raise UserError(f"source: {str(source)!r} is no BLIP-2 file of LAVIS (query_tokens and one of {markers})")
    if options.vision is None:
        raise UserError(f"vision: a LAVIS file names no encoder; add --set vision={DEFAULT_VISION} or its like")
    if kind.stage == 2 and options.language is None:
        raise UserError("language: a LAVIS file names no language model; add --set language=NAME_OR_FOLDER")
    return kind


def lavis_config(weights: Mapping[str, Tensor], num_heads: int | None) -> QFormerConfig:
    """Config of a LAVIS Q-Former by its tensors' shapes.

    Args:
        weights: Tensors of the file.
        num_heads: Number of attention heads, which no shape shows; None for BERT's 64 channels a head.
    """
    layer = "Qformer.bert.encoder.layer"
    layers = {int(m[1]) for m in map(re.compile(rf"{re.escape(layer)}\.(\d+)\.").match, weights) if m}
    crossing = sorted(i for i in layers if f"{layer}.{i}.crossattention.self.key.weight" in weights)
    if not crossing:
        raise UserError("source: no layer of its Q-Former cross-attends; the file is damaged")
    if weights["query_tokens"].dim() != 3:
        raise UserError(f"source: query_tokens is {tuple(weights['query_tokens'].shape)}, not 1 x queries x width")
    num_queries, hidden = weights["query_tokens"].shape[1:]
    if hidden % (num_heads or _BERT_HEAD_WIDTH):
        given = f"{_BERT_HEAD_WIDTH} channels a head" if num_heads is None else num_heads
        raise UserError(
            f"num_heads: {given} do not divide the Q-Former's width of {hidden}; add --set num_heads=N with the number "
            "it was trained with"
        )

    def num_rows(name: str, default: int) -> int:
        return weights[name].shape[0] if name in weights else default

    # A text branch is complete or absent: its embeddings alone are reported as unexpected.
    has_text_branch = f"{layer}.0.intermediate.dense.weight" in weights
    words = num_rows("Qformer.bert.embeddings.word_embeddings.weight", 0) if has_text_branch else 0
    return QFormerConfig(
        encoder_width=weights[f"{layer}.{crossing[0]}.crossattention.self.key.weight"].shape[1],
        hidden_size=hidden,
        num_layers=max(layers) + 1,
        num_heads=num_heads or hidden // _BERT_HEAD_WIDTH,
        intermediate_size=num_rows(f"{layer}.0.intermediate_query.dense.weight", 4 * hidden),
        num_queries=num_queries,
        cross_attention_frequency=crossing[1] - crossing[0] if len(crossing) > 1 else max(layers) + 1,
        vocab_size=words,
        has_lm_head="vision_proj.weight" in weights,
        max_positions=num_rows("Qformer.bert.embeddings.position_embeddings.weight", 512),
        embed_dim=num_rows("vision_proj.weight", 256),
        vision_norm_eps=_LN_VISION_EPS,
    )


def _equal(copy: Tensor, weights: Mapping[str, Tensor], original: str) -> bool:
    """Whether a tied copy equals its original; one that differs is reported as unexpected."""
    return original in weights and torch.equal(copy, weights[original])


def _vision(
    source: Path, config: QFormerConfig, tower: dict[str, Tensor], options: ImportOptions, folder: Path
) -> tuple[dict[str, Any], list[str]]:
    """Choose the encoder: the named one, or the file's own of the same kind, which is written into `folder`.

    Returns:
        Fields of `BridgeInfo`, and notes for the report.
    """
    spec = cast(VisionSpec, options.vision)
    name, encoder = spec.name, load_vision(spec)
    if encoder.width != config.encoder_width:
        raise UserError(
            f"vision: {name!r} is {encoder.width} wide but {str(source)!r} was trained on "
            f"{config.encoder_width}; name the encoder it was trained with"
        )
    # As `BlipImageEvalProcessor`: resize to the square, whatever crop the encoder was trained with.
    own = encoder.preprocessing
    side = min(own.height, own.width)
    preprocessing = replace(own, crop="squash", interpolation="bicubic", resize_short_side=side)
    notes = []
    if tower:
        preprocessing = _write_tower(tower, encoder, name, replace(preprocessing, mean=MEAN, std=STD), folder)
        spec = VisionSpec(IN_CHECKPOINT + VISION_FOLDER, layer=-1)
        notes.append(f"the file's own ViT ({len(tower)} tensors, {preprocessing.height} px) is the encoder")
    note = f"pictures: resized straight to {preprocessing.height}x{preprocessing.width}, bicubic, as LAVIS evaluates"
    if own.crop != preprocessing.crop or own.interpolation != preprocessing.interpolation:
        note += f"; {name!r} by itself has crop={own.crop}, {own.interpolation}"
    if (preprocessing.mean, preprocessing.std) != (MEAN, STD):
        note += f"; normalised as {name!r} is (mean {preprocessing.mean}), where LAVIS has CLIP's mean {MEAN}"
    return {"vision": spec, "preprocessing": preprocessing}, [*notes, note]


def _write_tower(
    tower: dict[str, Tensor], encoder: VisionEncoder, name: str, preprocessing: Preprocessing, folder: Path
) -> Preprocessing:
    """Write LAVIS' fine-tuned EVA (timm's names, up to the block that is read) as the checkpoint's own encoder.

    Returns:
        Preprocessing at the size of the fine-tuning.
    """
    blocks = getattr(encoder.model, "blocks", None)
    if blocks is None or not hasattr(cast(Any, blocks)[0], "attn"):
        raise UserError(f"vision: the file holds a ViT, but {name!r} is none; name the ViT it was tuned from")
    known = encoder.model.state_dict()
    missing = sorted({"pos_embed", "patch_embed.proj.weight"} - tower.keys())
    if missing:
        raise UserError(f"source: its ViT lacks {_VISION_PREFIX}{missing[0]}; the file is damaged")
    for key in tower:
        if key not in known or (known[key].shape != tower[key].shape and key != "pos_embed"):
            raise UserError(
                f"vision: the file's {_VISION_PREFIX}{key} has no counterpart in {name!r}; "
                f"name the ViT it was tuned from (holds {format_names(tower)})"
            )
    # Fine-tuning for retrieval or captions uses larger pictures than pre-training.
    side = math.isqrt(tower["pos_embed"].shape[1] - 1) * tower["patch_embed.proj.weight"].shape[-1]
    preprocessing = replace(preprocessing, height=side, width=side, resize_short_side=side)
    write_timm_vit(folder, tower, num_heads=cast(Any, blocks)[0].attn.num_heads, preprocessing=preprocessing)
    return preprocessing


def _check_language(source: Path, name: str, width: int) -> list[str]:
    """Compare the language model's width with the projection's, where its config is on this machine.

    Returns:
        Notes for the report.

    Raises:
        UserError: If the widths differ.
    """
    own = language_width(name)
    if own is None:
        return [f"language model unchecked: no config of {name!r} on this machine; it must be {width} wide"]
    if own != width:
        raise UserError(
            f"language: {name!r} is {own} wide but the projection of {str(source)!r} makes {width}; name the language "
            "model it was trained with"
        )
    return []
