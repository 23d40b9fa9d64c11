"""LAVIS checkpoints (BLIP-2 stage 1, stage 2 with OPT or T5, InstructBLIP with Vicuna or T5) into ours.

LAVIS saves what it trained: the Q-Former, the vision norm, the projection. The backbones are named by the user; where
a fine-tuned ViT lies in the file it becomes the imported checkpoint's own encoder.
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
from qformer.conversion.bundle import Bundle, ImportOptions, Target, read_tensors
from qformer.conversion.checkpoint import BESIDE, BridgeInfo
from qformer.conversion.frozen import language_width
from qformer.conversion.names import LAVIS, LAVIS_LLM, LAVIS_OPT, LAVIS_T5, Table, from_peer
from qformer.conversion.report import shown
from qformer.conversion.vision import write_timm_vit
from qformer.errors import UserError
from qformer.preprocessing import Preprocessing
from qformer.text import load_text_tokenizer

VISION_NAME = "eva_giant_patch14_clip_224"
"""timm's name of the EVA-CLIP ViT-g that LAVIS reads. Its `eva_giant_patch14_224` was fine-tuned on ImageNet since."""
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""CLIP's, with which LAVIS normalises pictures for every encoder."""
VISION_FOLDER = "vision"
_BERT_HEAD_WIDTH = 64
_OPT_NEWLINE_ID = 50118
"""LAVIS teaches every OPT to end an answer with a newline (`blip2_opt.py`)."""
_LN_VISION_EPS = 1e-5
_VISION_PREFIX = "visual_encoder."
_LANGUAGE_PREFIXES = ("opt_model.", "t5_model.", "llm_model.")
_BUFFERS = ("Qformer.bert.embeddings.position_ids",)
# Copies of a tied parameter that a state dict lists a second time: name -> the original.
_TIED = {
    "Qformer.cls.predictions.decoder.weight": "Qformer.bert.embeddings.word_embeddings.weight",
    "Qformer.cls.predictions.decoder.bias": "Qformer.cls.predictions.bias",
}


@dataclass(frozen=True, slots=True)
class _Kind:
    """How one of LAVIS' models is known and named."""

    stage: int
    table: Table
    mark: str
    """A tensor that only this kind has."""
    answer_end_id: int | None = None
    """See `BridgeInfo`."""


_KINDS = (
    _Kind(1, LAVIS, "vision_proj.weight"),
    _Kind(2, LAVIS_OPT, "opt_proj.weight", _OPT_NEWLINE_ID),
    _Kind(2, LAVIS_T5, "t5_proj.weight"),
    _Kind(2, LAVIS_LLM, "llm_proj.weight"),
)


def import_lavis(source: Path, output: Path, options: ImportOptions) -> Bundle:
    """Read a LAVIS file (.pth, or the same tensors as .safetensors).

    Args:
        source: The file.
        output: Where the checkpoint will be; a ViT in the file is written below it.
        options: Must name the encoder, and for stage 2 the language model.

    Raises:
        UserError: If the file is none of these kinds, a backbone is not named or has another width, or tensors
            mismatch in a way that `options` do not allow.
    """
    weights = read_tensors(source)
    kind = _kind_of(source, weights, options)
    config = lavis_config(weights, options.num_heads)
    width = weights[kind.mark].shape[0] if kind.stage == 2 else 1
    target = Target(stage=kind.stage, config=config, language_width=width)
    found, rest = from_peer(weights, target.build().state_dict(), kind.table)
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
    """Tell the model by its tensors, and see that the backbones it needs are named."""
    kind = next((kind for kind in _KINDS if kind.mark in weights), None)
    if kind is None or "query_tokens" not in weights:
        marks = ", ".join(kind.mark for kind in _KINDS)
        raise UserError(f"source: {str(source)!r} is no BLIP-2 file of LAVIS (query_tokens and one of {marks})")
    if options.vision is None:
        raise UserError(f"vision: a LAVIS file names no encoder; add --set vision={VISION_NAME} or its like")
    if kind.stage == 2 and options.language is None:
        raise UserError("language: a LAVIS file names no language model; add --set language=NAME_OR_FOLDER")
    return kind


