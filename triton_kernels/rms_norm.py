"""RMSNorm with 1/sigma as a constant (AttnLRP, arXiv 2402.05602, Prop. 3.4): y = x / sigma * weight.

 1. 1/sigma = rsqrt(mean(x^2) + eps) of each row, in float32. By torch, so that it is the model's to the last bit; with
    `exact=False` by the kernel, which adds in another order and spares torch's passes over x.
 2. One pass scales the row, with the casts of the architecture: they can't change a bit, as only products remain.
 3. Backward: c_x = c_y * weight / sigma in one pass over c_y; only 1/sigma was saved.
A program takes several short rows (the norms of queries and keys) or a part of a long one.
With ADDED the kernels are add_rms_norm's: the forward reads two tensors and writes their sum, too, and the backward
adds what comes beside the norm.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lxt.triton_kernels.launch import launch, rows

__all__ = ["TILE", "backward", "forward", "rms_norm", "tile"]

Style = Literal["llama", "gemma", "t5"]
TILE = 2048  # numbers per program of 4 warps: 16 per thread, two or four 16-byte loads


def tile(hidden: int, tensors: int = 1) -> tuple[int, int]:
    """(rows, columns) of a program that reads `tensors` of them at once."""
    size = TILE // tensors
    columns = min(max(triton.next_power_of_2(hidden), 16), size)
    return size // columns, columns


@triton.jit
def forward_kernel(
    y,
    summed,
    rstd,
    x,
    residual,
    weight,
    stride,
    residual_stride,
    count,
    hidden,
    eps,
    STYLE: tl.constexpr,
    GIVEN: tl.constexpr,
    ADDED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """GIVEN: 1/sigma was computed already. ADDED: the norm is of residual + x; else `summed` and `residual` are x."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < count
    if GIVEN:
        r = tl.load(rstd + row, mask=exists, other=0.0)
    else:
        squares = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(0, hidden, BLOCK):
            i = start + tl.arange(0, BLOCK)
            inside = exists[:, None] & (i < hidden)[None, :]
            h = tl.load(x + row[:, None] * stride + i[None, :], mask=inside, other=0.0).to(tl.float32)
            if ADDED:
                beside = tl.load(residual + row[:, None] * residual_stride + i[None, :], mask=inside, other=0.0)
                h = (beside.to(tl.float32) + h).to(summed.dtype.element_ty).to(tl.float32)
            squares += h * h
        r = tl.rsqrt(tl.sum(squares, 1) / hidden + eps)
        tl.store(rstd + row, r, mask=exists)
    for start in range(0, hidden, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = exists[:, None] & (i < hidden)[None, :]
        h = tl.load(x + row[:, None] * stride + i[None, :], mask=inside, other=0.0).to(tl.float32)
        if ADDED:  # again: what is in the cache needs no barrier, as reading `summed` back would
            beside = tl.load(residual + row[:, None] * residual_stride + i[None, :], mask=inside, other=0.0)
            total = (beside.to(tl.float32) + h).to(summed.dtype.element_ty)
            tl.store(summed + row[:, None] * hidden + i[None, :], total, mask=inside)
            h = total.to(tl.float32)
        w = tl.load(weight + i, mask=i < hidden, other=0.0)
        normed = h * r[:, None]
        if STYLE == "gemma":
            result = normed * (1.0 + w.to(tl.float32))[None, :]
        elif STYLE == "llama":
            result = normed.to(summed.dtype.element_ty).to(tl.float32) * w.to(tl.float32)[None, :]
        elif weight.dtype.element_ty == tl.float32:
            result = normed * w[None, :]
        else:
            result = normed.to(weight.dtype.element_ty).to(tl.float32) * w.to(tl.float32)[None, :]
        tl.store(y + row[:, None] * hidden + i[None, :], result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    c_x,
    c_y,
    c_beside,
    rstd,
    weight,
    stride,
    beside_stride,
    count,
    hidden,
    STYLE: tl.constexpr,
    ADDED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ADDED: what comes beside the norm is added before the result is rounded; else `c_beside` is c_y."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = row < count
    inside = exists[:, None] & (i < hidden)[None, :]
    c = tl.load(c_y + row[:, None] * stride + i[None, :], mask=inside, other=0.0)
    w = tl.load(weight + i, mask=i < hidden, other=0.0)
    r = tl.load(rstd + row, mask=exists, other=0.0)
    scaled = c.to(tl.float32)
    if STYLE == "gemma":
        scaled = scaled * (1.0 + w.to(tl.float32))[None, :]
    else:
        scaled = scaled * w.to(tl.float32)[None, :]
        if c.dtype == w.dtype:  # two of the same 16-bit dtype round their product to it; others meet in float32
            scaled = scaled.to(c.dtype).to(tl.float32)
    scaled *= r[:, None]
    if ADDED:
        beside = tl.load(c_beside + row[:, None] * beside_stride + i[None, :], mask=inside, other=0.0)
        scaled += beside.to(tl.float32)
    tl.store(c_x + row[:, None] * hidden + i[None, :], scaled.to(c_x.dtype.element_ty), mask=inside)


def forward(
    x: Tensor, weight: Tensor, eps: float, style: Style, exact: bool, residual: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm of x, or of residual + x; that sum (or x); 1/sigma of its rows."""
    summed, added = x, residual is not None and not exact
    if residual is not None:
        dtype = torch.promote_types(residual.dtype, x.dtype)
        summed = residual + x if exact else torch.empty(x.shape, dtype=dtype, device=x.device)
    h = rows(summed if exact else x)
    beside = rows(residual) if residual is not None and added else h
    if exact:
        rstd = torch.rsqrt(summed.to(torch.float32).pow(2).mean(-1, keepdim=True) + eps).contiguous()
    else:
        rstd = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    y = torch.empty(x.shape, dtype=_output_dtype(summed, weight, style), device=x.device)
    size, block = tile(h.shape[1], 2 if added else 1)
    constants = {"STYLE": style, "GIVEN": exact, "ADDED": added, "ROWS": size, "BLOCK": block}
    strides = [h.stride(0), beside.stride(0)]
    arguments = [y, summed if added else h, rstd, h, beside, weight.contiguous(), *strides, len(h), h.shape[1], eps]
    launch(forward_kernel, lambda meta: [triton.cdiv(len(h), meta["ROWS"])], arguments, constants)
    return y, summed, rstd


def backward(
    c_y: Tensor, rstd: Tensor, weight: Tensor, style: Style, dtype: torch.dtype, c_beside: Tensor | None = None
) -> Tensor:
    """c_y * weight / sigma, and c_beside added, in `dtype`."""
    c = rows(c_y)
    beside = c if c_beside is None else rows(c_beside)
    c_x = torch.empty(c_y.shape, dtype=dtype, device=c_y.device)
    size, block = tile(c.shape[1])
    constants = {"STYLE": style, "ADDED": c_beside is not None, "ROWS": size, "BLOCK": block}
    strides = [c.stride(0), beside.stride(0)]
    arguments = [c_x, c, beside, rstd, weight.contiguous(), *strides, len(c), c.shape[1]]
    launch(
        backward_kernel,
        lambda meta: [triton.cdiv(len(c), meta["ROWS"]), triton.cdiv(c.shape[1], meta["BLOCK"])],
        arguments,
        constants,
    )
    return c_x


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, style: Style, exact: bool) -> Tensor:
        y, _, rstd = forward(x, weight, eps, style, exact)
        ctx.style = style
        ctx.save_for_backward(rstd, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, c_y: Tensor) -> tuple[Tensor, None, None, None, None]:
        rstd, weight = ctx.saved_tensors
        return backward(c_y, rstd, weight, ctx.style, c_y.dtype), None, None, None, None


def _output_dtype(x: Tensor, weight: Tensor, style: str) -> torch.dtype:
    if style == "gemma":
        return x.dtype
    return torch.promote_types(x.dtype, weight.dtype) if style == "llama" else weight.dtype


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    style: Style = "llama",
    exact: bool = True,
) -> Tensor:
    """The twin of lxt.rules.rms_norm.

    Args:
        x: [..., hidden]
        weight: [hidden]
        eps: added to the mean of the squares.
        style: where the architecture casts.
        exact: whether the output must be the model's to the last bit.
    """
    return _RMSNorm.apply(x, weight, eps, style, exact)
