"""An image's Q-Former becomes the beginning of one that reads clips.

cascaded: it reads the frames; the second Q-Former begins anew, as in Video-LLaMA.
spatio_temporal: its weights are the shared ones, its queries' feed-forward begins every kind's (the paper), and its
queries are the first of every kind that has as many (our choice; the others begin anew).
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from qformer.bridges.clip_reader import ClipReader
from qformer.bridges.config import JOINED
from qformer.conversion.checkpoint import BridgeInfo
from qformer.errors import UserError

_FRAMES, _OWN, _FFN, _QUERIES = "frames.", "qformer.", ".query_ffn.", "query_tokens"
_TEXT = (".text_ffn.", "word_embeddings.", "position_embeddings.", "lm_dense.", "lm_norm.", "lm_bias")


class ClipStart(NamedTuple):
    """Weights by the names of a model that reads clips."""

    weights: dict[str, Tensor]
    new: list[str]
    """Names of the model that the source cannot have."""
    dropped: list[str]
    """Parts of the source's names that the model has no place for."""


def clip_start(module: ClipReader, weights: Mapping[str, Tensor], info: BridgeInfo, *, source: str) -> ClipStart:
    """Rename a checkpoint's weights.

    Args:
        module: That they start.
        weights: Of the checkpoint.
        info: Of the checkpoint.
        source: What to call it.

    Raises:
        UserError: If frames are joined in another way there.
    """
    theirs, ours = info.video.temporal, module.video.temporal
    if theirs == ours or (theirs not in JOINED and ours not in JOINED):
        return ClipStart(dict(weights), [], [])
    if theirs in JOINED:
        raise UserError(
            f"init_from: {source} joins frames by temporal={theirs!r}, which does not start temporal={ours!r}; set "
            f"model.temporal={theirs}, or start from a run that keeps frames apart (concatenate or mean)"
        )
    return _cascaded(module, weights) if ours == "cascaded" else spatio_temporal_start(module, weights)


def spatio_temporal_start(module: ClipReader, weights: Mapping[str, Tensor]) -> ClipStart:
    """Weights of an image's Q-Former for the spatio-temporal one; see above."""
    started = {name: tensor for name, tensor in weights.items() if _FFN not in name and not name.endswith(_QUERIES)}
    sizes = module.video.group_sizes
    for name in weights.keys() - started.keys():
        if _FFN in name:
            before, after = name.split(_FFN)
            started |= {f"{before}{_FFN}experts.{kind}.{after}": weights[name] for kind in range(len(sizes))}
        else:
            own = module.qformer.query_tokens.detach().split(sizes, dim=1)
            theirs = weights[name]
            started[name] = torch.cat([theirs if part.shape == theirs.shape else part for part in own], dim=1)
    return ClipStart(started, [name for name in module.state_dict() if name.startswith(_FRAMES)], [])


def _cascaded(module: ClipReader, weights: Mapping[str, Tensor]) -> ClipStart:
    renamed = {f"{_FRAMES}{name}" if name.startswith(_OWN) else name: tensor for name, tensor in weights.items()}
    new = [name for name in module.state_dict() if name.startswith((_OWN, f"{_FRAMES}positions."))]
    return ClipStart(renamed, new, list(_TEXT))
