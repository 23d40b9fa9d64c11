"""Gradient caching: a stage-1 step over more samples than fit, with the gradient of one large batch.

Pass 1 embeds a few samples at a time and keeps no graph; ITC over all ranks' embeddings gives the gradient of each
embedding. Pass 2 runs every few samples again with a graph, starts its backward from those gradients, and adds ITM, ITG
and the bridge's own terms, whose sums need no other samples. Dropout and the bridge draw in pass 2 what they drew in
pass 1. Negative images of other ranks are fetched as the frozen encoder made them: no gradient travels for them.

Dimensions: those of `qformer.objectives.stage1`, and C samples of a pass.
Reference: Gao et al. (arXiv:2101.06983), section 3.
"""

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qformer.backbones import require_finite
from qformer.bridges.protocol import BridgeInput
from qformer.bridges.reading import PassBlock, Passes, Term
from qformer.distributed import fetch_rows, gather, mean_over_ranks
from qformer.objectives import Negatives
from qformer.objectives.losses import DIVERSITY
from qformer.objectives.stage1 import ImageEncoding, NegativePairs, Stage1, Stage1Batch, Stage1Losses, negative_text

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
) -> Stage1Losses:
    """Add the gradient of a whole local batch to the trainables'; every rank must call.

    Args:
        stage1: Not in DDP: the caller averages the gradients over ranks afterwards.
        batch: Inputs of `Stage1.forward`.
        micro_batch: Most samples that have a graph at a time.
        noise_key: Key of the step's randomness.
        backward: Weighs terms and runs their backward.
        autocast: Context of the forward computations.
        negatives: Pairs to use instead of drawn ones.

    Returns:
        What `Stage1.forward` gives, without gradient.

    Raises:
        ValueError: If the batch does not fit the model, or its features hold NaN or infinity.
    """
    stage1.check(batch)
    require_finite(batch.image_BFPV, batch.is_valid_B, batch.sample_ids)
    parts = [slice(start, start + micro_batch) for start in range(0, len(batch.is_valid_B), micro_batch)]
    with torch.no_grad(), autocast():
        first = [_embed(stage1, _rows(batch, part), noise_key) for part in parts]
    queries_BNE = torch.cat([one.queries_CNE for one in first]).requires_grad_()
    text_BE = torch.cat([one.text_CE for one in first]).requires_grad_()
    with autocast():
        itc, drawn = stage1.contrast(batch, queries_BNE, text_BE, noise_key)
    itc_mean = mean_over_ranks(*itc)
    backward({"itc": itc_mean}, None)
    chosen = negatives or drawn
    rows, shares = _NegativeRows(stage1, batch, chosen, noise_key), _shares(batch, chosen, first)
    sums = {name: torch.zeros_like(itc_mean) for name in shares}
    for part, one in zip(parts, first, strict=True):
        with autocast():
            image, own_text_CE, terms = _again(stage1, _rows(batch, part), one.state, rows.of(stage1, part), noise_key)
        weighted = {name: term.total * shares[name] for name, term in terms.items()}
        link = _linked((image.queries_BNE, queries_BNE.grad), (own_text_CE, text_BE.grad), part=part)
        backward(weighted, link)
        sums = {name: sums[name] + value.detach() for name, value in weighted.items()}
    return Stage1Losses({"itc": itc_mean.detach(), **sums}, _joined([one.passes for one in first]))


class _Embedded(NamedTuple):
    """What pass 1 keeps of C samples. Keys and values are not among it: they are what does not fit."""

    state: tuple[Tensor, Tensor | None]
    """State of the random generators before."""
    queries_CNE: Tensor
    text_CE: Tensor
    passes: Passes
    counts: dict[str, Tensor]
    """Items of the bridge's own terms."""


def _embed(stage1: Stage1, some: Stage1Batch, noise_key: int) -> _Embedded:
    """Pass 1."""
    state = _random_state(some.image_BFPV.device)
    image, text_CE = stage1.encode(some, stage1.given(some, noise_key))
    counts = {name: term.num_items for name, term in image.reading.terms.items()}
    return _Embedded(state, image.queries_BNE, text_CE, image.reading.passes, counts)


def _again(
    stage1: Stage1,
    some: Stage1Batch,
    state: tuple[Tensor, Tensor | None],
    negatives: NegativePairs,
    noise_key: int,
) -> tuple[ImageEncoding, Tensor, dict[str, Term]]:
    """Pass 2: the same samples with the same draws, and every term that needs no others' embeddings."""
    device, given = some.image_BFPV.device, stage1.given(some, noise_key)
    before = _random_state(device)
    _set_random_state(state, device)
    image, text_CE = stage1.encode(some, given)
    _set_random_state(before, device)
    return image, text_CE, stage1.local_terms(some, given, image, negatives)


def _linked(*pairs: tuple[Tensor, Tensor | None], part: slice) -> Tensor | None:
    """A scalar whose gradient with respect to some rows' embeddings is the one that ITC left; None where it left none.

    Args:
        pairs: Embeddings of the rows with their graph, and the gradient of all rows' embeddings.
        part: The rows.
    """
    links = [(embedded * gradient[part]).sum() for embedded, gradient in pairs if gradient is not None]
    return torch.stack(links).sum() if links else None


def _shares(batch: Stage1Batch, negatives: Negatives, first: list[_Embedded]) -> dict[str, Tensor]:
    """What turns sums over some rows of this rank into shares of the means over all ranks' rows."""
    valid_B = batch.is_valid_B
    counts = {
        "itm": (valid_B.long() * (1 + 2 * negatives.has_negative_B)).sum(),
        "itg": (batch.is_text_BT[:, 1:].bool() & valid_B[:, None]).sum(),
        DIVERSITY: valid_B.sum(),
        **{name: torch.stack([one.counts[name] for one in first]).sum() for name in first[0].counts},
    }
    one = torch.ones((), device=valid_B.device)
    return {name: mean_over_ranks(one, count) for name, count in counts.items()}


def _joined(parts: list[Passes]) -> Passes:
    """The passes of all samples."""
    blocks, masks = [block for part in parts for block in part.blocks], [part.frame_mask for part in parts]
    is_frame_BF = None if masks[0] is None else torch.cat([mask for mask in masks if mask is not None])
    block = PassBlock(sum(one.clips for one in blocks), blocks[0].frames, is_frame_BF=is_frame_BF)
    return Passes(torch.cat([part.hidden_GQD for part in parts]), (block,))


class _NegativeRows:
    """The negatives of the local batch, for some of its rows at a time."""

    def __init__(self, stage1: Stage1, batch: Stage1Batch, negatives: Negatives, noise_key: int) -> None:
        given = stage1.given(batch, noise_key)
        fetched_MFPV, self._place_B = fetch_rows(given.tokens_BFPV, negatives.image_B)
        frames = given.is_frame_BF
        self._is_frame_BF = None if frames is None else gather(frames, with_gradient=False)[negatives.image_B]
        self._tokens = torch.cat([given.tokens_BFPV, fetched_MFPV])
        self._text, self._has_negative_B = negative_text(batch, negatives), negatives.has_negative_B
        self._noise_key = noise_key

    def of(self, stage1: Stage1, part: slice) -> NegativePairs:
        """Those of some rows."""
        is_frame_CF = None if self._is_frame_BF is None else self._is_frame_BF[part]
        given = BridgeInput(self._tokens[self._place_B[part]], is_frame_CF, draw=self._noise_key)
        keys = stage1.bridge.keys(stage1.bridge.perceive(given))
        return NegativePairs(keys, self._text.rows(part), self._has_negative_B[part])


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
