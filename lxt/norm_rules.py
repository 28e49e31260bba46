"""Norms whose 1/sigma is a constant to the backward (AttnLRP, arXiv 2402.05602, Prop. 3.4); lxt.rules has them, too.

`add_rms_norm` and `add_layer_norm` take the residual connection in front of a norm with it, so that what comes back
through the norm and what comes back beside it meet in one pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lxt.coefficients import wide
from lxt.dispatch import kernel

__all__ = ["NormStyle", "add_layer_norm", "add_rms_norm", "batch_norm", "group_norm", "layer_norm", "rms_norm"]

NormStyle = Literal["llama", "gemma", "t5"]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, style: NormStyle) -> Tensor:
        # The casts are those of the architectures: the result must be theirs to the last bit.
        h = x.to(torch.float32)
        rstd = h.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.style = style
        ctx.save_for_backward(rstd, weight)
        if style == "gemma":
            return (h * rstd * (1.0 + weight.float())).type_as(x)
        if style == "llama":
            normed = (h * rstd).to(x.dtype)
            return normed.mul_(weight) if weight.dtype == x.dtype else weight * normed
        normed = x * rstd
        return weight * (normed.to(weight.dtype) if weight.dtype in (torch.float16, torch.bfloat16) else normed)

    @staticmethod
    def backward(ctx: Any, c_y: Tensor) -> tuple[Tensor, None, None, None]:
        return _rms_coefficient(ctx, c_y).to(c_y.dtype), None, None, None


def _rms_coefficient(ctx: Any, c_y: Tensor) -> Tensor:
    rstd, weight = ctx.saved_tensors
    return c_y * (1.0 + weight.to(rstd.dtype) if ctx.style == "gemma" else weight) * rstd


def rms_norm(x: Tensor, weight: Tensor, eps: float, style: NormStyle = "llama") -> Tensor:
    """RMSNorm with 1/sigma as a constant (AttnLRP Prop. 3.4): c_x = c_y * weight / sigma.

    Saves 1/sigma only. `style` is where the architecture casts: `llama` before the weight, `gemma` after it and with
    1 + weight, `t5` not at all.

    Args:
        x: [..., hidden]
        weight: [hidden]
    """
    fused = kernel("rms_norm", x, weight) if weight.shape == x.shape[-1:] else None
    return (fused or _RMSNorm.apply)(x, weight, eps, style)


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float, style: NormStyle
    ) -> tuple[Tensor, Tensor]:
        summed = _sum(ctx, x, residual)
        return _RMSNorm.forward(ctx, summed, weight, eps, style), summed

    @staticmethod
    def backward(ctx: Any, c_normed: Tensor | None, c_summed: Tensor | None) -> tuple[Tensor | None, ...]:
        c = c_normed if c_normed is None else _rms_coefficient(ctx, c_normed).to(c_normed.dtype)
        return *_to_both(ctx, c, c_summed), None, None, None


def _sum(ctx: Any, x: Tensor, residual: Tensor) -> Tensor:
    """The residual stream, in the model's dtype before a norm reads it."""
    ctx.set_materialize_grads(False)  # behind the last norm nobody reads the sum
    ctx.dtypes = x.dtype, residual.dtype
    return residual + x


def _to_both(ctx: Any, c: Tensor | None, c_summed: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """What comes through the norm and beside it: to the last bit what autograd makes of the two operations."""
    if c is None or c_summed is None:
        c = c_summed if c is None else c
    else:
        c = c + c_summed
    if c is None:
        return None, None
    c_x = c.to(ctx.dtypes[0])
    return c_x, c_x if ctx.dtypes[1] == ctx.dtypes[0] else c.to(ctx.dtypes[1])


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, style: NormStyle = "llama"
) -> tuple[Tensor, Tensor]:
    """The residual connection and the RMSNorm behind it: summed = residual + x, and `rms_norm` of that.

    c = c_summed + c_normed * weight / sigma goes to both x and residual (addition is linear: epsilon rule, eps = 0).

    Args:
        x: [..., hidden], what a block adds to the stream.
        residual: [..., hidden], the stream.
        weight: [hidden]

    Returns:
        The norm's output and the sum.

    Raises:
        ValueError: x and residual have different shapes.
    """
    _check_shapes(x, residual)
    fused = kernel("add_rms_norm", x, residual, weight) if weight.shape == x.shape[-1:] else None
    return (fused or _AddRMSNorm.apply)(x, residual, weight, eps, style)


