"""The residual connection and the LayerNorm behind it.

1. Forward: summed = residual + x, rounded to the model's dtype, and its norm: by torch, or with `exact=False` in one
   kernel, where a program takes whole rows: it adds up the mean, then the squares around it, then writes the sum and
   its norm, each time from x and residual, which the cache holds.
2. Backward: that of layer_norm.py, which adds c_summed in the same pass, for x and residual alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lxt.triton_kernels.launch import launch, rows
from lxt.triton_kernels.layer_norm import backward, statistics
from lxt.triton_kernels.rms_norm import tile

__all__ = ["add_layer_norm"]


@triton.jit
def _sum(x, residual, i, inside):
    """The sum of rows as the model rounds it, in float32; both have its dtype."""
    a = tl.load(x[:, None] + i[None, :], mask=inside, other=0.0).to(tl.float32)
    b = tl.load(residual[:, None] + i[None, :], mask=inside, other=0.0).to(tl.float32)
    return (b + a).to(x.dtype.element_ty).to(tl.float32)


@triton.jit
def forward_kernel(
    y,
    summed,
    rstd,
    x,
    residual,
    weight,
    bias,
    stride,
    residual_stride,
    count,
    hidden,
    eps,
    WEIGHTED: tl.constexpr,
    BIASED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < count
    x_row = x + row * stride
    residual_row = residual + row * residual_stride
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, hidden, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = exists[:, None] & (i < hidden)[None, :]
        total += _sum(x_row, residual_row, i, inside)
    mean = tl.sum(total, 1) / hidden
    squares = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, hidden, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = exists[:, None] & (i < hidden)[None, :]
        h = _sum(x_row, residual_row, i, inside) - mean[:, None]
        squares += tl.where(inside, h * h, 0.0)
    r = tl.rsqrt(tl.sum(squares, 1) / hidden + eps)
    tl.store(rstd + row, r, mask=exists)
    for start in range(0, hidden, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = exists[:, None] & (i < hidden)[None, :]
        h = _sum(x_row, residual_row, i, inside)
        out = row[:, None] * hidden + i[None, :]
        tl.store(summed + out, h.to(summed.dtype.element_ty), mask=inside)
        normed = (h - mean[:, None]) * r[:, None]
        if WEIGHTED:
            normed *= tl.load(weight + i, mask=i < hidden, other=0.0).to(tl.float32)[None, :]
        if BIASED:
            normed += tl.load(bias + i, mask=i < hidden, other=0.0).to(tl.float32)[None, :]
        tl.store(y + out, normed.to(y.dtype.element_ty), mask=inside)


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        shape: Sequence[int],
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        exact: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)  # behind the last norm nobody reads the sum
        ctx.hidden, ctx.dtypes = math.prod(shape), (x.dtype, residual.dtype)
        if exact or not _is_simple(x, residual, weight, bias):
            summed = residual + x
            y, rstd = statistics(summed, shape, weight, bias, eps)
        else:
            y, summed, rstd = _forward(x, residual, ctx.hidden, weight, bias, eps)
        ctx.save_for_backward(rstd, weight)
        return y, summed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, c_normed: Tensor | None, c_summed: Tensor | None) -> tuple[Tensor | None, ...]:
        c = c_summed
        if c_normed is not None:
            rstd, weight = ctx.saved_tensors
            c = backward(c_normed, rstd, weight, ctx.hidden, torch.promote_types(*ctx.dtypes), c_summed)
        return *(c if c is None else c.to(dtype) for dtype in ctx.dtypes), None, None, None, None, None


def _is_simple(*tensors: Tensor | None) -> bool:
    """Whether the output's dtype is that of all; torch alone knows what it makes of mixtures, and under autocast."""
    given = [x for x in tensors if x is not None]
    return len({x.dtype for x in given}) == 1 and not torch.is_autocast_enabled(given[0].device.type)


def _forward(
    x: Tensor, residual: Tensor, hidden: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm, the sum and 1/sigma, by one kernel."""
    h, beside = (rows(a if a.shape[-1] == hidden else a.reshape(a.numel() // hidden, hidden)) for a in (x, residual))
    y, summed = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    rstd = torch.empty(len(h), dtype=torch.float32, device=x.device)
    size, block = tile(hidden, 2)
    constants = {"WEIGHTED": weight is not None, "BIASED": bias is not None, "ROWS": size, "BLOCK": block}
    affine = [h if a is None else a.contiguous() for a in (weight, bias)]
    arguments = [y, summed, rstd, h, beside, *affine, h.stride(0), beside.stride(0), len(h), hidden, eps]
    launch(forward_kernel, lambda meta: [triton.cdiv(len(h), meta["ROWS"])], arguments, constants)
    return y, summed, rstd


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    exact: bool = True,
) -> tuple[Tensor, Tensor]:
    """The twin of lxt.rules.add_layer_norm.

    Args:
        x: [..., *normalized_shape]
        residual: of the same shape.
        normalized_shape: of the last dimensions, over which mean and variance go.
        weight: of that shape, as `bias`.
        bias: added in the end.
        eps: added to the variance.
        exact: whether the output must be the model's to the last bit.
    """
    return _AddLayerNorm.apply(x, residual, normalized_shape, weight, bias, eps, exact)