def lavis_config(weights: Mapping[str, Tensor], num_heads: int | None) -> QFormerConfig:
    """Read the shapes off the tensors; the number of heads shows in none of them."""
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

    def rows(name: str, otherwise: int) -> int:
        return weights[name].shape[0] if name in weights else otherwise

    # A text branch is whole or absent: files that keep stray embeddings of one are reported as unexpected.
    has_text_branch = f"{layer}.0.intermediate.dense.weight" in weights
    words = rows("Qformer.bert.embeddings.word_embeddings.weight", 0) if has_text_branch else 0
    return QFormerConfig(
        encoder_width=weights[f"{layer}.{crossing[0]}.crossattention.self.key.weight"].shape[1],
        hidden_size=hidden,
        num_layers=max(layers) + 1,
        num_heads=num_heads or hidden // _BERT_HEAD_WIDTH,
        intermediate_size=rows(f"{layer}.0.intermediate_query.dense.weight", 4 * hidden),
        num_queries=num_queries,
        cross_attention_frequency=crossing[1] - crossing[0] if len(crossing) > 1 else max(layers) + 1,
        vocab_size=words,
        has_lm_head="vision_proj.weight" in weights,
        max_positions=rows("Qformer.bert.embeddings.position_embeddings.weight", 512),
        embed_dim=rows("vision_proj.weight", 256),
        vision_norm_eps=_LN_VISION_EPS,
    )


def _equal(copy: Tensor, weights: Mapping[str, Tensor], original: str) -> bool:
    """A "tied" copy that differs is no copy: it stays unexpected."""
    return original in weights and torch.equal(copy, weights[original])


def _vision(
    source: Path, config: QFormerConfig, tower: dict[str, Tensor], options: ImportOptions, folder: Path
) -> tuple[dict[str, Any], list[str]]:
    """Choose the encoder: the named one, or of its kind the file's own, written into `folder`.

    Returns:
        Fields of `BridgeInfo`, and what to tell of them.
    """
    spec = cast(VisionSpec, options.vision)
    name, encoder = spec.name, load_vision(spec)
    if encoder.width != config.encoder_width:
        raise UserError(
            f"vision: {name!r} is {encoder.width} wide but {str(source)!r} was trained on "
            f"{config.encoder_width}; name the encoder it was trained with"
        )
    # `BlipImageEvalProcessor`: straight to the square, whatever crop the encoder was trained with.
    own = encoder.preprocessing
    side = min(own.height, own.width)
    contract = replace(own, crop="squash", interpolation="bicubic", resize_short_side=side)
    notes = []
    if tower:
        contract = _write_tower(tower, encoder, name, replace(contract, mean=MEAN, std=STD), folder)
        spec = VisionSpec(BESIDE + VISION_FOLDER, layer=-1)
        notes.append(f"the file's own ViT ({len(tower)} tensors, {contract.height} px) is the encoder")
    told = f"pictures: resized straight to {contract.height}x{contract.width}, bicubic, as LAVIS evaluates"
    if own.crop != contract.crop or own.interpolation != contract.interpolation:
        told += f"; {name!r} by itself has crop={own.crop}, {own.interpolation}"
    if (contract.mean, contract.std) != (MEAN, STD):
        told += f"; normalised as {name!r} is (mean {contract.mean}), where LAVIS has CLIP's mean {MEAN}"
    return {"vision": spec, "preprocessing": contract}, [*notes, told]


def _write_tower(
    tower: dict[str, Tensor], encoder: VisionEncoder, name: str, contract: Preprocessing, folder: Path
) -> Preprocessing:
    """Write LAVIS' fine-tuned EVA (timm's names, cut after the block it reads) as the checkpoint's own encoder.

    Returns:
        The contract at the tuned size.
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
                f"name the ViT it was tuned from (holds {shown(tower)})"
            )
    # Fine-tuning for retrieval or captions was done on larger pictures than pre-training.
    side = math.isqrt(tower["pos_embed"].shape[1] - 1) * tower["patch_embed.proj.weight"].shape[-1]
    contract = replace(contract, height=side, width=side, resize_short_side=side)
    write_timm_vit(folder, tower, num_heads=cast(Any, blocks)[0].attn.num_heads, preprocessing=contract)
    return contract


def _check_language(source: Path, name: str, width: int) -> list[str]:
    """Compare the language model's width with the projection's, where its config lies on this machine.

    Returns:
        What to tell of it.

    Raises:
        UserError: If they differ.
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
