"""The epsilon and gamma rules for linear maps: z = f(x, weight) + bias, f linear in both.

`f` is passed in, so one definition serves linear layers, convolutions, and what is written as a product of matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lxt.coefficients import wide
from lxt.composites import Epsilon, Gamma

__all__ = ["LinearMap", "learned_product", "linear", "sum_of_product"]

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


def learned_product(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any], rule: Epsilon | Gamma) -> Any:
    """A product of an activation and a parameter, `x @ weight.T` or an einsum, under `rule`.

    Raises:
        ValueError: the other factor is no parameter or view of one: attention weights that are constant, or a
            selection of experts, look the same here and are no linear layer.
    """
    if len(args) == 2 and isinstance(args[1], (list, tuple)):  # einsum(equation, operands)
        args = (args[0], *args[1])
    places = [place for place, value in enumerate(args) if isinstance(value, Tensor)]
    if len(places) == 2:
        x_at, weight_at = places if args[places[0]].requires_grad else reversed(places)
        if args[x_at].requires_grad and _is_learned(args[weight_at]):
            return linear(args[x_at], args[weight_at], None, _as_map(func, args, kwargs, x_at, weight_at), rule)
    name = getattr(func, "__name__", func)
    raise ValueError(
        f"Composite(linear={rule}) can't reach a linear map that is written as {name} with a factor that is no "
        "parameter; use linear=Epsilon(), or model.set_experts_implementation('eager') where experts are it, or "
        "model.set_attn_implementation('sdpa') where it is attention with constant queries"
    )


def sum_of_product(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any], rule: Epsilon | Gamma) -> Tensor:
    """A summand plus x W or W x, as torch.addmm and its kin compute it, under `rule`.

    Args:
        func: torch's function.
        args: summand, first and second factor, one of which is an activation. A summand that is one too is another
            term of a sum, and no bias.
        kwargs: torch's `alpha` and `beta`.
        rule: of linear maps.
    """
    summand = args[0]
    x_at, weight_at = (1, 2) if args[1].requires_grad else (2, 1)
    f = _as_map(func, args, kwargs, x_at, weight_at, bias_at=0)
    if summand.requires_grad:
        return linear(args[x_at], args[weight_at], None, f, rule) + summand * kwargs.get("beta", 1)
    return linear(args[x_at], args[weight_at], summand, f, rule)


def _is_learned(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)


def _as_map(
    func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any], x_at: int, weight_at: int, bias_at: int | None = None
) -> LinearMap:
    rest = [None if place in (x_at, weight_at, bias_at) else value for place, value in enumerate(args)]

    def f(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        operands = list(rest)
        operands[x_at], operands[weight_at] = x, weight
        if bias_at is not None:
            operands[bias_at] = weight.new_zeros(()) if bias is None else bias
        return func(*operands, **kwargs)

    return f
