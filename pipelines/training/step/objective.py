"""The loss terms of a step as one objective: fixed weights, or weights that training learns."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


class Objective:
    """Adds weighted loss terms up, runs their backward, and keeps what the terms were.

    Args:
        terms: Names of the losses, in a fixed order.
        weights: Factor of each; 1 where there is none. A term of weight 0 has no gradient and is only reported.
        is_learned: Divide each term by a learned variance (Kendall et al., arXiv:1705.07115, section 3): the objective
            is the sum of exp(-s) * loss + s / 2 over the terms, with one s, the logarithm of the variance, a term.

    Attributes:
        log_variances: Every s, zeros at first; None where weights are fixed. For the optimizer.
        scale: What the sum is multiplied with before its backward; 1 but for fp16.
    """

    def __init__(self, terms: Sequence[str], weights: Mapping[str, float], *, is_learned: bool = False) -> None:
        self._terms, self._weights = tuple(terms), {name: weights.get(name, 1.0) for name in terms}
        self.log_variances = nn.Parameter(torch.zeros(len(terms))) if is_learned else None
        self.scale = 1.0

    def backward(self, terms: Mapping[str, Tensor], link: Tensor | None = None) -> None:
        """Add the gradient of some terms, and of what is linked to terms that had their backward before."""
        factors = self._factors()
        parts = [factors[name] * self.scale * value for name, value in terms.items() if factors[name] != 0.0]
        if link is not None:
            parts.append(link)
        if parts:
            torch.stack(parts).sum().backward()

    def total(self, terms: Mapping[str, float]) -> float:
        """The objective's value."""
        factors = self._factors()
        regulariser = 0.0 if self.log_variances is None else 0.5 * float(self.log_variances.detach().sum())
        return sum(factors[name] * value for name, value in terms.items() if factors[name] != 0.0) + regulariser

    def fixed_total(self, terms: Mapping[str, float]) -> float:
        """The terms under their fixed weights alone, by which models are compared whatever the learned ones are."""
        return sum(self._weights[name] * value for name, value in terms.items() if self._weights[name] != 0.0)

    def is_silent(self, name: str) -> bool:
        """Whether a term has no gradient."""
        return self._weights[name] == 0.0

    def learn(self, terms: Mapping[str, float]) -> None:
        """Set the gradient of the learned variances.

        Args:
            terms: Means over all ranks, so that every rank learns the same.
        """
        if self.log_variances is None:
            return
        factors = self._factors()
        gradient = [0.5 - factors[name] * terms[name] if self._weights[name] else 0.0 for name in self._terms]
        self.log_variances.grad = torch.tensor(gradient)

    def learned_weights(self) -> dict[str, float]:
        """Factors by term where they are learned, for the log."""
        return {} if self.log_variances is None else self._factors()

    def _factors(self) -> dict[str, float]:
        if self.log_variances is None:
            return self._weights
        precisions = (-self.log_variances.detach()).exp().tolist()
        return {name: self._weights[name] * one for name, one in zip(self._terms, precisions, strict=True)}
