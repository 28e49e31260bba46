"""The residual connection and the RMSNorm behind it, with the kernels of rms_norm.py.

1. Forward: summed = residual + x, rounded to the model's dtype, and its norm. With `exact` torch adds and takes
   1/sigma; else one kernel does all three.
2. Backward: c = c_summed + c_normed * weight / sigma in one pass, for x and residual alike: three reads and writes,
   where the norm's backward and autograd's addition have five.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lxt.triton_kernels.rms_norm import Style, backward, forward

__all__ = ["add_rms_norm"]


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float, style: Style, exact: bool
    ) -> tuple[Tensor, Tensor]:
        y, summed, rstd = forward(x, weight, eps, style, exact, residual)
        ctx.set_materialize_grads(False)  # behind the last norm nobody reads the sum
        ctx.style, ctx.dtypes = style, (x.dtype, residual.dtype)
        ctx.save_for_backward(rstd, weight)
        return y, summed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, c_normed: Tensor | None, c_summed: Tensor | None) -> tuple[Tensor | None, ...]:
        c = c_summed
        if c_normed is not None:
            rstd, weight = ctx.saved_tensors
            c = backward(c_normed, rstd, weight, ctx.style, torch.promote_types(*ctx.dtypes), c_summed)
        return *(c if c is None else c.to(dtype) for dtype in ctx.dtypes), None, None, None, None


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, style: Style = "llama", exact: bool = True
) -> tuple[Tensor, Tensor]:
    """The twin of lxt.rules.add_rms_norm.

    Args:
        x: [..., hidden]
        residual: of the same shape.
        weight: [hidden]
        eps: added to the mean of the squares.
        style: where the architecture casts.
        exact: whether the output must be the model's to the last bit.
    """
    return _AddRMSNorm.apply(x, residual, weight, eps, style, exact)
