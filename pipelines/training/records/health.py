"""Health of a run: chance levels of the losses, and a warning when the queries collapse."""

import math
from collections.abc import Callable, Iterable

from qformer.analysis.queries import COLLAPSED

ITM_CHANCE = math.log(3) - 2 / 3 * math.log(2)
"""0.637: entropy of the ITM labels, one matching pair to two others."""


def chance_levels(terms: Iterable[str], num_samples: int) -> dict[str, float]:
    """Losses of a model that ignores the image, for the terms where they are known.

    Args:
        terms: Names of the loss terms.
        num_samples: Number of valid samples in a global batch.
    """
    levels = {"itc": math.log(max(1, num_samples)), "itm": ITM_CHANCE if num_samples > 1 else 0.0}
    return {name: levels[name] for name in terms if name in levels}


class QueryCollapseMonitor:
    """Warns once when the query outputs have become alike, and again only after they had recovered.

    Args:
        warn: Callback on the first rank that takes a warning for the user.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn, self._has_collapsed = warn, False

    def update(self, cosine: float, step: int) -> None:
        """Check the query outputs of one step.

        Args:
            cosine: Mean pairwise cosine of the query outputs.
            step: Steps done.
        """
        has_collapsed = cosine >= COLLAPSED
        if has_collapsed and not self._has_collapsed:
            self._warn(
                f"ALARM step {step}: the queries have collapsed (mean pairwise cosine {cosine:.2f}, at most "
                f"{COLLAPSED:g} is healthy); lower optim.learning_rate, or set optim.loss_weights.diversity to 0.1"
            )
        self._has_collapsed = has_collapsed
