"""Rotary position embedding (RoFormer, arXiv 2104.09864, eq. 34) whose backward also applies the attention's factors.

 1. Forward: y = x cos + rotate(x) sin, with rotate((a, b)) = (-b, a) of the two halves of a head: by torch, as the
    models have it.
 2. Backward: it is linear, so c_x = factor (c_y cos + rotate^T(c_y sin)) with rotate^T((a, b)) = (b, -a). `factor` is
    the uniform rule's share of queries or keys (AttnLRP, arXiv 2402.05602, eq. 13), which costs no pass of its own.
A program takes some tokens of one head and writes in the layout that the queries came in, [batch, token, head, d_head]
in memory as a rule, so that the projection's backward needs no copy.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lxt.triton_kernels.launch import launch

__all__ = ["TOKENS", "rotary"]

TOKENS = 16  # of one head per program: 2048 numbers at d_head = 128


@triton.jit
def backward_kernel(
    c_x,
    c_y,
    cos,
    sin,
    x_batch,
    x_head,
    x_token,
    y_batch,
    y_head,
    y_token,
    angle_batch,
    angle_token,
    length,
    half,
    factor,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK >= half, half a head; the last dimension of every tensor is adjacent."""
    batch = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    i = tl.arange(0, BLOCK)
    inside = (token < length)[:, None] & (i < half)[None, :]
    c = c_y + batch * y_batch + head * y_head + token[:, None] * y_token + i[None, :]
    angle = batch * angle_batch + token[:, None] * angle_token + i[None, :]
    c_first = tl.load(c, mask=inside, other=0.0).to(tl.float32)
    c_second = tl.load(c + half, mask=inside, other=0.0).to(tl.float32)
    cos_first = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
    cos_second = tl.load(cos + angle + half, mask=inside, other=0.0).to(tl.float32)
    sin_first = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
    sin_second = tl.load(sin + angle + half, mask=inside, other=0.0).to(tl.float32)
    first = factor * (c_first * cos_first + c_second * sin_second)
    second = factor * (c_second * cos_second - c_first * sin_first)
    out = c_x + batch * x_batch + head * x_head + token[:, None] * x_token + i[None, :]
    tl.store(out, first.to(c_x.dtype.element_ty), mask=inside)
    tl.store(out + half, second.to(c_x.dtype.element_ty), mask=inside)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.factor, ctx.dtype = factor, x.dtype
        ctx.by_token = x.stride(2) > x.stride(1)
        first, second = x.chunk(2, dim=-1)
        return x * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, c_y: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = (angle.contiguous() for angle in ctx.saved_tensors)
        c = c_y if c_y.stride(-1) == 1 else c_y.contiguous()
        batch, heads, length, width = c.shape
        if ctx.by_token:
            c_x = torch.empty(batch, length, heads, width, dtype=ctx.dtype, device=c.device).transpose(1, 2)
        else:
            c_x = torch.empty(c.shape, dtype=ctx.dtype, device=c.device)
        angles = (0 if len(cos) == 1 else cos.stride(0), cos.stride(1))
        strides = [*c_x.stride()[:3], *c.stride()[:3], *angles]
        constants = {"TOKENS": TOKENS, "BLOCK": triton.next_power_of_2(width // 2)}
        arguments = [c_x, c, cos, sin, *strides, length, width // 2, ctx.factor]
        launch(backward_kernel, [triton.cdiv(length, TOKENS), heads, batch], arguments, constants)
        return c_x, None, None, None


def rotary(x: Tensor, cos: Tensor, sin: Tensor, factor: float = 1.0) -> Tensor:
    """The twin of lxt.rules.rotary.

    Args:
        x: [batch, head, token, d_head], queries or keys.
        cos: [batch or 1, token, d_head], as `sin`.
        sin: of the same angles.
        factor: what the backward multiplies by.
    """
    return _Rotary.apply(x, cos, sin, factor)
