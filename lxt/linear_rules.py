"""The epsilon and gamma rules for linear maps: z = f(x, weight) + bias, f linear in both.

`f` is passed in, so one definition serves linear layers, addmm and convolutions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lxt.coefficients import wide
from lxt.composites import Epsilon, Gamma

__all__ = ["LinearMap", "linear"]

LinearMap = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x, weight, bias) -> z"""


class _Epsilon(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, epsilon: float) -> Tensor:
        ctx.epsilon = epsilon
        ctx.save_for_backward(z)
        return torch.ops.aten._unsafe_view(z, z.shape)  # no view: models write into it

    @staticmethod
    def backward(ctx: Any, c_z: Tensor) -> tuple[Tensor, None]:
        (z,) = ctx.saved_tensors
        size = z.to(wide(z.dtype)).abs()  # z / (z + epsilon sign z); a small epsilon is 0 in float16
        return (c_z * (size / (size + ctx.epsilon))).to(c_z.dtype), None


class _Gamma(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, f: LinearMap, gamma: float) -> Tensor:
        z = f(x, weight, bias)
        ctx.f, ctx.gamma = f, gamma
        ctx.save_for_backward(x, weight, bias, z)
        return z

    @staticmethod
    def backward(ctx: Any, c_z: Tensor) -> tuple[Tensor, None, None, None, None]:
        x, weight, bias, z = ctx.saved_tensors
        up, down = weight + ctx.gamma * weight.clamp(min=0), weight + ctx.gamma * weight.clamp(max=0)
        up_bias = None if bias is None else bias + ctx.gamma * bias.clamp(min=0)
        down_bias = None if bias is None else bias + ctx.gamma * bias.clamp(max=0)
        with torch.enable_grad():
            positive = x.detach().clamp(min=0).requires_grad_()
            negative = x.detach().clamp(max=0).requires_grad_()
            excited = ctx.f(positive, up, up_bias) + ctx.f(negative, down, None)
            inhibited = ctx.f(positive, down, down_bias) + ctx.f(negative, up, None)
        # z / excited before c_z: z c_z leaves the range of float16
        into_excited = torch.where(z > 0, z / torch.where(z > 0, excited, 1.0) * c_z, 0.0)
        into_inhibited = torch.where(z < 0, z / torch.where(z < 0, inhibited, 1.0) * c_z, 0.0)
        c_positive, c_negative = torch.autograd.grad(
            (excited, inhibited), (positive, negative), (into_excited.detach(), into_inhibited.detach())
        )
        return torch.where(x > 0, c_positive, c_negative), None, None, None, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, f: LinearMap, rule: Epsilon | Gamma) -> Tensor:
    """A linear map under `rule`; the forward is f(x, weight, bias).

    Epsilon: c_x = W^T (z / (z + epsilon sign z) c_z). Gamma: contributions with the sign of z weigh 1 + gamma, for
    inputs and outputs of both signs (the generalised form, as zennit's Gamma).
    """
    if isinstance(rule, Gamma):
        return _Gamma.apply(x, weight, bias, f, rule.gamma)
    z = f(x, weight, bias)
    return _Epsilon.apply(z, rule.epsilon) if rule.epsilon else z
