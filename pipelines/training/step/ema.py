"""Exponential moving average of the trainables: what is saved for use, while the raw weights go on training."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


class Ema:
    """Average after each step: average = decay * average + (1 - decay) * weights.

    Args:
        trainables: Whose parameters are followed; buffers and frozen parameters stay as they are.
        decay: Between 0 and 1. The first steps use (1 + steps) / (10 + steps) where that is smaller, so that the
            random start is soon forgotten.
    """

    def __init__(self, trainables: nn.Module, decay: float) -> None:
        self._decay = decay
        self._live = {name: p for name, p in trainables.named_parameters() if p.requires_grad}
        self._average = {name: p.detach().clone() for name, p in self._live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step` (0-based)."""
        weight = 1.0 - min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self._average.values()), list(self._live.values()), weight)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The trainables hold the averages inside the block, and their own weights after it."""
        own = {name: p.detach().clone() for name, p in self._live.items()}
        self._copy(self._average)
        try:
            yield
        finally:
            self._copy(own)

    @torch.no_grad()
    def _copy(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in self._live.items():
            parameter.copy_(weights[name])

    def over(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of the trainables with the averages in place of what they follow."""
        return {**weights, **self._average}

    @torch.no_grad()
    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """Go on from averages that were saved; a state dict of the trainables."""
        for name, average in self._average.items():
            average.copy_(weights[name])
