"""Gradient caching: a stage-1 step over more samples than fit, with the gradient of one large batch.

Pass 1 embeds a few samples at a time and keeps no graph; ITC over all ranks' embeddings gives the gradient of each
embedding. Pass 2 runs every few samples again with a graph, starts its backward from those gradients, and adds ITM and
ITG, whose sums need no other samples. Dropout draws in pass 2 what it drew in pass 1.
Negative images of other ranks are fetched as the frozen encoder made them, so that no gradient travels for them.

Dimensions: those of `qformer.objectives.stage1`, and C samples of a pass.
Reference: Gao et al. (arXiv:2101.06983), section 3.
"""

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qformer.analysis.queries import diversity_loss
from qformer.backbones import require_finite
from qformer.distributed import fetch_rows, gather, mean_over_ranks
from qformer.objectives import Negatives
from qformer.objectives.stage1 import Encoded, Others, Stage1, Stage1Batch

Backward = Callable[[dict[str, Tensor], Tensor | None], None]
"""Takes named terms of the objective and what is to be added to their weighted sum, and runs the sum's backward."""


def cached_losses(
    stage1: Stage1,
    batch: Stage1Batch,
    *,
    micro_batch: int,
    noise_key: int,
    backward: Backward,
    autocast: Callable[[], AbstractContextManager[Any]],
    negatives: Negatives | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Add the gradient of a whole local batch to the trainables'; every rank must call.

    Args:
        stage1: Not in DDP: the caller averages the gradients over ranks afterwards.
        batch: As for `Stage1.forward`.
        micro_batch: Most samples that have a graph at a time.
        noise_key: As for `Stage1.forward`.
        backward: See `Backward`.
        autocast: Context of the forward computations.
        negatives: As for `Stage1.forward`.

    Returns:
        The terms "itc", "itm", "itg" and "diversity", as `Stage1.forward` and `diversity_loss` give them, and the query
        outputs hidden_GQD, all without gradient.

    Raises:
        ValueError: As there.
    """
    stage1.check(batch)
    require_finite(batch.image_BFPV, batch.is_valid_B, batch.sample_ids)
    parts = [slice(start, start + micro_batch) for start in range(0, len(batch.is_valid_B), micro_batch)]
    with torch.no_grad(), autocast():
        first = [_embed(stage1, _rows(batch, part)) for part in parts]
    queries_BQE = torch.cat([one.queries_CQE for one in first]).requires_grad_()
    text_BE = torch.cat([one.text_CE for one in first]).requires_grad_()
    with autocast():
        itc, drawn = stage1.contrast(batch, queries_BQE, text_BE, noise_key)
    backward({"itc": itc}, None)
    others, shares = _OtherRows(batch, negatives or drawn), _shares(batch, negatives or drawn)
    sums = {name: torch.zeros_like(itc) for name in shares}
    for part, one in zip(parts, first, strict=True):
        with autocast():
            encoded, terms = _again(stage1, _rows(batch, part), one.state, others.of(stage1, part))
        weighted = {name: total * shares[name] for name, (total, _) in terms.items()}
        backward(weighted, _linked((encoded.queries_BQE, queries_BQE.grad), (encoded.text_BE, text_BE.grad), part=part))
        sums = {name: sums[name] + value.detach() for name, value in weighted.items()}
    return {"itc": itc.detach(), **sums}, torch.cat([one.hidden_GQD for one in first])


class _Embedded(NamedTuple):
    """What pass 1 keeps of C samples. Keys and values are not among it: they are what does not fit."""

    state: tuple[Tensor, Tensor | None]
    """Of the random generators before."""
    queries_CQE: Tensor
    text_CE: Tensor
    hidden_GQD: Tensor


def _embed(stage1: Stage1, some: Stage1Batch) -> _Embedded:
    """Pass 1."""
    state = _random_state(some.image_BFPV.device)
    encoded = stage1.encode(some)
    return _Embedded(state, encoded.queries_BQE, encoded.text_BE, encoded.hidden_GQD)


def _again(
    stage1: Stage1, some: Stage1Batch, state: tuple[Tensor, Tensor | None], others: Others
) -> tuple[Encoded, dict[str, tuple[Tensor, Tensor]]]:
    """Pass 2: the same samples with the same draws, and what needs no others' embeddings, as sums and counts."""
    device = some.image_BFPV.device
    before = _random_state(device)
    _set_random_state(state, device)
    encoded = stage1.encode(some)
    _set_random_state(before, device)
    terms = {
        "itm": stage1.match(some, encoded, others),
        "itg": stage1.caption(some, encoded),
        "diversity": diversity_loss(encoded.hidden_GQD, some.is_valid_B, encoded.seen.is_frame_BF),
    }
    return encoded, terms


def _linked(*pairs: tuple[Tensor, Tensor | None], part: slice) -> Tensor | None:
    """A scalar whose gradient with respect to some rows' embeddings is the one that ITC left; None where it left none.

    Args:
        pairs: Embeddings of the rows with their graph, and the gradient of all rows' embeddings.
        part: The rows.
    """
    links = [(embedded * gradient[part]).sum() for embedded, gradient in pairs if gradient is not None]
    return torch.stack(links).sum() if links else None


def _shares(batch: Stage1Batch, negatives: Negatives) -> dict[str, Tensor]:
    """What turns sums over some rows of this rank into shares of the means over all ranks' rows."""
    valid_B = batch.is_valid_B
    counts = {
        "itm": (valid_B.long() * (1 + 2 * negatives.has_negative_B)).sum(),
        "itg": (batch.is_text_BT[:, 1:].bool() & valid_B[:, None]).sum(),
        "diversity": valid_B.sum(),
    }
    one = torch.ones((), device=valid_B.device)
    return {name: mean_over_ranks(one, count) for name, count in counts.items()}


class _OtherRows:
    """The negatives of the local batch, for some of its rows at a time."""

    def __init__(self, batch: Stage1Batch, negatives: Negatives) -> None:
        image_BFPV = batch.image_BFPV.masked_fill(~batch.is_valid_B[:, None, None, None], 0.0)
        fetched_MFPV, self._place_B = fetch_rows(image_BFPV, negatives.image_B)
        frames = batch.is_frame_BF
        self._is_frame_BF = None if frames is None else gather(frames, with_gradient=False)[negatives.image_B]
        self._tokens = torch.cat([image_BFPV, fetched_MFPV])
        self._ids_BT = gather(batch.input_ids_BT, with_gradient=False)[negatives.text_B]
        self._is_text_BT = gather(batch.is_text_BT, with_gradient=False)[negatives.text_B]
        self._has_negative_B = negatives.has_negative_B

    def of(self, stage1: Stage1, part: slice) -> Others:
        """Those of some rows."""
        is_frame_CF = None if self._is_frame_BF is None else self._is_frame_BF[part]
        seen = stage1.perceive(self._tokens[self._place_B[part]], is_frame_CF)
        return Others(
            image=stage1.qformer.image_key_values(seen.tokens_BFPV.flatten(0, 1)),
            is_image=seen.is_token,
            is_frame_BF=seen.is_frame_BF,
            input_ids_BT=self._ids_BT[part],
            is_text_BT=self._is_text_BT[part],
            has_negative_B=self._has_negative_B[part],
        )


def _rows(batch: Stage1Batch, part: slice) -> Stage1Batch:
    values = {one.name: getattr(batch, one.name) for one in dataclasses.fields(batch)}
    some: dict[str, Any] = {name: value if value is None else value[part] for name, value in values.items()}
    return Stage1Batch(**some)


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
