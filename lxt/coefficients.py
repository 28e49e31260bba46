"""Closed forms of f(x) / x, the identity rule's coefficient, for the activations that transformers use.

Dividing f(x) by x is wrong near zero, so each form is written without the division where algebra allows it, and with
the limit at 0 where it doesn't. Every function takes and returns a floating tensor of any shape; `identity` in
lxt.rules hands 16-bit inputs over in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["COEFFICIENTS", "Coefficient", "ratio", "wide"]

Coefficient = Callable[[Tensor], Tensor]


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that coefficients and relevances are computed in: at least float32."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def ratio(y: Tensor, x: Tensor, limit: float = 1.0) -> Tensor:
    """The quotient y / x, and `limit` where x is 0; right for functions that torch computes with relative accuracy."""
    zero = x == 0
    return torch.where(zero, limit, y / x.masked_fill(zero, 1.0))


def silu(x: Tensor) -> Tensor:
    return torch.sigmoid(x)


def gelu(x: Tensor) -> Tensor:
    # erfc and not 1 + erf, which cancels in the negative tail.
    return 0.5 * torch.special.erfc(x * -math.sqrt(0.5))


def gelu_tanh(x: Tensor) -> Tensor:
    # 0.5 (1 + tanh(u)) is sigmoid(2u), which keeps the negative tail.
    return torch.sigmoid(math.sqrt(8.0 / math.pi) * (x + 0.044715 * x * x * x))


def quick_gelu(x: Tensor) -> Tensor:
    return torch.sigmoid(1.702 * x)


def relu(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype)


def relu_squared(x: Tensor) -> Tensor:
    return torch.relu(x)


def tanh(x: Tensor) -> Tensor:
    return ratio(torch.tanh(x), x)


def mish(x: Tensor) -> Tensor:
    # tanh(softplus(x)) in powers of e^-|x|, since softplus of torch drops its tail at a threshold.
    e = torch.exp(-x.abs())
    return torch.where(x > 0, (1 + 2 * e) / (1 + 2 * e + 2 * e * e), e * (e + 2) / (e * e + 2 * e + 2))


def hardswish(x: Tensor) -> Tensor:
    return F.hardsigmoid(x)


def softsign(x: Tensor) -> Tensor:
    return 1 / (1 + x.abs())


def relu6(x: Tensor) -> Tensor:
    return ratio(F.relu6(x), x, limit=0.0)


def clipped_gelu(x: Tensor, low: float, high: float) -> Tensor:
    y = F.gelu(x)
    return torch.where((y >= low) & (y <= high), gelu(x), ratio(y.clamp(low, high), x))


COEFFICIENTS: dict[str, Coefficient] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu": relu,
    "relu_squared": relu_squared,
    "tanh": tanh,
    "mish": mish,
    "hardswish": hardswish,
    "softsign": softsign,
    "relu6": relu6,
    "erf": lambda x: ratio(torch.erf(x), x, limit=2 / math.sqrt(math.pi)),
    "expm1": lambda x: ratio(torch.expm1(x), x),
    "asinh": lambda x: ratio(torch.asinh(x), x),
    "atan": lambda x: ratio(torch.atan(x), x),
    "sinh": lambda x: ratio(torch.sinh(x), x),
    "tan": lambda x: ratio(torch.tan(x), x),
    "log1p": lambda x: ratio(torch.log1p(x), x),
}
