"""Relevance of each token or head: the sum of x * c over its part of the last dimension, in float32.

A program takes several groups and goes along them in steps, so x and c are read once and nothing else is written but
the sums; the eager twin casts both to float32 and writes their product first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lxt.triton_kernels.launch import launch, rows
from lxt.triton_kernels.rms_norm import TILE, tile

__all__ = ["relevance"]


@triton.jit
def sum_kernel(
    out,
    x,
    c_x,
    x_stride,
    c_stride,
    count,
    groups,
    width,
    MANY: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Group g of `count` is part g % groups of row g // groups. MANY: 32 bits can't count them."""
    first = tl.program_id(0)  # a division of 64 bits costs registers
    if MANY:
        first = first.to(tl.int64)
    group = first * ROWS + tl.arange(0, ROWS)
    exists = group < count
    row = (group // groups).to(tl.int64)
    x_start = x + row * x_stride + group % groups * width
    c_start = c_x + row * c_stride + group % groups * width
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, width, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = exists[:, None] & (i < width)[None, :]
        a = tl.load(x_start[:, None] + i[None, :], mask=inside, other=0.0).to(tl.float32)
        total += a * tl.load(c_start[:, None] + i[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(out + group, tl.sum(total, 1), mask=exists)


def relevance(x: Tensor, c_x: Tensor, groups: int | None = None) -> Tensor:
    """The twin of lxt.rules.relevance.

    Args:
        x: [..., hidden], an activation.
        c_x: [..., hidden], its coefficient.
        groups: how many equal parts of hidden (heads) are summed apart; None sums all of it.

    Returns:
        [...] or [..., groups], in float32.

    Raises:
        ValueError: hidden can't be divided into that many parts.
    """
    parts = 1 if groups is None else groups
    if parts < 1 or x.shape[-1] % parts:
        raise ValueError(f"{x.shape[-1]} numbers of a token can't be divided into {groups} groups of one size")
    shape = x.shape[:-1] if groups is None else (*x.shape[:-1], groups)
    if x.numel() == 0:
        return torch.zeros(shape, dtype=torch.float32, device=x.device)
    out = torch.empty(shape, dtype=torch.float32, device=x.device)
    a, c = rows(x), rows(c_x)
    width = a.shape[1] // parts
    size, block = tile(width)
    count = len(a) * parts
    arguments = [out, a, c, a.stride(0), c.stride(0), count, parts, width]
    constants = {"MANY": count > 2**31 - TILE, "ROWS": size, "BLOCK": block}
    launch(sum_kernel, lambda meta: [triton.cdiv(count, meta["ROWS"])], arguments, constants)
    return out
