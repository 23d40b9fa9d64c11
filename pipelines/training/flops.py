"""How many floating-point operations training does, and what share of the device's peak that is (MFU)."""

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

PEAK_TFLOPS = {"B200": 2250, "H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10G": 70, "T4": 65}
"""Dense 16-bit tensor-core peak by a part of the device's name, as its makers state it; longer names first."""


class StepFlops:
    """Counts the operations of a rank's steps, frozen encoder and backward pass among them.

    Steps of one shape are taken as equal. For each shape a step is done once more for the count alone: operations are
    counted where they are taken apart, which rounds otherwise than a training step does.

    Args:
        device: That computes.

    Attributes:
        total: Operations so far, a multiply-add as two.
    """

    def __init__(self, device: torch.device) -> None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self._peak = next((1e12 * peak for part, peak in PEAK_TFLOPS.items() if part in name), None)
        self._by_shape: dict[tuple[int, ...], int] = {}
        self.total = 0.0

    def add(self, shape: tuple[int, ...], step: Callable[[], object]) -> None:
        """Count a step over pixels or features of this shape; `step` does one like it, without consequences."""
        if shape not in self._by_shape:
            # Compiled layers show no operations; for this step they run as they were written.
            with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
                step()
            self._by_shape[shape] = counter.get_total_flops()
        self.total += self._by_shape[shape]

    def figures(self, flops: float, elapsed_s: float) -> dict[str, float]:
        """Rate of `flops` operations, and MFU where the device's peak is known."""
        rate = flops / elapsed_s
        return {"tflops_per_s": rate / 1e12} | ({} if self._peak is None else {"mfu": rate / self._peak})
