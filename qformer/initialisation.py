"""Where trainables start from: a BERT, or another stage's checkpoint; nothing is left out or made up in silence."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from qformer.backbones import load_bert
from qformer.bridge import read_info, read_weights
from qformer.errors import UserError
from qformer.model import INITIAL_STD, QFormer
from qformer.stage2 import Stage2

_BERT_NAMES = (
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
_TEXT_BRANCH = (".text_ffn.", "word_embeddings.", "position_embeddings.")
_STAGE1_ONLY = (
    "lm_dense.",
    "lm_norm.",
    "lm_bias",
    "vision_projection.",
    "text_projection.",
    "itm_head.",
    "temperature",
)
_LANGUAGE_SIDE = ("language_projection.", "lora.")


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What became of every tensor of the model and of its source."""

    source: str
    loaded: list[str]
    reinitialised: list[str]
    """In the model only, as the change of stage implies: initialised anew."""
    missing: list[str] = field(default_factory=list)
    """In the model only though the source should have them, or of another shape: initialised anew on request."""
    unexpected: list[str] = field(default_factory=list)
    """In the source only: left out."""

    def __str__(self) -> str:
        parts = [
            f"{what} {len(names)} tensors{_groups(names)}"
            for what, names in (
                ("loaded", self.loaded),
                ("re-initialised", self.reinitialised),
                ("missing", self.missing),
                ("unexpected", self.unexpected),
            )
        ]
        return f"from {self.source}: {'; '.join(parts)}"


def load_matching(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    *,
    source: str,
    new: Sequence[str] = (),
    dropped: Sequence[str] = (),
    allow_mismatch: bool = False,
) -> LoadReport:
    """Load what fits by name and shape, and refuse any other difference.

    Args:
        module: Receives the weights.
        weights: By the module's names.
        source: What to call their origin.
        new: Parts of names that the module has beyond the source.
        dropped: Parts of names that the source has beyond the module.
        allow_mismatch: Initialise anew what does not fit, and leave out what has no place, instead of refusing.

    Raises:
        UserError: On a difference outside `new` and `dropped`, naming the first of each kind.
    """
    own = module.state_dict()
    resized = sorted(n for n in own.keys() & weights.keys() if own[n].shape != weights[n].shape)
    absent = sorted(own.keys() - weights.keys())
    missing = [name for name in absent if not _has_part(name, new)]
    unexpected = sorted(weights.keys() - own.keys())
    surprises = [name for name in unexpected if not _has_part(name, dropped)]
    if not allow_mismatch and (resized or missing or surprises):
        told = [f"{n} is {tuple(weights[n].shape)} there but {tuple(own[n].shape)} here" for n in resized[:1]]
        told += [f"{len(missing)} tensors are missing there, first {n}" for n in missing[:1]]
        told += [f"{len(surprises)} tensors have no place here, first {n}" for n in surprises[:1]]
        raise UserError(
            f"initialising from {source}: {'; '.join(told)}; make model.qformer, model.vision and model.tokenizer "
            "equal to the source's, or set model.init_mismatch=reinitialise"
        )
    loaded = sorted((own.keys() & weights.keys()) - set(resized))
    module.load_state_dict({name: weights[name] for name in loaded}, strict=False)
    reinitialised = [name for name in absent if _has_part(name, new)]
    return LoadReport(source, loaded, reinitialised, sorted(missing + resized), unexpected)


