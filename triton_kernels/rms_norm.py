"""RMSNorm with 1/sigma as a constant (AttnLRP, arXiv 2402.05602, Prop. 3.4): y = x / sigma * weight.

 1. 1/sigma = rsqrt(mean(x^2) + eps) of each row, in float32. By torch, so that it is the model's to the last bit; with
    `exact=False` by the kernel, which adds in another order and spares torch's passes over x.
 2. One pass scales the row, with the casts of the architecture: they can't change a bit, as only products remain.
 3. Backward: c_x = c_y * weight / sigma in one pass over c_y; only 1/sigma was saved.
A program takes several short rows (the norms of queries and keys) or a part of a long one.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lxt.triton_kernels.launch import launch, rows

__all__ = ["rms_norm", "tile"]

TILE = 2048  # numbers per program of 4 warps: 16 per thread, two or four 16-byte loads


def tile(hidden: int) -> tuple[int, int]:
    """(rows, columns) of a program."""
    columns = min(max(triton.next_power_of_2(hidden), 16), TILE)
    return TILE // columns, columns


@triton.jit
def forward_kernel(
    y,
    rstd,
    x,
    weight,
    stride,
    count,
    hidden,
    eps,
    STYLE: tl.constexpr,
    GIVEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """GIVEN: 1/sigma was computed already."""
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
            squares += h * h
        r = tl.rsqrt(tl.sum(squares, 1) / hidden + eps)
        tl.store(rstd + row, r, mask=exists)
    for start in range(0, hidden, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = exists[:, None] & (i < hidden)[None, :]
        h = tl.load(x + row[:, None] * stride + i[None, :], mask=inside, other=0.0).to(tl.float32)
        w = tl.load(weight + i, mask=i < hidden, other=0.0)
        normed = h * r[:, None]
        if STYLE == "gemma":
            result = normed * (1.0 + w.to(tl.float32))[None, :]
        elif STYLE == "llama":
            result = normed.to(x.dtype.element_ty).to(tl.float32) * w.to(tl.float32)[None, :]
        elif weight.dtype.element_ty == tl.float32:
            result = normed * w[None, :]
        else:
            result = normed.to(weight.dtype.element_ty).to(tl.float32) * w.to(tl.float32)[None, :]
        tl.store(y + row[:, None] * hidden + i[None, :], result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    c_x, c_y, rstd, weight, stride, count, hidden, STYLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
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
    tl.store(c_x + row[:, None] * hidden + i[None, :], (scaled * r[:, None]).to(c_x.dtype.element_ty), mask=inside)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, style: Literal["llama", "gemma", "t5"], exact: bool
    ) -> Tensor:
        h = rows(x)
        if exact:
            rstd = torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + eps).contiguous()
        else:
            rstd = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
        y = torch.empty(x.shape, dtype=_output_dtype(x, weight, style), device=x.device)
        size, block = tile(h.shape[1])
        constants = {"STYLE": style, "GIVEN": exact, "ROWS": size, "BLOCK": block}
        arguments = [y, rstd, h, weight.contiguous(), h.stride(0), len(h), h.shape[1], eps]
        launch(forward_kernel, [triton.cdiv(len(h), size)], arguments, constants)
        ctx.style = style
        ctx.save_for_backward(rstd, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, c_y: Tensor) -> tuple[Tensor, None, None, None, None]:
        rstd, weight = ctx.saved_tensors
        c = rows(c_y)
        c_x = torch.empty(c_y.shape, dtype=c_y.dtype, device=c_y.device)
        size, block = tile(c.shape[1])
        constants = {"STYLE": ctx.style, "ROWS": size, "BLOCK": block}
        arguments = [c_x, c, rstd, weight.contiguous(), c.stride(0), len(c), c.shape[1]]
        launch(backward_kernel, [triton.cdiv(len(c), size), triton.cdiv(c.shape[1], block)], arguments, constants)
        return c_x, None, None, None, None


def _output_dtype(x: Tensor, weight: Tensor, style: str) -> torch.dtype:
    if style == "gemma":
        return x.dtype
    return torch.promote_types(x.dtype, weight.dtype) if style == "llama" else weight.dtype


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    style: Literal["llama", "gemma", "t5"] = "llama",
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
