"""The rules: operations with an unchanged forward and their own backward.

In the gradient x input form (arXiv 2502.15886) the backward carries the coefficient c = R / x, and relevance is read
off anywhere as x * c. `c_y` below is the coefficient that arrives at an operation's output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lxt import flash
from lxt.coefficients import COEFFICIENTS, Coefficient, wide
from lxt.dispatch import form, kernel
from lxt.norm_rules import NormStyle, add_layer_norm, add_rms_norm, batch_norm, group_norm, layer_norm, rms_norm

__all__ = [
    "NormStyle",
    "add_layer_norm",
    "add_rms_norm",
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


def stop(x: Tensor) -> Tensor:
    """A constant to the backward: c_x = 0."""
    return x.detach()


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.data  # no view to autograd, which forbids writing into one; aten's _unsafe_view costs twice as much

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


def rms_norm_function(
    x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """torch.nn.functional.rms_norm with 1/sigma as a constant: c_x = c_y * weight / sigma."""
    epsilon = torch.finfo(wide(x.dtype)).eps if eps is None else eps  # as torch: of the dtype it computes in

    def coefficient(x: Tensor) -> Tensor:
        rstd = torch.rsqrt(x.square().mean(tuple(range(-len(shape), 0)), keepdim=True) + epsilon)
        return rstd if weight is None else rstd * weight

    return identity(x, lambda x: F.rms_norm(x, shape, weight, eps), coefficient)


BLOCK = 2**17  # numbers that the gated product takes back at once: these and what they become fit the cache


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
        ctx.stop_gate, ctx.coefficient = stop_gate, coefficient
        ctx.save_for_backward(*((activated,) if stop_gate else (gate, up)))
        in_place = not stop_gate and activated.dtype == up.dtype
        return activated.mul_(up) if in_place and activated is not gate else activated * up

    @staticmethod
    def backward(ctx: Any, c_y: Tensor) -> tuple[Tensor | None, Tensor, None, None, None]:
        if ctx.stop_gate:
            (activated,) = ctx.saved_tensors
            return None, c_y * activated, None, None, None
        gate, up = ctx.saved_tensors
        c_gate, c_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
        # In blocks, as the wide numbers of 16-bit ones would else take more memory than all that was saved.
        rows = max(1, BLOCK // max(gate.shape[-1], 1)) if gate.dim() else 1
        operands = (x.flatten(0, -2).split(rows) if x.dim() > 1 else (x,) for x in (c_y, gate, up, c_gate, c_up))
        for c, x, factor, to_gate, to_up in zip(*operands, strict=True):
            x = x.to(wide(x.dtype))
            half = ctx.coefficient(x).mul_(0.5)
            # f(x) is f(x)/x times x, for which nothing is computed twice; c last, so that a large factor times 0 is 0
            to_gate.copy_((half * factor).mul_(c))
            to_up.copy_(half.mul_(x).mul_(c))
        return c_gate, c_up, None, None, None


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
    if gate.shape != up.shape:
        gate, up = torch.broadcast_tensors(gate, up)
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
        # As the modeling files write it, and to their last bit: x * cos + cat(-second, first) * sin
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        y = x * cos
        _halves(y)[0].sub_(_halves(x)[1] * _halves(sin)[0])
        _halves(y)[1].add_(_halves(x)[0] * _halves(sin)[1])
        return y

    @staticmethod
    def backward(ctx: Any, c_y: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = (ctx.factor * angle.unsqueeze(1) for angle in ctx.saved_tensors)
        c_x = c_y * cos
        _halves(c_x)[0].addcmul_(_halves(c_y)[1], _halves(sin)[1])
        _halves(c_x)[1].addcmul_(_halves(c_y)[0], _halves(sin)[0], value=-1)
        return c_x.to(ctx.dtype), None, None, None


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


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
    if value.requires_grad and flash.applies(
        query, key, value, attn_mask, is_causal, scale, enable_gqa, for_value=True
    ):
        return flash.attention(query, key, value, attn_mask, is_causal, scale, shares=(0.0, 0.0, 1.0))
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
