"""Collectives that also work in one process without a process group."""

import torch
from torch import Tensor, distributed


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return distributed.get_rank() if world_size() > 1 else 0


class _GatherWithGradient(torch.autograd.Function):
    """Concatenate over ranks; the backward sums every rank's gradient of this rank's rows."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, local: Tensor) -> Tensor:
        parts = [torch.empty_like(local) for _ in range(world_size())]
        distributed.all_gather(parts, local.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        distributed.all_reduce(grad)
        return grad.chunk(world_size())[rank()]


def gather(local: Tensor, *, with_gradient: bool) -> Tensor:
    """Rows of all ranks in rank order; every rank must hold equally many.

    Args:
        local: This rank's rows, [B, ...].
        with_gradient: Whether gradients flow back to the rank each row came from.

    Returns:
        [world * B, ...]; without gradient the result is detached, also in one process.
    """
    if not with_gradient:
        local = local.detach()
    if world_size() == 1:
        return local
    if with_gradient and local.requires_grad:
        return _GatherWithGradient.apply(local)
    parts = [torch.empty_like(local) for _ in range(world_size())]
    distributed.all_gather(parts, local.contiguous())
    return torch.cat(parts)


def mean_over_ranks(total: Tensor, count: Tensor) -> Tensor:
    """Share of this rank in the global mean, so that averaging gradients over ranks yields the joined batch's.

    Args:
        total: Sum over this rank's valid items.
        count: Number of them.

    Returns:
        `total * world / global count`; 0 when no rank has a valid item.
    """
    global_count = count.detach().to(total.dtype).clone()
    if world_size() > 1:
        distributed.all_reduce(global_count)
    return total * world_size() / global_count.clamp(min=1.0)


def mean_of_ranks(value: float) -> float:
    """Mean of a per-rank figure, for logs. Runs on the CPU backend."""
    figure = torch.tensor(value, dtype=torch.float64)
    if world_size() > 1:
        distributed.all_reduce(figure)
    return float(figure) / world_size()
