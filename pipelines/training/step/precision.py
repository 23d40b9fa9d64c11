"""In what numbers a run computes: fp32, bf16, or fp16 with a loss scale."""

import contextlib
import math
from typing import Any, Literal

import torch

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_SMALLEST_SCALE = 1.0
"""A gradient that is not finite at this scale is not finite by itself."""

PrecisionName = Literal["fp32", "bf16", "fp16"]


class Precision:
    """Autocast of the forward computations and, in fp16, the loss scale. Trainables are fp32 in all of them.

    Args:
        name: "fp32", "bf16" or "fp16".
        device: Device of the trainables.

    Attributes:
        num_overflows: Steps left out because scaled gradients overflowed; each halves the scale.
    """

    def __init__(self, name: PrecisionName, device: torch.device) -> None:
        self._device, self._dtype = device, DTYPES[name]
        self._scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")
        self._scaler.scale(torch.zeros((), device=device))  # which makes its tensors
        self.num_overflows = 0

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Context of the forward computations."""
        return contextlib.nullcontext() if self._dtype is None else torch.autocast(self._device.type, self._dtype)

    @property
    def scale(self) -> float:
        """What the objective is multiplied with."""
        return self._scaler.get_scale()

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """After the backward: gradients as they are without scale."""
        if self._scaler.is_enabled():
            self._scaler.unscale_(optimizer)

    def overflowed(self, gradient_norm: float, *, has_finite_losses: bool) -> bool:
        """Whether the scale, and not the step itself, is to blame for a norm that is not finite; adapts the scale."""
        if not self._scaler.is_enabled():
            return False
        is_overflow = has_finite_losses and not math.isfinite(gradient_norm) and self.scale > _SMALLEST_SCALE
        self.num_overflows += is_overflow
        self._scaler.update()
        return is_overflow

    def figures(self) -> dict[str, float]:
        """For the log."""
        return {"loss_scale": self.scale, "overflows": float(self.num_overflows)} if self._scaler.is_enabled() else {}

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return self._scaler.state_dict()

    def restore(self, state: dict[str, Any]) -> None:
        """Inverse of `state`; one of another precision is left alone."""
        if self._scaler.is_enabled() and state:
            self._scaler.load_state_dict(state)
