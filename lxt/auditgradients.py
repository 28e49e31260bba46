"""The gradients that the auditor puts in place of a node's own, where a factor on them doesn't express the rule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from lxt.auditgraph import kind

__all__ = ["glu_gradient", "norm_gradient", "running_norm_gradient", "slope", "softmax_gradient", "times"]


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def times(gradient: Tensor, coefficient: Tensor) -> Tensor:
    """The product, in float32 or wider, in the gradient's dtype."""
    return (_wide(gradient) * coefficient).to(gradient.dtype)


def slope(node: Node, x: Tensor) -> Tensor:
    """The quotient f(x)/x of an activation function, in closed form where there is one."""
    name, x = kind(node), _wide(x)
    if name == "Silu":
        return torch.sigmoid(x)
    if name == "GeLUFunctionBackward" or (name == "Gelu" and node._saved_approximate == "tanh"):  # type: ignore[attr-defined]
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if name == "Gelu":
        return 0.5 * torch.erfc(-x * math.sqrt(0.5))  # accurate in the negative tail, where 1 + erf cancels
    if name == "Mish":
        return torch.tanh(torch.nn.functional.softplus(x))
    if name == "Hardswish":
        return (x + 3).clamp(0, 6) / 6
    output, at_zero = _value(name, node, x)
    return torch.where(x == 0, at_zero, output / torch.where(x == 0, 1, x))


def _value(name: str, node: Node, x: Tensor) -> tuple[Tensor, float]:
    """f(x), and the limit of f(x)/x at 0."""

    def saved(field: str, default: float | None = None) -> Any:
        return getattr(node, f"_saved_{field}", default)

    if name in {"Elu", "Celu"}:
        alpha, scale = float(saved("alpha") or 0), float(saved("scale", 1.0) or 0)
        inner = float(saved("input_scale", 1 / alpha if name == "Celu" else 1.0) or 0)
        return torch.where(x > 0, scale * x, alpha * scale * torch.expm1(x * inner)), alpha * scale * inner
    if name == "Softshrink":
        return torch.nn.functional.softshrink(x, float(saved("lambd") or 0)), 0.0
    if name == "Hardtanh":
        return x.clamp(saved("min_val"), saved("max_val")), 1.0
    if name in {"Clamp", "ClampMin", "ClampMax"}:
        return x.clamp(saved("min"), saved("max")), 1.0
    function = getattr(torch, name.lower())  # tanh, erf, expm1, atan ...: named as in torch
    return function(x), 2 / math.sqrt(math.pi) if name == "Erf" else 1.0


def softmax_gradient(gradient: Tensor, node: Node, temperature: float) -> Tensor:
    """The softmax's backward with the softmax at another temperature in its Jacobian, s (c - sum(s c)).

    The logits are known from the result up to a constant per row, which the softmax ignores. The Jacobian of
    softmax(x / T) has a factor 1 / T besides; the rule replaces s only.
    """
    if kind(node) == "XSoftmaxBackward":
        result, dim = _wide(node.saved_tensors[0]), node.dim  # type: ignore[attr-defined]
    else:
        result, dim = _wide(node._saved_result), _dim(node)  # type: ignore[attr-defined]
    logits = result if kind(node) == "LogSoftmax" else result.log()
    softened = torch.softmax(logits / temperature, dim).nan_to_num(0.0)  # a fully masked row has no weights
    wide = _wide(gradient)
    if kind(node) == "LogSoftmax":
        return (wide - softened * wide.sum(dim, keepdim=True)).to(gradient.dtype)
    return (softened * (wide - (softened * wide).sum(dim, keepdim=True))).to(gradient.dtype)


def glu_gradient(gradient: Tensor, node: Node) -> Tensor:
    """The backward of a gated linear unit with its sigmoid constant."""
    dim = _dim(node)
    _, gate = _wide(node._saved_self).chunk(2, dim)  # type: ignore[attr-defined]
    return torch.cat([times(gradient, torch.sigmoid(gate)), torch.zeros_like(gradient)], dim)


def norm_gradient(gradient: Tensor, node: Node) -> Tensor:
    """The backward of a norm with 1/sigma constant; the mean is differentiated."""
    name, weight, wide = kind(node), node._saved_weight, _wide(gradient)  # type: ignore[attr-defined]
    if name in {"NativeLayerNorm", "FusedRmsNorm"}:
        dims = tuple(range(-len(node._saved_normalized_shape), 0))  # type: ignore[attr-defined]
        rstd = _wide(node._saved_result2 if name == "NativeLayerNorm" else node._saved_result1)  # type: ignore[attr-defined]
        wide = wide if weight is None else wide * weight
        centred = wide - wide.mean(dims, keepdim=True) if name == "NativeLayerNorm" else wide
        return (centred * rstd.reshape(rstd.shape + (1,) * (wide.dim() - rstd.dim()))).to(gradient.dtype)
    wide = wide if weight is None else wide * weight.reshape(-1, *[1] * (wide.dim() - 2))
    rstd = _wide(node._saved_result2)  # type: ignore[attr-defined]
    if name == "NativeBatchNorm":
        dims = (0, *range(2, wide.dim()))
        return ((wide - wide.mean(dims, keepdim=True)) * rstd.reshape(-1, *[1] * (wide.dim() - 2))).to(gradient.dtype)
    grouped = wide.reshape(rstd.numel(), -1)
    centred = (grouped - grouped.mean(1, keepdim=True)) * rstd.reshape(-1, 1)
    return centred.reshape(gradient.shape).to(gradient.dtype)


def running_norm_gradient(gradient: Tensor, node: Node) -> Tensor:
    """The backward of a batch norm by its running statistics."""
    weight, variance = node._saved_weight, node._saved_running_var  # type: ignore[attr-defined]
    scale = torch.rsqrt(_wide(variance) + node._saved_eps)  # type: ignore[attr-defined]
    scale = scale if weight is None else scale * weight
    return times(gradient, scale.reshape(-1, *[1] * (gradient.dim() - 2)))


def _dim(node: Node) -> int:
    dim = int(node._saved_dim)  # type: ignore[attr-defined]
    return dim - 2**64 if dim >= 2**63 else dim  # torch hands negative dims out as unsigned
