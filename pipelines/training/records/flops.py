"""Floating-point operations of the training, and their share of the device's peak (MFU)."""

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
"""Dense 16-bit tensor-core peak as the vendor states it, by a part of the device's name; longer names first."""

_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CPU_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _FlopCounter(TorchDispatchMode):
    """Sums the operations that run inside its context.

    Torch's own `FlopCounterMode` also tracks modules, which fails with several backward passes in one step, and it does
    not count attention on the CPU.
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
    """Counts the operations of a rank's steps: frozen encoder, backward pass, and recomputation that saves memory.

    Steps of one shape count alike. Each shape is counted in one additional step: counting decomposes operations, which
    rounds differently from a training step.

    Args:
        device: Device of the training.

    Attributes:
        total: Operations so far; a multiply-add counts as two.
    """

    def __init__(self, device: torch.device) -> None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self._peak = next((1e12 * peak for part, peak in PEAK_TFLOPS.items() if part in name), None)
        self._by_shape: dict[tuple[int, ...], int] = {}
        self.total = 0.0

    def add(self, shape: tuple[int, ...], step: Callable[[], object]) -> None:
        """Count one step.

        Args:
            shape: Shape of the step's pixels or features.
            step: Function that computes a step of this shape and changes nothing; called once a shape.
        """
        if shape not in self._by_shape:
            # Compiled layers hide their operations; for this step they run eagerly.
            with torch.compiler.set_stance("force_eager"), _FlopCounter() as counter:
                step()
            self._by_shape[shape] = counter.total
        self.total += self._by_shape[shape]

    def figures(self, flops: float, elapsed_s: float) -> dict[str, float]:
        """Metrics of `flops` operations in `elapsed_s`: their rate, and the MFU where the device's peak is known."""
        rate = flops / elapsed_s
        return {"tflops_per_s": rate / 1e12} | ({} if self._peak is None else {"mfu": rate / self._peak})
