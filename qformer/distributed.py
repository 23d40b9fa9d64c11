"""Collectives that also work in one process without a process group."""

import hashlib
from typing import Any

import torch
from torch import Tensor, distributed


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return distributed.get_rank() if world_size() > 1 else 0


def stream_seed(stream: str, seed: int, step: int) -> int:
    """Seed of one stream of randomness ("dropout", "negatives") at one step of a run on this rank."""
    return int(hashlib.sha256(f"{stream}/{seed}/{step}/{rank()}".encode()).hexdigest()[:15], 16)


class _GatherWithGradient(torch.autograd.Function):
    """Concatenate over ranks; the backward sums every rank's gradient of this rank's rows."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, local: Tensor) -> Tensor:
        return _all_gather(local)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        summed = grad.clone(memory_format=torch.contiguous_format)  # autograd may have given `grad` to others too
        distributed.all_reduce(summed)
        return summed.chunk(world_size())[rank()]


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
    return _all_gather(local)


class _AllToAll(torch.autograd.Function):
    """Send rows to the ranks that requested them; the backward returns their gradients."""

    @staticmethod
    def forward(ctx: Any, rows_SX: Tensor, send_counts: list[int], receive_counts: list[int]) -> Tensor:
        ctx.counts = (send_counts, receive_counts)
        return _all_to_all(rows_SX, send_counts, receive_counts)

    @staticmethod
    def backward(ctx: Any, grad_MX: Tensor) -> tuple[Tensor, None, None]:
        send_counts, receive_counts = ctx.counts
        return _all_to_all(grad_MX, receive_counts, send_counts), None, None


def fetch_rows(local_BX: Tensor, index_E: Tensor) -> tuple[Tensor, Tensor]:
    """Fetch chosen rows of the joined batch from the ranks that own them, with gradient; no other rows are sent.

    Every rank must call it, with equally many local rows and equally many indexes.

    Args:
        local_BX: This rank's rows, [B, ...].
        index_E: Indexes of the requested rows among all ranks' rows in rank order.

    Returns:
        fetched_MX, the requested rows of other ranks, each once; and each index's position in [local rows; fetched].
    """
    if world_size() == 1:
        return local_BX[:0], index_E
    size, own = local_BX.shape[0], rank()
    wanted_WE = gather(index_E, with_gradient=False).view(world_size(), -1)

    def requested_rows(of: int, by: int) -> Tensor:
        """Rows of one rank that another one requests, ascending, so that both sides have the same order."""
        wanted = wanted_WE[by]
        return wanted[(wanted // size == of) & (of != by)].unique()

    sent = [requested_rows(own, by) for by in range(world_size())]
    received = [requested_rows(of, own) for of in range(world_size())]
    sent_SX = local_BX.index_select(0, torch.cat(sent) - own * size)
    fetched_MX = _AllToAll.apply(sent_SX, [len(rows) for rows in sent], [len(rows) for rows in received])
    # Owners are in rank order and their rows ascending, so the fetched indexes are sorted.
    place_E = size + torch.searchsorted(torch.cat(received), index_E)
    return fetched_MX, torch.where(index_E // size == own, index_E - own * size, place_E)


def _all_gather(local: Tensor) -> Tensor:
    parts = [torch.empty_like(local) for _ in range(world_size())]
    distributed.all_gather(parts, local.contiguous())
    return torch.cat(parts)


def _all_to_all(rows_SX: Tensor, send_counts: list[int], receive_counts: list[int]) -> Tensor:
    received = rows_SX.new_empty(sum(receive_counts), *rows_SX.shape[1:])
    distributed.all_to_all_single(received, rows_SX.contiguous(), receive_counts, send_counts)
    return received


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
    """Mean over ranks of one value, for logs. Runs on the CPU backend."""
    figure = torch.tensor(value, dtype=torch.float64)
    if world_size() > 1:
        distributed.all_reduce(figure)
    return float(figure) / world_size()


def any_text(text: str | None) -> str | None:
    """The first text that any rank has, or None; every rank must call it."""
    texts: list[str | None] = [text]
    if world_size() > 1:
        texts = [None] * world_size()
        distributed.all_gather_object(texts, text)
    return next((found for found in texts if found is not None), None)