def start_from_bert(qformer: QFormer, name: str, *, allow_mismatch: bool = False) -> LoadReport:
    """Start a Q-Former from a BERT (BLIP-2, section 3.1): query feed-forwards are copies of the text ones.

    Queries and cross-attention have no counterpart and stay as initialised, as does the row of [DEC], which BERT's
    vocabulary lacks. BERT's token types are left out, as in LAVIS.

    Args:
        qformer: Freshly initialised; a text branch's vocabulary is BERT's with [DEC] at its end.
        name: Hub name or folder of a BERT with or without its masked-LM head.
        allow_mismatch: See `load_matching`.

    Raises:
        UserError: If it is no BERT, or of another shape.
    """
    config, bert = qformer.config, load_bert(name)
    for setting, mine, theirs in (
        ("num_heads", config.num_heads, bert.num_heads),
        ("layer_norm_eps", config.layer_norm_eps, bert.layer_norm_eps),
        ("activation", "gelu", bert.activation),
    ):
        if mine != theirs:
            raise UserError(
                f"model.qformer_init: {name!r} has {setting}={theirs} but the Q-Former {setting}={mine}; set "
                f"model.qformer.{setting} to the same, or choose another BERT"
            )
    weights = {_bert_name(key): tensor for key, tensor in bert.weights.items() if ".decoder." not in key}
    if config.has_text_branch and config.vocab_size != bert.vocab_size + 1 and not allow_mismatch:
        raise UserError(
            f"model.qformer_init: {name!r} has {bert.vocab_size} ids but model.tokenizer {config.vocab_size - 1} "
            "(and [DEC]); set model.tokenizer to this BERT's own"
        )
    _append_row(weights, "word_embeddings.weight", INITIAL_STD)
    _append_row(weights, "lm_bias", 0.0)
    for key in [key for key in weights if ".text_ffn." in key]:
        weights[key.replace(".text_ffn.", ".query_ffn.")] = weights[key].clone()
    new = ["query_tokens", ".cross_attention."]
    if config.has_lm_head and not bert.has_lm_head:
        new += ["lm_dense.", "lm_norm.", "lm_bias"]
    dropped = ["token_type_embeddings.", "pooler.", "cls.seq_relationship.", "lm_dense.", "lm_norm.", "lm_bias"]
    if not config.has_text_branch:
        dropped += _TEXT_BRANCH
    return load_matching(
        qformer, weights, source=f"BERT {name!r}", new=new, dropped=dropped, allow_mismatch=allow_mismatch
    )


def start_stage2(trainables: Stage2, folder: Path, *, language: str | None, allow_mismatch: bool = False) -> LoadReport:
    """Start stage 2 from a checkpoint of stage 1 or 2.

    The projection (and LoRA) belongs to one language model: it is kept when that stays, and starts anew for another,
    as MiniGPT-4 does. A text branch that the checkpoint lacks keeps what it was initialised with.

    Args:
        trainables: Receives the weights.
        folder: The checkpoint.
        language: Language model of this run.
        allow_mismatch: See `load_matching`.

    Raises:
        UserError: If the folder is no checkpoint, or a shared tensor has another shape.
    """
    info, weights = read_info(folder), read_weights(folder)
    is_same_language = info.stage == 2 and info.language == language
    if not is_same_language:
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(_LANGUAGE_SIDE)}
    config = trainables.qformer.config
    new = ["lora."] if is_same_language else list(_LANGUAGE_SIDE)
    new += [] if info.qformer.has_text_branch else _TEXT_BRANCH
    dropped = [*(_STAGE1_ONLY if info.stage == 1 else ()), *(() if config.has_text_branch else _TEXT_BRANCH)]
    return load_matching(
        trainables, weights, source=repr(str(folder)), new=new, dropped=dropped, allow_mismatch=allow_mismatch
    )


def _bert_name(name: str) -> str:
    for pattern, replacement in _BERT_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _append_row(weights: dict[str, Tensor], name: str, std: float) -> None:
    """One more row, for [DEC]."""
    if name in weights:
        old = weights[name]
        weights[name] = torch.cat([old, std * torch.randn(1, *old.shape[1:], dtype=old.dtype)])


def _has_part(name: str, parts: Sequence[str]) -> bool:
    return any(part in f".{name}" if part.startswith(".") else part in name for part in parts)


def _groups(names: Sequence[str]) -> str:
    """What the names belong to, layers folded together: " (qformer.layers.attention, vision_norm)"."""
    groups = sorted({re.sub(r"\.\d+(?=\.|$)", "", name).rpartition(".")[0] or name for name in names})
    short = sorted({".".join(group.split(".")[:3]) for group in groups})
    return f" ({', '.join(short)})" if short else ""
