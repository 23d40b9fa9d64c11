"""What a run's figures mean: chance levels beside the losses, and an alarm when queries collapse."""

import math
from collections.abc import Callable, Iterable

from qformer.analysis.queries import COLLAPSED

ITM_CHANCE = math.log(3) - 2 / 3 * math.log(2)
"""0.637: the entropy of one matching pair to two that do not match."""


def chance_levels(terms: Iterable[str], num_samples: int) -> dict[str, float]:
    """Losses of a model that ignores the image, as far as they are known.

    Args:
        terms: Names of the loss terms.
        num_samples: Valid ones of a global batch.
    """
    levels = {"itc": math.log(max(1, num_samples)), "itm": ITM_CHANCE if num_samples > 1 else 0.0}
    return {name: levels[name] for name in terms if name in levels}


class QueryWatch:
    """Says once when query outputs have become alike, and again after they had parted.

    Args:
        alarm: Called on the first rank with a line for the user.
    """

    def __init__(self, alarm: Callable[[str], None]) -> None:
        self._alarm, self._has_collapsed = alarm, False

    def see(self, cosine: float, step: int) -> None:
        """Look at the mean pairwise cosine of a step's query outputs."""
        has_collapsed = cosine >= COLLAPSED
        if has_collapsed and not self._has_collapsed:
            self._alarm(
                f"ALARM step {step}: the queries have collapsed (mean pairwise cosine {cosine:.2f}, at most "
                f"{COLLAPSED:g} is healthy); lower optim.learning_rate, or set optim.loss_weights.diversity to 0.1"
            )
        self._has_collapsed = has_collapsed
