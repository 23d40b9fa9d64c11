"""AdamW with the paper's parameter groups, warm-up and cosine (BLIP-2, arXiv:2301.12597, section 3.4)."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, distributed, nn

from qformer.distributed import world_size

_BUCKET_BYTES = 32 * 1024**2


def parameter_groups(trainables: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Decay matrices, query tokens and the 0-dimensional temperature, but no vectors: as LAVIS does."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in trainables.named_parameters():
        if parameter.requires_grad:
            (plain if parameter.ndim == 1 or name.endswith("bias") else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def build_optimizer(
    trainables: nn.Module, *, weight_decay: float, betas: tuple[float, float], extra: Sequence[nn.Parameter] = ()
) -> torch.optim.AdamW:
    """AdamW whose learning rate is set anew every step by `learning_rate`; `extra` parameters are not decayed."""
    groups = parameter_groups(trainables, weight_decay)
    if extra:
        groups.append({"params": list(extra), "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)


def learning_rate(step: int, *, peak: float, minimum: float, warmup_steps: int, total_steps: int) -> float:
    """Rate of step `step` (0-based): linear warm-up to `peak`, then half a cosine down to `minimum`."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return minimum + (peak - minimum) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def average_gradients(trainables: nn.Module) -> None:
    """What DDP does in its backward, for steps that go without it: means over ranks in place of every gradient."""
    if world_size() == 1:
        return
    gradients = [p.grad for p in trainables.parameters() if p.grad is not None]
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        distributed.all_reduce(flat)
        parts = (flat / world_size()).split([gradient.numel() for gradient in bucket])
        torch._foreach_copy_(bucket, [part.view_as(gradient) for part, gradient in zip(parts, bucket, strict=True)])


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for gradient in gradients:
        bucket.append(gradient)
        if sum(one.nbytes for one in bucket) >= _BUCKET_BYTES:
            yield bucket
            bucket = []
    if bucket:
        yield bucket
