"""The rules: operations with an unchanged forward and their own backward.

In the gradient x input form (arXiv 2502.15886) the backward carries the coefficient c = R / x, and relevance is read
off anywhere as x * c. `c_y` below is the coefficient that arrives at an operation's output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lxt.coefficients import COEFFICIENTS, Coefficient, wide
from lxt.dispatch import form, kernel

__all__ = [
    "NormStyle",
    "batch_norm",
    "gated_product",
    "glu",
    "group_norm",
    "identity",
    "layer_norm",
    "relevance",
    "rms_norm",
    "rms_norm_function",
    "rotary",
    "scale_gradient",
    "stop",
    "tempered_softmax",
    "value_attention",
]

NormStyle = Literal["llama", "gemma", "t5"]


def stop(x: Tensor) -> Tensor:
    """A constant to the backward: c_x = 0."""
    return x.detach()


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return torch.ops.aten._unsafe_view(x, x.shape)  # no view to autograd, which forbids writing into one

    @staticmethod
    def backward(ctx: Any, c_y: Tensor) -> tuple[Tensor, None]:
        return c_y * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """The uniform rule (AttnLRP, arXiv 2402.05602, eq. 7): c_x = factor * c_y, with 1/n behind a product of n."""
    return x if factor == 1 else _ScaleGradient.apply(x, factor)


class _Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor], coefficient: Coefficient) -> Tensor:
        ctx.save_for_backward(x)
        ctx.coefficient = coefficient
        return function(x)

    @staticmethod
    def backward(ctx: Any, c_y: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return (c_y * ctx.coefficient(x.to(wide(x.dtype)))).to(x.dtype), None, None


def identity(x: Tensor, function: Callable[[Tensor], Tensor], coefficient: Coefficient | str) -> Tensor:
    """The identity rule for an element-wise function (AttnLRP eq. 9): R_x = R_y, so c_x = (f(x) / x) c_y.

    Args:
        x: any shape.
        function: the forward, run as it is.
        coefficient: f(x) / x, or the name of one in lxt.coefficients.
    """
    fused = kernel("identity", x)
    if fused and (name := form(coefficient)):
        return fused(x, function, name)
    return _Identity.apply(x, function, COEFFICIENTS[coefficient] if isinstance(coefficient, str) else coefficient)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, style: NormStyle) -> Tensor:
        # The casts are those of the architectures: the result must be theirs to the last bit.
        h = x.to(torch.float32)
        rstd = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
        ctx.style = style
        ctx.save_for_backward(rstd, weight)
        if style == "gemma":
            return (h * rstd * (1.0 + weight.float())).type_as(x)
        if style == "llama":
            return weight * (h * rstd).to(x.dtype)
        normed = x * rstd
        return weight * (normed.to(weight.dtype) if weight.dtype in (torch.float16, torch.bfloat16) else normed)

    @staticmethod
    def backward(ctx: Any, c_y: Tensor) -> tuple[Tensor, None, None, None]:
        rstd, weight = ctx.saved_tensors
        scale = 1.0 + weight.to(rstd.dtype) if ctx.style == "gemma" else weight
        return (c_y * scale * rstd).to(c_y.dtype), None, None, None


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
        rstd, weight = ctx.saved_tensors
        c = c_y.to(rstd.dtype) if weight is None else c_y * weight.to(rstd.dtype)
        c = c - c.mean(tuple(range(-ctx.axes, 0)), keepdim=True)
        return (c * rstd).to(c_y.dtype), None, None, None, None


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


def rms_norm_function(
    x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """torch.nn.functional.rms_norm with 1/sigma as a constant: c_x = c_y * weight / sigma."""
    epsilon = torch.finfo(wide(x.dtype)).eps if eps is None else eps  # as torch: of the dtype it computes in

    def coefficient(x: Tensor) -> Tensor:
        rstd = torch.rsqrt(x.square().mean(tuple(range(-len(shape), 0)), keepdim=True) + epsilon)
        return rstd if weight is None else rstd * weight

    return identity(x, lambda x: F.rms_norm(x, shape, weight, eps), coefficient)


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        activation: Callable[[Tensor], Tensor],
        coefficient: Coefficient,
        stop_gate: bool,
    ) -> Tensor:
        activated = activation(gate)
        ctx.stop_gate, ctx.coefficient, ctx.activation = stop_gate, coefficient, activation
        ctx.save_for_backward(*((activated,) if stop_gate else (gate, up)))
        return activated * up

    @staticmethod
    def backward(ctx: Any, c_y: Tensor) -> tuple[Tensor | None, Tensor, None, None, None]:
        if ctx.stop_gate:
            (activated,) = ctx.saved_tensors
            return None, c_y * activated, None, None, None
        gate, up = ctx.saved_tensors
        half = c_y * 0.5
        coefficient = ctx.coefficient(gate.to(wide(gate.dtype))) * up  # first, so that a large up times 0 is 0
        return (half * coefficient).to(gate.dtype), half * ctx.activation(gate), None, None, None


def gated_product(
    gate: Tensor,
    up: Tensor,
    activation: Callable[[Tensor], Tensor],
    coefficient: Coefficient | str,
    stop_gate: bool = False,
) -> Tensor:
    """activation(gate) * up in one operation.

    Uniform rule on the product and identity rule on the activation: c_gate = f(gate)/gate * up * c_y / 2 and
    c_up = f(gate) * c_y / 2, saving gate and up only. With `stop_gate` (CP-LRP) c_up = f(gate) * c_y and c_gate = 0,
    saving f(gate) only.

    Args:
        gate: [..., d_mlp], before the activation.
        up: [..., d_mlp]
    """
    fused = kernel("gated_product", gate, up) if gate.shape == up.shape and gate.dim() else None
    if fused and (name := form(coefficient)):
        return fused(gate, up, activation, name, stop_gate)
    coefficient = COEFFICIENTS[coefficient] if isinstance(coefficient, str) else coefficient
    return _GatedProduct.apply(gate, up, activation, coefficient, stop_gate)


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        ctx.dim = dim
        ctx.save_for_backward(x)
        return F.glu(x, dim)

    @staticmethod
    def backward(ctx: Any, c_y: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        gate = x.chunk(2, ctx.dim)[1]
        c_value = (c_y * torch.sigmoid(gate.to(wide(x.dtype)))).to(x.dtype)
        return torch.cat((c_value, torch.zeros_like(c_value)), ctx.dim), None


def glu(x: Tensor, dim: int = -1) -> Tensor:
    """GLU, a * sigmoid(b): sigmoid(0) is not 0, so it is a gate and constant, and a carries all relevance."""
    return _GLU.apply(x, dim)


class _TemperedSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, dtype: torch.dtype | None, temperature: float) -> Tensor:
        ctx.dim, ctx.temperature = dim, temperature
        ctx.save_for_backward(x)
        return F.softmax(x, dim, dtype=dtype)

    @staticmethod
    def backward(ctx: Any, c_y: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        s = F.softmax(x.to(wide(x.dtype)) / ctx.temperature, ctx.dim)
        c = c_y.to(s.dtype)
        return (s * (c - (s * c).sum(ctx.dim, keepdim=True))).to(x.dtype), None, None, None


def tempered_softmax(x: Tensor, dim: int, dtype: torch.dtype | None, temperature: float) -> Tensor:
    """Softmax whose backward uses the probabilities at `temperature`; at 1 it is the plain gradient (Prop. 3.1)."""
    return F.softmax(x, dim, dtype=dtype) if temperature == 1 else _TemperedSoftmax.apply(x, dim, dtype, temperature)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.factor, ctx.dtype = factor, x.dtype
        first, second = x.chunk(2, dim=-1)
        return x * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)

    @staticmethod
    def backward(ctx: Any, c_y: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        c = c_y.to(wide(c_y.dtype))
        first, second = (c * sin.unsqueeze(1)).chunk(2, dim=-1)
        turned = torch.cat((second, -first), dim=-1)
        return (ctx.factor * (c * cos.unsqueeze(1) + turned)).to(ctx.dtype), None, None, None


def rotary(x: Tensor, cos: Tensor, sin: Tensor, factor: float = 1.0) -> Tensor:
    """Rotary position embedding, x cos + rotate(x) sin with the halves' rotate((a, b)) = (-b, a), and a factor on c.

    It is linear: c_x is the plain gradient times `factor`, the uniform rule's share of queries or keys.

    Args:
        x: [batch, head, token, d_head], queries or keys.
        cos: [batch or 1, token, d_head], as `sin`.
    """
    return (kernel("rotary", x, cos, sin) or _Rotary.apply)(x, cos, sin, factor)


def value_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: int | None = None,
) -> Tensor:
    """Torch's scaled_dot_product_attention with the softmax as a constant (CP-LRP): c_v = P^T c_out, c_q = c_k = 0.

    Args:
        query: [batch, head, query, d_head]; key and value: [batch, head, key, d_head].
        window: query i sees the keys i - window + 1 to i only; needs `is_causal`, and no `attn_mask`.

    Raises:
        ValueError: a window without `is_causal`, or with a mask.
    """
    if window is not None and (not is_causal or attn_mask is not None or window < 1):
        raise ValueError(
            f"window={window} needs is_causal=True, no attn_mask and at least one key; other windows go into attn_mask"
        )
    query, key = stop(query), stop(key)
    attn_mask = attn_mask if attn_mask is None else stop(attn_mask)
    alike = query.dim() == 4 and key.shape[:3] == value.shape[:3] and query.shape[0] == key.shape[0]
    grouped = alike and query.shape[1] % key.shape[1] == 0 if enable_gqa else alike and query.shape[1] == key.shape[1]
    if grouped and value.requires_grad and (fused := kernel("value_attention", query, key, value)):
        return fused(query, key, value, attn_mask, is_causal, scale, enable_gqa, window)
    if window is not None:
        places = (torch.arange(x.shape[-2], device=x.device) for x in (query, key))
        distance = next(places)[:, None] - next(places)
        attn_mask, is_causal = (distance >= 0) & (distance < window), False
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
    )


def relevance(x: Tensor, c_x: Tensor, groups: int | None = None) -> Tensor:
    """The relevance x * c summed over the last dimension: of each token, or with `groups` of each head.

    Args:
        x: [..., hidden], an activation.
        c_x: [..., hidden], its coefficient.
        groups: how many equal parts of hidden are summed apart.

    Returns:
        [...] or [..., groups], in float32 or wider.
    """
    if x.dim() and x.shape == c_x.shape and (fused := kernel("relevance", x, c_x)):
        return fused(x, c_x, groups)
    product = x.to(wide(x.dtype)) * c_x.to(wide(x.dtype))
    return (product if groups is None else product.unflatten(-1, (groups, -1))).sum(-1)