def _check_shapes(x: Tensor, residual: Tensor) -> None:
    if x.shape != residual.shape:
        raise ValueError(
            f"x of shape {list(x.shape)} and a residual of {list(residual.shape)}: these two must have one shape; "
            "a norm of other sums takes the sum"
        )


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        y, _, rstd = torch.native_layer_norm(x, list(shape), weight, bias, eps)
        if rstd.dtype != wide(x.dtype):  # 16-bit statistics lose an order of magnitude
            axes = tuple(range(-len(shape), 0))
            rstd = torch.rsqrt(x.to(wide(x.dtype)).var(axes, correction=0, keepdim=True) + eps)
        ctx.axes = len(shape)
        ctx.save_for_backward(rstd, weight)
        return y

    @staticmethod
    def backward(ctx: Any, c_y: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _layer_norm_coefficient(ctx, c_y).to(c_y.dtype), None, None, None, None


def _layer_norm_coefficient(ctx: Any, c_y: Tensor) -> Tensor:
    rstd, weight = ctx.saved_tensors
    c = c_y.to(rstd.dtype) if weight is None else c_y * weight.to(rstd.dtype)
    return (c - c.mean(tuple(range(-ctx.axes, 0)), keepdim=True)) * rstd


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """LayerNorm with 1/sigma as a constant (AttnLRP Prop. 3.4); subtracting the mean stays a linear map.

    c_x = (c - mean(c)) / sigma with c = c_y * weight. Saves 1/sigma only, in float32 or wider.
    """
    fused = kernel("layer_norm", x, weight, bias)
    return (fused or _LayerNorm.apply)(x, normalized_shape, weight, bias, eps)


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
    ) -> tuple[Tensor, Tensor]:
        summed = _sum(ctx, x, residual)
        return _LayerNorm.forward(ctx, summed, shape, weight, bias, eps), summed

    @staticmethod
    def backward(ctx: Any, c_normed: Tensor | None, c_summed: Tensor | None) -> tuple[Tensor | None, ...]:
        c = c_normed if c_normed is None else _layer_norm_coefficient(ctx, c_normed).to(c_normed.dtype)
        return *_to_both(ctx, c, c_summed), None, None, None, None


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """The residual connection and the LayerNorm behind it: summed = residual + x, and `layer_norm` of that.

    Args:
        x: [..., *normalized_shape], what a block adds to the stream.
        residual: [..., *normalized_shape], the stream.

    Returns:
        The norm's output and the sum.

    Raises:
        ValueError: x and residual have different shapes.
    """
    _check_shapes(x, residual)
    fused = kernel("add_layer_norm", x, residual, weight, bias)
    return (fused or _AddLayerNorm.apply)(x, residual, normalized_shape, weight, bias, eps)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        grouped = x.to(wide(x.dtype)).reshape(x.shape[0], groups, math.prod(x.shape[1:]) // groups)
        ctx.groups = groups
        ctx.save_for_backward(torch.rsqrt(grouped.var(-1, correction=0, keepdim=True) + eps), weight)
        return F.group_norm(x, groups, weight, bias, eps)

    @staticmethod
    def backward(ctx: Any, c_y: Tensor) -> tuple[Tensor, None, None, None, None]:
        rstd, weight = ctx.saved_tensors
        c = c_y.to(rstd.dtype)
        if weight is not None:
            c = c * weight.to(rstd.dtype).view(1, -1, *[1] * (c.dim() - 2))
        c = c.reshape(c.shape[0], ctx.groups, math.prod(c.shape[1:]) // ctx.groups)
        return ((c - c.mean(-1, keepdim=True)) * rstd).view_as(c_y).to(c_y.dtype), None, None, None, None


def group_norm(
    x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """GroupNorm with 1/sigma of each group as a constant, as `layer_norm`.

    Args:
        x: [batch, channel, ...]
        weight: [channel]
    """
    return _GroupNorm.apply(x, groups, weight, bias, eps)


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        rstd = torch.rsqrt(variance.to(wide(variance.dtype)) + eps)
        ctx.save_for_backward(rstd if weight is None else rstd * weight)
        return F.batch_norm(x, mean, variance, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx: Any, c_y: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (scale,) = ctx.saved_tensors
        return (c_y * scale.view(-1, *[1] * (c_y.dim() - 2))).to(c_y.dtype), None, None, None, None, None


def batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """BatchNorm by its running statistics, a linear map: c_x = c_y * weight / sigma.

    Not left to torch, whose backward on the CPU is wrong for one sample and a gradient in another memory format than
    x, as a `flatten(2).transpose(1, 2)` behind the norm makes it (torch 2.13).

    Args:
        x: [batch, channel, ...]
        mean: [channel], as `variance`, `weight` and `bias`.
    """
    return _BatchNorm.apply(x, mean, variance, weight, bias, eps)
