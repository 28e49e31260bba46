"""The epsilon and gamma rules for linear maps: z = f(x, weight) + bias, f linear in both.

`f` is passed in, so one definition serves linear layers, convolutions, and what is written as a product of matrices.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lxt.coefficients import wide
from lxt.composites import Epsilon, Gamma

__all__ = ["LinearMap", "learned_product", "linear", "sum_of_product", "unreachable", "with_gradient"]

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
        z = z.to(wide(z.dtype))
        with torch.enable_grad():
            above, below = (x.detach().clamp(**side).requires_grad_() for side in ({"min": 0}, {"max": 0}))
            # their sum p is all contributions > 0; those < 0 are z - p, which loses no digits where z < 0
            rising = ctx.f(above, weight.clamp(min=0), None if bias is None else bias.clamp(min=0))
            falling = ctx.f(below, weight.clamp(max=0), None)
        p = (rising + falling).detach().to(z.dtype)
        total = z + ctx.gamma * torch.where(z > 0, p, z - p)
        # the quotient before c_z: z c_z leaves the range of float16
        c_total = torch.where(z == 0, 0.0, z / torch.where(z == 0, 1.0, total) * c_z)
        favoured = (1 + ctx.gamma) * c_total
        # the coefficients of contributions > 0, and of those < 0
        to_positive = torch.where(z > 0, favoured, c_total).to(rising.dtype)
        to_negative = torch.where(z > 0, c_total, favoured).to(rising.dtype)
        parts = partial(torch.autograd.grad, (rising, falling), (above, below))
        c_above = sum(parts((to_positive, to_negative), retain_graph=True))
        c_below = sum(parts((to_negative, to_positive)))
        return torch.where(x > 0, c_above, c_below), None, None, None, None


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
        ValueError: the other factor is no parameter or view of one. Attention weights that are constant, queries that
            are, and selected experts all look the same here, and only the last are linear layers.
    """
    places = [place for place, value in enumerate(args) if isinstance(value, Tensor)]
    if len(places) == 2:
        x_at, weight_at = places if args[places[0]].requires_grad else reversed(places)
        if args[x_at].requires_grad and _is_learned(args[weight_at]):
            return linear(args[x_at], args[weight_at], None, _as_map(func, args, kwargs, x_at, weight_at), rule)
    _refuse_unless_attention(func, rule)
    return func(*args, **kwargs)


def sum_of_product(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any], rule: Epsilon | Gamma) -> Tensor:
    """A summand plus x W or W x, as torch.addmm and its kin compute it, under `rule`.

    Args:
        func: torch's function.
        args: summand, first and second factor, one of which is an activation. A summand that is one too is another
            term of a sum, and no bias.
        kwargs: torch's `alpha` and `beta`.
        rule: of linear maps.

    Raises:
        ValueError: the constant of a batched product is no parameter, as in `learned_product`.
    """
    summand = args[0]
    x_at, weight_at = (1, 2) if args[1].requires_grad else (2, 1)
    if args[weight_at].dim() > 2 and not _is_learned(args[weight_at]):
        _refuse_unless_attention(func, rule)
        return func(*args, **kwargs)
    f = _as_map(func, args, kwargs, x_at, weight_at, bias_at=0)
    if summand.requires_grad:
        return linear(args[x_at], args[weight_at], None, f, rule) + summand * kwargs.get("beta", 1)
    return linear(args[x_at], args[weight_at], summand, f, rule)


def _refuse_unless_attention(func: Callable, rule: Epsilon | Gamma) -> None:
    """In torch's own attention, whose queries may be constant, a product of two tensors is no linear layer."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is F.multi_head_attention_forward.__code__:
            return
        frame = frame.f_back
    name = getattr(func, "__name__", func)
    raise ValueError(
        f"Composite(linear={rule}) can't reach a linear map that is written as {name} with a factor that is no "
        "parameter; use linear=Epsilon(), or model.set_experts_implementation('eager') where experts are it, or "
        "model.set_attn_implementation('sdpa') where it is attention with constant queries"
    )


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


def with_gradient(result: Tensor, weight: object) -> Tensor:
    """`result`, a linear layer's output, if its input's gradient goes through it."""
    if not result.requires_grad:
        raise ValueError(
            f"a linear layer with a weight of type {type(weight).__name__} lost its input's gradient, as quantised "
            "activations do (rounding has none): relevance would stop here; quantise the weights only"
        )
    return result


def unreachable(rule: Epsilon | Gamma, what: str) -> ValueError:
    """The error for a rule of linear layers that would have to read quantised weights."""
    return ValueError(
        f"Composite(linear={rule}) can't reach the quantised linear layers of this model ({what}); use "
        "linear=Epsilon(), or the model with its weights in full"
    )
