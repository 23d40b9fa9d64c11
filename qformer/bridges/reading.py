"""What a bridge gives back: query outputs, and losses of its own.

Dimensions: B batch, F frames, S sets of queries, Q queries of a set, D bridge width, G query passes (a clip's, or those
of its frames), R image-text pairs.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qformer.attention import KeyValue
from qformer.bridges.frames import mean_over_frames


class PassBlock(NamedTuple):
    """Passes in the order clip, frame, text."""

    clips: int
    frames: int
    texts: int = 1
    """Texts that each clip is read with."""
    is_frame_BF: Tensor | None = None
    """False at padding frames, whose passes count for nothing."""

    @property
    def num_passes(self) -> int:
        """Passes of the queries in all."""
        return self.clips * self.frames * self.texts


class Passes(NamedTuple):
    """Query outputs as they were computed, one set of queries a pass."""

    hidden_GQD: Tensor
    blocks: tuple[PassBlock, ...]
    is_query_GQ: Tensor | None = None
    """False at queries that were dropped; None: none was."""

    @property
    def frame_mask(self) -> Tensor | None:
        """False at passes over padding frames, [B, F]; of passes without texts, which are one block."""
        (block,) = self.blocks
        return block.is_frame_BF

    def mean(self, values_GQX: Tensor) -> Tensor:
        """Mean over the queries, then over each pair's real frames: [R, X], pairs in the order clip, text."""
        parts = mean_over_frames(values_GQX, self.is_query_GQ).split([block.num_passes for block in self.blocks])
        means = [
            mean_over_frames(part_GX.unflatten(0, block[:3]), block.is_frame_BF).flatten(0, 1)
            for part_GX, block in zip(parts, self.blocks, strict=True)
        ]
        return means[0] if len(means) == 1 else torch.cat(means)


class Term(NamedTuple):
    """A loss as a sum over this rank's items and their number, which is made a mean over all ranks'."""

    total: Tensor
    num_items: Tensor


class Reading(NamedTuple):
    """What a bridge makes of clips."""

    hidden_BSQD: Tensor
    """Query outputs as they are read further, in S sets: of every frame where frames stay apart, else one."""
    is_read_BSQ: Tensor | None
    """False at outputs that readers must leave out: those of padding frames, and queries that were dropped; every clip
    has some that are read. None: all are."""
    passes: Passes
    """The same outputs before any pooling, for those who watch and match them."""
    cache: Sequence[KeyValue] = ()
    """What `TextBridge.decode_text` reads."""
    terms: Mapping[str, Term] = {}
    """The losses that `BaseBridgeConfig.term_names` names."""
