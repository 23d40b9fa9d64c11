"""A Q-Former starts from any Hugging Face BERT, with or without its masked-LM head.

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
    """Start a Q-Former from a BERT: query feed-forwards are copies of the text ones.

    Queries and cross-attention have no counterpart and stay as initialised, as does the row of [DEC], which BERT's
    vocabulary lacks. BERT's token types are left out, as in LAVIS.

    Args:
        qformer: Freshly initialised; a text branch's vocabulary is BERT's with [DEC] at its end.
        name: Hub name or folder of a BERT with or without its masked-LM head.
        allow_mismatch: See `load_matching`.

    Raises:
        UserError: If it is no BERT, or of another shape.
    """
    config, (bert, theirs_by_name, has_lm_head) = qformer.config, _load_bert(name)
    for setting, mine, theirs in (
        ("num_heads", config.num_heads, bert.num_attention_heads),
        ("layer_norm_eps", config.layer_norm_eps, bert.layer_norm_eps),
        ("activation", "gelu", bert.hidden_act),
    ):
        if mine != theirs:
            raise UserError(
                f"{_SETTING}: {name!r} has {setting}={theirs} but the Q-Former {setting}={mine}; set "
                f"model.qformer.{setting} to the same, or choose another BERT"
            )
    if config.has_text_branch and config.vocab_size != bert.vocab_size + 1 and not allow_mismatch:
        raise UserError(
            f"{_SETTING}: {name!r} has {bert.vocab_size} ids but model.tokenizer {config.vocab_size - 1} "
            "(and [DEC]); set model.tokenizer to this BERT's own"
        )
    weights = {_our_name(key): tensor for key, tensor in theirs_by_name.items() if ".decoder." not in key}
    _append_row(weights, "word_embeddings.weight", INITIAL_STD)
    _append_row(weights, "lm_bias", 0.0)
    own = qformer.state_dict()
    for key in [key for key in own if ".query_ffn." in key]:
        # Those of every kind of queries, where each has its own.
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
        model, told = bert_class.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    except UserError:
        raise
    except Exception as error:
        raise model_error(_SETTING, name, error, []) from error
    # What the files lack, the library fills with random values: they are not the BERT's.
    weights = {key: tensor for key, tensor in model.state_dict().items() if key not in told["missing_keys"]}
    return config, weights, has_lm_head


def _our_name(name: str) -> str:
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _append_row(weights: dict[str, Tensor], name: str, std: float) -> None:
    """One more row, for [DEC]."""
    if name in weights:
        old = weights[name]
        weights[name] = torch.cat([old, std * torch.randn(1, *old.shape[1:], dtype=old.dtype)])
