"""LAVIS' parameter names for ours, to load recorded weights and compare recorded gradients."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.qformer.conversion.test_vision import write_timm_folder

LANGUAGE = ("opt_model.", "t5_model.")

RENAMES = [
    (r"^temp$", "temperature"),
    (r"^ln_vision\.", "vision_norm."),
    (r"^vision_proj\.", "vision_projection."),
    (r"^text_proj\.", "text_projection."),
    (r"^(opt|t5)_proj\.", "language_projection."),
    (r"^query_tokens$", "qformer.query_tokens"),
    (r"^Qformer\.bert\.embeddings\.LayerNorm\.", "qformer.embedding_norm."),
    (r"^Qformer\.bert\.embeddings\.", "qformer."),
    (r"^Qformer\.cls\.predictions\.transform\.dense\.", "qformer.lm_dense."),
    (r"^Qformer\.cls\.predictions\.transform\.LayerNorm\.", "qformer.lm_norm."),
    (r"^Qformer\.cls\.predictions\.bias$", "qformer.lm_bias"),
    (r"^Qformer\.bert\.encoder\.layer\.", "qformer.layers."),
    (r"\.crossattention\.", ".cross_attention."),
    (r"attention\.self\.", "attention."),
    (r"attention\.output\.dense\.", "attention.output."),
    (r"attention\.output\.LayerNorm\.", "attention.norm."),
    (r"\.intermediate_query\.dense\.", ".query_ffn.up."),
    (r"\.output_query\.dense\.", ".query_ffn.down."),
    (r"\.output_query\.LayerNorm\.", ".query_ffn.norm."),
    (r"\.intermediate\.dense\.", ".text_ffn.up."),
    (r"(layers\.\d+)\.output\.dense\.", r"\1.text_ffn.down."),
    (r"(layers\.\d+)\.output\.LayerNorm\.", r"\1.text_ffn.norm."),
]


def our_name(name: str) -> str:
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def our_weights(file: Path) -> dict[str, torch.Tensor]:
    """Recorded weights under our names, without buffers, the tied decoder and the language model."""
    weights = load_file(file)
    left_out = ("position_ids", "predictions.decoder.weight", "predictions.decoder.bias")
    return {our_name(k): v for k, v in weights.items() if not k.endswith(left_out) and not k.startswith(LANGUAGE)}


def facts(goldens_dir: Path, name: str) -> dict[str, Any]:
    """What a recording's sidecar says of its model."""
    return json.loads((goldens_dir / f"{name}.json").read_text())["config"]


def write_encoder(folder, width, **model_args):
    """LAVIS' kind of encoder, `width` wide."""
    return write_timm_folder(folder, "eva_giant_patch14_224", embed_dim=width, num_heads=1, **model_args)


def write_tokenizer(folder, num_words):
    """BERT's kind; [DEC] comes after its words."""
    from transformers import BertTokenizerFast

    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(5, num_words))]
    (folder / "vocab.txt").write_text("\n".join(words))
    made = BertTokenizerFast(vocab=str(folder / "vocab.txt"))
    assert len(made) == num_words
    made.save_pretrained(folder)
    return str(folder)
