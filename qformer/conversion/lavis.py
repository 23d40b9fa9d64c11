"""LAVIS checkpoints (BLIP-2 stage 1, stage 2 with OPT or T5, InstructBLIP with Vicuna or T5) into ours.

LAVIS saves what it trained: the Q-Former, the vision norm, the projection. The backbones are named by the user; where
a fine-tuned ViT lies in the file it becomes the imported checkpoint's own encoder.
Sources: LAVIS `blip2_qformer.py`, `blip2_opt.py`, `blip2_t5.py`, `blip2_vicuna_instruct.py`, `eva_vit.py`; goldens'
README.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from qformer.backbones import VisionEncoder, load_vision
from qformer.bridge import BESIDE, BridgeInfo
from qformer.config import QFormerConfig
from qformer.conversion.bundle import Bundle, ImportOptions, complete, own_state, read_tensors, shown
from qformer.conversion.names import LAVIS, LAVIS_LLM, LAVIS_OPT, LAVIS_T5, Table, from_peer
from qformer.conversion.vision import write_timm_vit
from qformer.errors import UserError
from qformer.preprocessing import Preprocessing
from qformer.text import TextTokenizer, load_text_tokenizer

VISION_FOLDER = "vision"
_BERT_HEAD_WIDTH = 64
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


_KINDS = (
    _Kind(1, LAVIS, "vision_proj.weight"),
    _Kind(2, LAVIS_OPT, "opt_proj.weight"),
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
    kind = next((kind for kind in _KINDS if kind.mark in weights), None)
    if kind is None or "query_tokens" not in weights:
        marks = ", ".join(kind.mark for kind in _KINDS)
        raise UserError(f"source: {str(source)!r} is no BLIP-2 file of LAVIS (query_tokens and one of {marks})")
    if options.vision is None:
        raise UserError("vision: a LAVIS file names no encoder; add --set vision=eva_giant_patch14_224 or its like")
    if kind.stage == 2 and options.language is None:
        raise UserError("language: a LAVIS file names no language model; add --set language=NAME_OR_FOLDER")
    config = lavis_config(weights, options.num_heads)
    width = weights[kind.mark].shape[0] if kind.stage == 2 else 1
    found, rest = from_peer(weights, own_state(kind.stage, config, width), kind.table)
    left_out = [name for name in rest if name in _BUFFERS or name.startswith(_LANGUAGE_PREFIXES)]
    left_out += [name for name, original in _TIED.items() if name in rest and _equal(rest[name], weights, original)]
    tower = {k.removeprefix(_VISION_PREFIX): v for k, v in rest.items() if k.startswith(_VISION_PREFIX)}
    unexpected = rest.keys() - set(left_out) - {_VISION_PREFIX + name for name in tower}
    own, report = complete(
        source, found, left_out, unexpected, options, stage=kind.stage, config=config, language_width=width
    )
    encoder = load_vision(options.vision, pretrained=options.vision_pretrained, layer=options.vision_layer)
    if encoder.width != config.encoder_width:
        raise UserError(
            f"vision: {options.vision!r} is {encoder.width} wide but {str(source)!r} was trained on "
            f"{config.encoder_width}; name the encoder it was trained with"
        )
    info = BridgeInfo(
        stage=kind.stage,
        step=0,
        vision=options.vision,
        vision_pretrained=options.vision_pretrained,
        vision_layer=options.vision_layer,
        language=options.language if kind.stage == 2 else None,
        qformer=config,
        preprocessing=encoder.preprocessing,
        num_frames=options.num_frames,
        max_text_tokens=options.max_text_tokens,
        prompt=options.prompt,
    )
    tokenizer = _tokenizer(source, config, options) if config.has_text_branch else None
    if tower:
        contract = _write_tower(tower, encoder, options.vision, output / VISION_FOLDER)
        note = (
            f"the file's own ViT ({len(tower)} tensors, {contract.height} px) is the encoder, with crop and "
            f"normalisation of {options.vision}"
        )
        info = dataclasses.replace(
            info, vision=BESIDE + VISION_FOLDER, vision_pretrained=True, vision_layer=-1, preprocessing=contract
        )
        report = dataclasses.replace(report, notes=[note])
    return Bundle(info, own, tokenizer, report)


def lavis_config(weights: Mapping[str, Tensor], num_heads: int | None) -> QFormerConfig:
    """Read the shapes off the tensors; the number of heads shows in none of them."""
    layer = "Qformer.bert.encoder.layer"
    layers = {int(m[1]) for m in map(re.compile(rf"{re.escape(layer)}\.(\d+)\.").match, weights) if m}
    crossing = sorted(i for i in layers if f"{layer}.{i}.crossattention.self.key.weight" in weights)
    if not crossing:
        raise UserError("source: no layer of its Q-Former cross-attends; the file is damaged")
    num_queries, hidden = weights["query_tokens"].shape[1:]

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


def _tokenizer(source: Path, config: QFormerConfig, options: ImportOptions) -> TextTokenizer:
    tokenizer = load_text_tokenizer(options.tokenizer, options.max_text_tokens)
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(
            f"tokenizer: {options.tokenizer!r} makes {tokenizer.vocab_size} ids with [DEC] but {str(source)!r} has "
            f"{config.vocab_size}; name the tokenizer it was trained with (LAVIS: bert-base-uncased)"
        )
    return tokenizer


def _write_tower(tower: dict[str, Tensor], encoder: VisionEncoder, name: str, folder: Path) -> Preprocessing:
    """Write LAVIS' fine-tuned EVA (timm's names, cut after the block it reads) as the checkpoint's own encoder.

    Returns:
        The named encoder's contract at the tuned size.
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
    contract = encoder.preprocessing
    short_side = round(contract.resize_short_side * side / contract.height)
    contract = dataclasses.replace(contract, height=side, width=side, resize_short_side=short_side)
    write_timm_vit(folder, tower, num_heads=cast(Any, blocks)[0].attn.num_heads, preprocessing=contract)
    return contract
