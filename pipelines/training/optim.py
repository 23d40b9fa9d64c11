"""AdamW with the paper's parameter groups, warm-up and cosine (BLIP-2, arXiv:2301.12597, section 3.4)."""

import math

import torch
from torch import nn


def parameter_groups(trainables: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Decay matrices, query tokens and the 0-dimensional temperature, but no vectors: as LAVIS does."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in trainables.named_parameters():
        if parameter.requires_grad:
            (plain if parameter.ndim == 1 or name.endswith("bias") else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def build_optimizer(trainables: nn.Module, *, weight_decay: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW whose learning rate is set anew every step by `learning_rate`."""
    return torch.optim.AdamW(parameter_groups(trainables, weight_decay), lr=0.0, betas=betas, fused=True)


def learning_rate(step: int, *, peak: float, minimum: float, warmup_steps: int, total_steps: int) -> float:
    """Rate of step `step` (0-based): linear warm-up to `peak`, then half a cosine down to `minimum`."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return minimum + (peak - minimum) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
