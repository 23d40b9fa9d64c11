"""How many floating-point operations training does, and what share of the device's peak that is (MFU)."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

PEAK_TFLOPS = {
    "B200": 2250,
    "H200": 989,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "A10G": 70,
    "T4": 65,
}
"""Dense 16-bit tensor-core peak by a part of the device's name, as its makers state it; longer names first."""

_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CPU_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _Counter(TorchDispatchMode):
    """Adds operations up as they run.

    Torch's own `FlopCounterMode` also follows modules, which several backward passes in one step confuse, and it passes
    attention on the CPU by.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet is _CPU_ATTENTION:
            self.total += sdpa_flop_count(*(tensor.shape for tensor in args[:3]))
        elif packet is _CPU_ATTENTION_BACKWARD:
            self.total += sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4]))
        elif packet in flop_registry:
            self.total += flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        return result


class StepFlops:
    """Counts the operations of a rank's steps: frozen encoder, backward pass, and what saving memory computes twice.

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
            with torch.compiler.set_stance("force_eager"), _Counter() as counter:
                step()
            self._by_shape[shape] = counter.total
        self.total += self._by_shape[shape]

    def figures(self, flops: float, elapsed_s: float) -> dict[str, float]:
        """Rate of `flops` operations, and MFU where the device's peak is known."""
        rate = flops / elapsed_s
        return {"tflops_per_s": rate / 1e12} | ({} if self._peak is None else {"mfu": rate / self._peak})
