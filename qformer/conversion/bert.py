"""Initialisation of a Q-Former from any Hugging Face BERT, with or without its masked-LM head.

Reference: BLIP-2 (arXiv:2301.12597), section 3.1; LAVIS `blip2.py` (`init_Qformer`).
"""

import re
from typing import Any

import torch
from torch import Tensor

from qformer.backbones import model_error
from qformer.conversion.initialisation import TEXT_BRANCH, load_matching
from qformer.conversion.report import LoadReport
from qformer.errors import UserError
from qformer.model import INITIAL_STD, QFormer
from qformer.torch_build.torchvision import import_torchvision

_SETTING = "model.qformer_init"
_EXPERT = re.compile(r"\.query_ffn\.(experts\.\d+\.)?")
_NAMES = (
    (r"^bert\.", ""),
    (r"^embeddings\.LayerNorm\.", "embedding_norm."),
    (r"^embeddings\.", ""),
    (r"^encoder\.layer\.", "layers."),
    (r"\.attention\.self\.", ".attention."),
    (r"\.attention\.output\.dense\.", ".attention.output."),
    (r"\.attention\.output\.LayerNorm\.", ".attention.norm."),
    (r"\.intermediate\.dense\.", ".text_ffn.up."),
    (r"^(layers\.\d+)\.output\.dense\.", r"\1.text_ffn.down."),
    (r"^(layers\.\d+)\.output\.LayerNorm\.", r"\1.text_ffn.norm."),
    (r"^cls\.predictions\.transform\.dense\.", "lm_dense."),
    (r"^cls\.predictions\.transform\.LayerNorm\.", "lm_norm."),
    (r"^cls\.predictions\.bias$", "lm_bias"),
)


def start_from_bert(qformer: QFormer, name: str, *, allow_mismatch: bool = False) -> LoadReport:
    """Initialise a Q-Former from a BERT; query feed-forwards become copies of the text ones.

    Queries, cross-attention and the embedding of [DEC] have no counterpart in BERT and keep their initial values.
    BERT's token types are not loaded, as in LAVIS.

    Args:
        qformer: Newly initialised Q-Former; a text branch's vocabulary is BERT's with [DEC] at its end.
        name: Hub name or folder of a BERT with or without its masked-LM head.
        allow_mismatch: Whether mismatched tensors are initialised or skipped instead of refused.

    Raises:
        UserError: If the model is no BERT, or its shapes differ from the Q-Former's.
    """
    config, (bert, bert_weights, has_lm_head) = qformer.config, _load_bert(name)
    for setting, own_value, bert_value in (
        ("num_heads", config.num_heads, bert.num_attention_heads),
        ("layer_norm_eps", config.layer_norm_eps, bert.layer_norm_eps),
        ("activation", "gelu", bert.hidden_act),
    ):
        if own_value != bert_value:
            raise UserError(
                f"{_SETTING}: {name!r} has {setting}={bert_value} but the Q-Former {setting}={own_value}; set "
                f"model.qformer.{setting} to the same, or choose another BERT"
            )
    if config.has_text_branch and config.vocab_size != bert.vocab_size + 1 and not allow_mismatch:
        raise UserError(
            f"{_SETTING}: {name!r} has {bert.vocab_size} ids but model.tokenizer {config.vocab_size - 1} "
            "(and [DEC]); set model.tokenizer to this BERT's own"
        )
    weights = {_qformer_name(key): tensor for key, tensor in bert_weights.items() if ".decoder." not in key}
    _append_row(weights, "word_embeddings.weight", INITIAL_STD)
    _append_row(weights, "lm_bias", 0.0)
    own = qformer.state_dict()
    for key in [key for key in own if ".query_ffn." in key]:
        # Feed-forwards of every query group, where each has its own.
        if (source := _EXPERT.sub(".text_ffn.", key)) in weights:
            weights[key] = weights[source].clone()
    new = ["query_tokens", ".cross_attention."]
    if config.has_lm_head and not has_lm_head:
        new += ["lm_dense.", "lm_norm.", "lm_bias"]
    dropped = ["token_type_embeddings.", "pooler.", "cls.seq_relationship.", "lm_dense.", "lm_norm.", "lm_bias"]
    if not config.has_text_branch:
        dropped += TEXT_BRANCH
    return load_matching(
        qformer, weights, source=f"BERT {name!r}", new=new, dropped=dropped, allow_mismatch=allow_mismatch
    )


def _load_bert(name: str) -> tuple[Any, dict[str, Tensor], bool]:
    """A BERT's config, the tensors that its files hold, and whether the masked-LM head is among them."""
    import_torchvision()
    from transformers import AutoConfig, BertForMaskedLM, BertModel

    try:
        config = AutoConfig.from_pretrained(name)
        if config.model_type != "bert":
            raise UserError(f"{_SETTING}: {name!r} is a {config.model_type}; only a BERT has a Q-Former's shape")
        has_lm_head = (config.architectures or ["BertModel"])[0] in ("BertForMaskedLM", "BertForPreTraining")
        bert_class = BertForMaskedLM if has_lm_head else BertModel
        model, loading = bert_class.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    except UserError:
        raise
    except Exception as error:
        raise model_error(_SETTING, name, error, []) from error
    # transformers fills tensors that the files lack with random values; those are not the BERT's.
    weights = {key: tensor for key, tensor in model.state_dict().items() if key not in loading["missing_keys"]}
    return config, weights, has_lm_head


def _qformer_name(name: str) -> str:
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _append_row(weights: dict[str, Tensor], name: str, std: float) -> None:
    """Append a row of random values for [DEC], with standard deviation `std`."""
    if name in weights:
        old = weights[name]
        weights[name] = torch.cat([old, std * torch.randn(1, *old.shape[1:], dtype=old.dtype)])
