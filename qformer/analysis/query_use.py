"""Which queries of a Q-Former depend on the image.

A query is dead if its output is the same for every image, and so carries no information. This definition holds in both
stages, needs no training signal and no forward pass of its own. The measure is the spread: how much a query's output
changes when its image is replaced by another sample's and the text stays (an instruction changes outputs, too),
relative to the output's length,

    spread = sqrt(mean |output - output of the other image|^2 / 2 / mean |output|^2),

which for unrelated images is the standard deviation over images. Below `DEAD_SPREAD` it is within bf16 rounding.

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
    """Spread of each query."""

    @property
    def has_collapsed(self) -> bool:
        """Whether all queries have the same output."""
        return self.cosine >= COLLAPSED

    @property
    def dead(self) -> list[int]:
        """Queries with the same output for every image."""
        return [query for query, spread in enumerate(self.spread) if not spread >= DEAD_SPREAD]


@dataclass(slots=True)
class QueryStatistics:
    """Statistics of query outputs, added up over batches."""

    _change_Q: Tensor | None = None
    _length_Q: Tensor | None = None
    _cosines: list[Tensor] = field(default_factory=list)

    def add(self, own_GQD: Tensor, other_GQD: Tensor) -> None:
        """Add the outputs of some frames.

        Args:
            own_GQD: Query outputs with the sample's own image.
            other_GQD: Query outputs with another sample's image.
        """
        own, other = own_GQD.double(), other_GQD.double()
        change_Q = (own - other).square().sum(dim=(0, 2)).cpu() / 2
        length_Q = own.square().sum(dim=(0, 2)).cpu()
        self._change_Q = change_Q if self._change_Q is None else self._change_Q + change_Q
        self._length_Q = length_Q if self._length_Q is None else self._length_Q + length_Q
        self._cosines.append(mean_cosine(own_GQD).cpu())

    def figures(self) -> QueryFigures | None:
        """Figures of all added outputs; None without any."""
        if self._change_Q is None or self._length_Q is None:
            return None
        spread_Q = (self._change_Q / self._length_Q.clamp(min=1e-30)).sqrt()
        cosine = float(torch.cat(self._cosines).mean())
        return QueryFigures(num_queries=len(spread_Q), cosine=cosine, spread=spread_Q.tolist())
