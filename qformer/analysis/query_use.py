"""Which queries of a Q-Former still carry something of the image.

A query is dead when its output is the same whatever the image: all it then tells its reader is a constant. That holds
in both stages, needs no training signal and costs no pass of its own. Measured is the spread: how far a query's output
moves when its image is exchanged for another sample's, the text staying as it is (an instruction moves outputs too),
relative to the output's length,

    spread = sqrt(mean |output - output of the other image|^2 / 2 / mean |output|^2),

which for unrelated images is the standard deviation over images. Below `DEAD_SPREAD` it is no more than what bf16 drops
on rounding.

Dimensions: G frames of several samples, Q queries, D width.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from qformer.analysis.queries import COLLAPSED, mean_cosine

DEAD_SPREAD = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class QueryFigures:
    """Health of a model's queries."""

    num_queries: int
    cosine: float
    """Mean pairwise cosine of an image's query outputs."""
    spread: list[float]
    """Of each query, as above."""

    @property
    def has_collapsed(self) -> bool:
        """Whether all queries say the same."""
        return self.cosine >= COLLAPSED

    @property
    def dead(self) -> list[int]:
        """Queries that say the same of every image."""
        return [query for query, spread in enumerate(self.spread) if not spread >= DEAD_SPREAD]


@dataclass(slots=True)
class QueryStatistics:
    """Adds up query outputs over batches."""

    _moved_Q: Tensor | None = None
    _length_Q: Tensor | None = None
    _cosines: list[Tensor] = field(default_factory=list)

    def add(self, own_GQD: Tensor, other_GQD: Tensor) -> None:
        """Take in the outputs of some frames.

        Args:
            own_GQD: With the sample's own image.
            other_GQD: With another sample's image in its place.
        """
        own, other = own_GQD.double(), other_GQD.double()
        moved_Q = (own - other).square().sum(dim=(0, 2)).cpu() / 2
        length_Q = own.square().sum(dim=(0, 2)).cpu()
        self._moved_Q = moved_Q if self._moved_Q is None else self._moved_Q + moved_Q
        self._length_Q = length_Q if self._length_Q is None else self._length_Q + length_Q
        self._cosines.append(mean_cosine(own_GQD).cpu())

    def figures(self) -> QueryFigures | None:
        """Of all that was added; None without anything."""
        if self._moved_Q is None or self._length_Q is None:
            return None
        spread_Q = (self._moved_Q / self._length_Q.clamp(min=1e-30)).sqrt()
        cosine = float(torch.cat(self._cosines).mean())
        return QueryFigures(num_queries=len(spread_Q), cosine=cosine, spread=spread_Q.tolist())
