"""Rotary position embedding (RoFormer, arXiv 2104.09864, eq. 34) whose backward also applies the attention's factors.

 1. Forward: y = x cos + rotate(x) sin, with rotate((a, b)) = (-b, a) of the two halves of a head, in one pass where the
    model takes five. It is the model's to the last bit: both products are rounded to the dtype, then their sum, and the
    compiler may not fuse a product and a sum.
 2. Backward: it is linear, so c_x = factor (c_y cos + rotate^T(c_y sin)) with rotate^T((a, b)) = (b, -a). `factor` is
    the uniform rule's share of queries or keys (AttnLRP, arXiv 2402.05602, eq. 13), which costs no pass of its own.
A program takes some tokens of one head. Output and coefficient have the layout that the queries came in, [batch, token,
head, d_head] in memory as a rule, so that the projection's backward needs no copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lxt.triton_kernels.launch import launch

__all__ = ["TILE", "rotary"]

TILE = 1024  # numbers of a half per program of 4 warps: 8 per thread, one 16-byte load of 16-bit numbers


@triton.jit
def rotary_kernel(
    out,
    x,
    cos,
    sin,
    out_batch,
    out_head,
    out_token,
    x_batch,
    x_head,
    x_token,
    cos_batch,
    cos_token,
    sin_batch,
    sin_token,
    heads,
    length,
    half,
    factor,
    BACK: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK >= half, half a head; the last dimension of every tensor is adjacent. BACK: the transposed map."""
    tiles = tl.cdiv(length, TOKENS)
    token = (tl.program_id(0) % tiles).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    head = pair % heads
    batch = pair // heads
    i = tl.arange(0, BLOCK)
    inside = (token < length)[:, None] & (i < half)[None, :]
    place = x + batch * x_batch + head * x_head + token[:, None] * x_token + i[None, :]
    cosines = cos + batch * cos_batch + token[:, None] * cos_token + i[None, :]
    sines = sin + batch * sin_batch + token[:, None] * sin_token + i[None, :]
    first = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(place + half, mask=inside, other=0.0).to(tl.float32)
    cos_first = tl.load(cosines, mask=inside, other=0.0).to(tl.float32)
    cos_second = tl.load(cosines + half, mask=inside, other=0.0).to(tl.float32)
    sin_first = tl.load(sines, mask=inside, other=0.0).to(tl.float32)
    sin_second = tl.load(sines + half, mask=inside, other=0.0).to(tl.float32)
    if BACK:
        turned_first = factor * (first * cos_first + second * sin_second)
        turned_second = factor * (second * cos_second - first * sin_first)
    else:
        dtype = out.dtype.element_ty
        turned_first = (first * cos_first).to(dtype).to(tl.float32) - (second * sin_first).to(dtype).to(tl.float32)
        turned_second = (second * cos_second).to(dtype).to(tl.float32) + (first * sin_second).to(dtype).to(tl.float32)
    target = out + batch * out_batch + head * out_head + token[:, None] * out_token + i[None, :]
    tl.store(target, turned_first.to(out.dtype.element_ty), mask=inside)
    tl.store(target + half, turned_second.to(out.dtype.element_ty), mask=inside)


def _turn(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor, factor: float, back: bool) -> None:
    x, cos, sin = (a if a.stride(-1) == 1 else a.contiguous() for a in (x, cos, sin))
    batch, heads, length, width = x.shape
    angles = [stride for a in (cos, sin) for stride in (0 if len(a) == 1 else a.stride(0), a.stride(1))]
    block = triton.next_power_of_2(width // 2)
    constants = {"BACK": back, "TOKENS": max(TILE // block, 1), "BLOCK": block, "enable_fp_fusion": back}
    arguments = [out, x, cos, sin, *out.stride()[:3], *x.stride()[:3], *angles, heads, length, width // 2, factor]
    launch(rotary_kernel, lambda meta: [triton.cdiv(length, meta["TOKENS"]) * heads * batch], arguments, constants)


def _empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device, by_token: bool) -> Tensor:
    """[batch, head, token, d_head], with the heads of a token adjacent in memory if `by_token`."""
    if not by_token:
        return torch.empty(shape, dtype=dtype, device=device)
    batch, heads, length, width = shape
    return torch.empty(batch, length, heads, width, dtype=dtype, device=device).transpose(1, 2)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.factor, ctx.dtype, ctx.by_token = factor, x.dtype, x.stride(2) > x.stride(1)
        if not x.dtype == cos.dtype == sin.dtype:  # of a mixture torch rounds neither product
            first, second = x.chunk(2, dim=-1)
            return x * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)
        y = _empty(x.shape, x.dtype, x.device, ctx.by_token)
        _turn(y, x, cos, sin, 1.0, back=False)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, c_y: Tensor) -> tuple[Tensor, None, None, None]:
        c_x = _empty(c_y.shape, ctx.dtype, c_y.device, ctx.by_token)
        cos, sin = ctx.saved_tensors
        _turn(c_x, c_y, cos, sin, ctx.factor, back=True)
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
