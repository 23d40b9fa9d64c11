"""Guards a run against bad steps: a step without finite gradient changes nothing, and spikes are reported."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from pipelines.training.step.ranks import of_all_ranks
from qformer.errors import UserError

_SPIKE_FACTOR = 10.0
"""Times the mean norm that counts as a spike."""
_SPIKE_AFTER = 50
"""Steps that the mean is made of before anything is a spike: norms fall fast at first."""
_MAX_SPIKES_IN_A_ROW = 10
"""More are no spikes: the norm has risen for good."""
_MEMORY = 0.98
"""Decay of the running mean of log norms."""


class DivergedError(UserError):
    """The run has diverged, or its features have; every rank raises it at the same step."""


class StepGuard:
    """Looks at the gradient norm of every step, which is the same on all ranks.

    Args:
        max_bad_steps: So many steps in a row without a finite gradient end the run.
        report: Called on the first rank with what became of a bad step; goes to the run's bad_steps.jsonl.
        alarm: Called on the first rank with a line for the user.

    Attributes:
        num_bad: Steps left out so far.
        num_spikes: Steps whose gradient, clipped, was far above the others'.
    """

    def __init__(
        self, max_bad_steps: int, report: Callable[[dict[str, Any]], None], alarm: Callable[[str], None]
    ) -> None:
        self._max_bad_steps, self._report, self._alarm = max_bad_steps, report, alarm
        self._in_a_row = self._spikes_in_a_row = self.num_bad = self.num_spikes = self._num_norms = 0
        self._mean_log = 0.0

    def admits(self, step: int, norm: float, losses: Mapping[str, Tensor], sample_ids: list[str]) -> bool:
        """Whether the step may change the weights; every rank must ask.

        Args:
            step: 0-based.
            norm: Gradient norm before clipping.
            losses: Terms on this rank, by name.
            sample_ids: Samples of this rank.

        Raises:
            DivergedError: If there were too many bad steps in a row.
        """
        if math.isfinite(norm):
            self._in_a_row = 0
            self._watch(step, norm, sample_ids)
            return True
        terms = ", ".join(f"{name} {float(value.detach()):.4g}" for name, value in losses.items())
        self.leave_out(step, f"gradient norm is {norm} ({terms})", sample_ids)
        return False

    def leave_out(self, step: int, reason: str, sample_ids: list[str]) -> None:
        """Tell that a step changes nothing; every rank must call.

        Raises:
            DivergedError: If too many steps in a row were bad.
        """
        self.num_bad += 1
        self._in_a_row += 1
        ids = of_all_ranks([name for name in sample_ids if name])
        self._report({"step": step, "reason": reason, "sample_ids": ids})
        if self._in_a_row >= self._max_bad_steps:
            raise DivergedError(
                f"{reason} at step {step}, the {self._in_a_row}. bad step in a row; samples {ids[:8]}; lower "
                "optim.learning_rate, or look at the samples in bad_steps.jsonl"
            )
        self._alarm(f"ALARM step {step} is left out: {reason}; samples {ids[:8]}")

    def _watch(self, step: int, norm: float, sample_ids: list[str]) -> None:
        log_norm = math.log(max(norm, 1e-30))
        is_spike = self._num_norms >= _SPIKE_AFTER and log_norm > self._mean_log + math.log(_SPIKE_FACTOR)
        self._spikes_in_a_row = self._spikes_in_a_row + 1 if is_spike else 0
        if self._spikes_in_a_row > _MAX_SPIKES_IN_A_ROW:
            self._num_norms = self._spikes_in_a_row = 0  # that is what is usual now
        elif is_spike:
            self.num_spikes += 1
            ids = of_all_ranks([name for name in sample_ids if name])
            self._alarm(
                f"gradient norm {norm:.3g} at step {step}, more than {_SPIKE_FACTOR:g} times the usual "
                f"{math.exp(self._mean_log):.3g}; it is clipped; samples {ids[:8]}"
            )
            return  # a spike is no part of what is usual
        memory = min(_MEMORY, self._num_norms / (self._num_norms + 1))
        self._mean_log = memory * self._mean_log + (1 - memory) * log_norm
        self._num_norms += 1
