"""LayerNorm with 1/sigma as a constant (AttnLRP, arXiv 2402.05602, Prop. 3.4); subtracting the mean stays linear.

1. Forward: torch's own, which is one kernel already and gives 1/sigma in float32 on a GPU.
2. Backward: c_x = (c - mean(c)) / sigma with c = c_y * weight. A program takes whole rows: the first pass adds c up in
   float32, the second reads the row again, out of the cache, and writes. With ADDED it is add_layer_norm's, and adds
   what comes beside the norm.
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
from lxt.triton_kernels.rms_norm import tile

__all__ = ["backward", "layer_norm", "statistics"]


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
    WEIGHTED: tl.constexpr,
    ADDED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ADDED: what comes beside the norm is added before the result is rounded; else `c_beside` is c_y."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < count
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, hidden, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = exists[:, None] & (i < hidden)[None, :]
        c = tl.load(c_y + row[:, None] * stride + i[None, :], mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            c *= tl.load(weight + i, mask=i < hidden, other=0.0).to(tl.float32)[None, :]
        total += c
    mean = tl.sum(total, 1) / hidden
    r = tl.load(rstd + row, mask=exists, other=0.0)
    for start in range(0, hidden, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = exists[:, None] & (i < hidden)[None, :]
        c = tl.load(c_y + row[:, None] * stride + i[None, :], mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            c *= tl.load(weight + i, mask=i < hidden, other=0.0).to(tl.float32)[None, :]
        result = (c - mean[:, None]) * r[:, None]
        if ADDED:
            beside = tl.load(c_beside + row[:, None] * beside_stride + i[None, :], mask=inside, other=0.0)
            result += beside.to(tl.float32)
        tl.store(c_x + row[:, None] * hidden + i[None, :], result.to(c_x.dtype.element_ty), mask=inside)


def statistics(x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> list[Tensor]:
    """Torch's own norm of x, and 1/sigma in float32."""
    y, _, rstd = torch.native_layer_norm(x, list(shape), weight, bias, eps)
    if rstd.dtype != torch.float32:  # on the CPU 16 bits beget 16-bit statistics
        rstd = torch.rsqrt(x.float().var(tuple(range(-len(shape), 0)), correction=0, keepdim=True) + eps)
    return [y, rstd.contiguous()]


def backward(
    c_y: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    hidden: int,
    dtype: torch.dtype,
    c_beside: Tensor | None = None,
) -> Tensor:
    """(c - mean(c)) / sigma with c = c_y * weight over the last `hidden` numbers, and c_beside added, in `dtype`."""
    c, beside = (
        rows(x if x.shape[-1] == hidden else x.reshape(rstd.numel(), hidden))
        for x in (c_y, c_y if c_beside is None else c_beside)
    )
    c_x = torch.empty(c_y.shape, dtype=dtype, device=c_y.device)
    size, block = tile(hidden)
    constants = {"WEIGHTED": weight is not None, "ADDED": c_beside is not None, "ROWS": size, "BLOCK": block}
    scale = c if weight is None else weight.contiguous()
    arguments = [c_x, c, beside, rstd, scale, c.stride(0), beside.stride(0), len(c), hidden]
    launch(backward_kernel, lambda meta: [triton.cdiv(len(c), meta["ROWS"])], arguments, constants)
    return c_x


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        y, rstd = statistics(x, shape, weight, bias, eps)
        ctx.hidden = math.prod(shape)
        ctx.save_for_backward(rstd, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, c_y: Tensor) -> tuple[Tensor, None, None, None, None]:
        rstd, weight = ctx.saved_tensors
        return backward(c_y, rstd, weight, ctx.hidden, c_y.dtype), None, None, None, None


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """The twin of lxt.rules.layer_norm.

    Args:
        x: [..., *normalized_shape]
        normalized_shape: of the last dimensions, over which mean and variance go.
        weight: of that shape, as `bias`.
        bias: added in the end.
        eps: added to the variance.
    """
    return _LayerNorm.apply(x, normalized_shape, weight, bias, eps)
