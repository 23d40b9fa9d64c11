"""Choosing rows with a backward that a GPU does fast: that of `index_select` adds number by number, atomically.

Dimensions: N rows, M chosen rows, X the rest.
"""

from typing import Any

import torch
from torch import Tensor


class _PickRows(torch.autograd.Function):
    @staticmethod
    def forward(rows_NX: Tensor, index_M: Tensor) -> Tensor:
        return rows_NX.index_select(0, index_M)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        rows_NX, index_M = inputs
        ctx.save_for_backward(index_M)
        ctx.num_rows = rows_NX.shape[0]

    @staticmethod
    def backward(ctx: Any, grad_MX: Tensor) -> tuple[Tensor, None]:
        (index_M,) = ctx.saved_tensors
        return grad_MX.new_zeros(ctx.num_rows, *grad_MX.shape[1:]).index_copy(0, index_M, grad_MX), None


class _TakeRows(_PickRows):
    @staticmethod
    def backward(ctx: Any, grad_MX: Tensor) -> tuple[Tensor, None]:
        (index_M,) = ctx.saved_tensors
        is_chosen_NM = torch.arange(ctx.num_rows, device=index_M.device)[:, None] == index_M
        return (is_chosen_NM.to(grad_MX.dtype) @ grad_MX.flatten(1)).view(ctx.num_rows, *grad_MX.shape[1:]), None


def pick_rows(rows_NX: Tensor, index_M: Tensor) -> Tensor:
    """Rows of which none is chosen twice: [M, X]."""
    picked: Tensor = _PickRows.apply(rows_NX, index_M)
    return picked


def take_rows(rows_NX: Tensor, index_M: Tensor) -> Tensor:
    """Rows of which some may be chosen several times: [M, X].

    On a GPU the backward is a product with the matrix of choices: far more operations, far less time where rows are
    few and long.
    """
    if rows_NX.device.type == "cpu":
        return rows_NX.index_select(0, index_M)
    taken: Tensor = _TakeRows.apply(rows_NX, index_M)
    return taken
