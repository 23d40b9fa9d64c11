"""Tensor names: one table for each other layout, from this package's names to the layout's.

A table maps module paths (or bare parameters) with `N` for the layer's number; `.weight` and `.bias` are appended.
The inverse starts from the names of this package's model, so a tensor of the layout without a counterpart is reported.

Sources: goldens' README ("Key layout"), LAVIS `blip2_qformer.py`/`Qformer.py`, transformers `modeling_blip_2.py` and
`modeling_instructblip.py`, timm `vision_transformer.py`.
"""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

NameTable = Mapping[str, str]

# Inside a Q-Former layer the layouts differ in one word: LAVIS says `self` where Hugging Face says `attention`.
_LAYER = {
    "attention.query": "attention.{inner}.query",
    "attention.key": "attention.{inner}.key",
    "attention.value": "attention.{inner}.value",
    "attention.output": "attention.output.dense",
    "attention.norm": "attention.output.LayerNorm",
    "cross_attention.query": "crossattention.{inner}.query",
    "cross_attention.key": "crossattention.{inner}.key",
    "cross_attention.value": "crossattention.{inner}.value",
    "cross_attention.output": "crossattention.output.dense",
    "cross_attention.norm": "crossattention.output.LayerNorm",
    "query_ffn.up": "intermediate_query.dense",
    "query_ffn.down": "output_query.dense",
    "query_ffn.norm": "output_query.LayerNorm",
    "text_ffn.up": "intermediate.dense",
    "text_ffn.down": "output.dense",
    "text_ffn.norm": "output.LayerNorm",
}


def _layers(root: str, inner: str) -> NameTable:
    return {f"qformer.layers.N.{own}": f"{root}.N.{other.format(inner=inner)}" for own, other in _LAYER.items()}


LAVIS: NameTable = {
    **_layers("Qformer.bert.encoder.layer", "self"),
    "vision_norm": "ln_vision",
    "qformer.query_tokens": "query_tokens",
    "qformer.embedding_norm": "Qformer.bert.embeddings.LayerNorm",
    "qformer.word_embeddings": "Qformer.bert.embeddings.word_embeddings",
    "qformer.position_embeddings": "Qformer.bert.embeddings.position_embeddings",
    "qformer.lm_dense": "Qformer.cls.predictions.transform.dense",
    "qformer.lm_norm": "Qformer.cls.predictions.transform.LayerNorm",
    "qformer.lm_bias": "Qformer.cls.predictions.bias",
    "vision_projection": "vision_proj",
    "text_projection": "text_proj",
    "itm_head": "itm_head",
    "temperature": "temp",
}
LAVIS_OPT: NameTable = {**LAVIS, "language_projection": "opt_proj"}
LAVIS_T5: NameTable = {**LAVIS, "language_projection": "t5_proj"}
LAVIS_LLM: NameTable = {**LAVIS, "language_projection": "llm_proj"}

_HF_COMMON: NameTable = {
    **_layers("qformer.encoder.layer", "attention"),
    "vision_norm": "vision_model.post_layernorm",
    "qformer.query_tokens": "query_tokens",
}
HF_CAPTION: NameTable = {
    **_HF_COMMON,
    "qformer.embedding_norm": "qformer.layernorm",
    "language_projection": "language_projection",
}
# No entry for the temperature and the ITG head: they go into the side file.
HF_RETRIEVAL: NameTable = {
    **_HF_COMMON,
    "qformer.embedding_norm": "qformer.layernorm",
    "qformer.word_embeddings": "embeddings.word_embeddings",
    "qformer.position_embeddings": "embeddings.position_embeddings",
    "vision_projection": "vision_projection",
    "text_projection": "text_projection",
    "itm_head": "itm_head",
}
HF_INSTRUCT: NameTable = {
    **_HF_COMMON,
    "qformer.embedding_norm": "qformer.embeddings.layernorm",
    "qformer.word_embeddings": "qformer.embeddings.word_embeddings",
    "qformer.position_embeddings": "qformer.embeddings.position_embeddings",
    "language_projection": "language_projection",
}

TIMM_VIT_TO_HF: NameTable = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "blocks.N.norm1": "encoder.layers.N.layer_norm1",
    "blocks.N.attn.qkv": "encoder.layers.N.self_attn.qkv",
    "blocks.N.attn.proj": "encoder.layers.N.self_attn.projection",
    "blocks.N.norm2": "encoder.layers.N.layer_norm2",
    "blocks.N.mlp.fc1": "encoder.layers.N.mlp.fc1",
    "blocks.N.mlp.fc2": "encoder.layers.N.mlp.fc2",
}


def layout_name(name: str, table: NameTable) -> str | None:
    """A tensor's name in a layout; None where the layout has no place for it."""
    number = re.search(r"\.(\d+)\.", name)
    pattern = name if number is None else f"{name[: number.start()]}.N.{name[number.end() :]}"
    suffix = ""
    if pattern not in table:
        pattern, dot, last = pattern.rpartition(".")
        suffix = dot + last
    if pattern not in table:
        return None
    return (table[pattern] if number is None else table[pattern].replace(".N.", f".{number[1]}.")) + suffix


def to_layout(weights: Mapping[str, Tensor], table: NameTable) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Rename this package's tensors.

    Returns:
        Tensors under the layout's names, and those without a place in it under their own names.
    """
    named = {name: layout_name(name, table) for name in weights}
    placed = {other: weights[own] for own, other in named.items() if other is not None}
    return placed, {own: weights[own] for own, other in named.items() if other is None}


def from_layout(
    weights: Mapping[str, Tensor], names: Iterable[str], table: NameTable
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Take tensors out of a layout's.

    Args:
        weights: Tensors under the layout's names.
        names: Wanted tensors, by this package's names.
        table: Names of the layout.

    Returns:
        Tensors found, under this package's names, and the remaining ones under the layout's.
    """
    rest = dict(weights)
    found = {}
    for name in names:
        other = layout_name(name, table)
        if other in rest:
            found[name] = rest.pop(other)
    return found, rest
