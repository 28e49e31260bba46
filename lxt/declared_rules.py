"""The rules that a user can declare, applied to a function of which nothing but its own backward is known.

`function` runs with its plain gradient; what goes in and out is changed so that the whole is the rule. Equations:
y = f(x, ...), c = relevance / activation (see lxt.rules).

    linear      c_x = J^T c_y                                          J^T is the function's own backward
    identity    c_x = (y / x) c_y, at x = 0 its limit f'(0) c_y        as activation functions, AttnLRP eq. 9
    norm        the same, y / x being weight / sigma                   RMSNorm and kin, AttnLRP Prop. 3.4
    product     c_x = J^T c_y / n, n the number of activations         AttnLRP eq. 7
    gated       y = f(gate) up: c_gate = (y / gate) c_y / 2, c_up = J^T c_y / 2
    attention   c_q, c_k, c_v = J^T c_y times composite.qkv            AttnLRP eq. 13
    constant    c_x = 0
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lxt.attention import under_rule
from lxt.coefficients import wide
from lxt.composites import Composite
from lxt.declarations import Declaration
from lxt.marks import activations, copy_mark, mark
from lxt.rules import scale_gradient, stop

__all__ = ["apply", "stand_in"]

Call = Callable[..., Any]


def apply(composite: Composite, declaration: Declaration, function: Call, args: tuple[Any, ...], kwargs: dict) -> Any:
    """`function(*args, **kwargs)` under the declared rule.

    Raises:
        ValueError: the call doesn't have the form that the rule is for.
    """
    rule = declaration.rule
    if rule == "constant":
        return function(*_each(stop, args), **_each(stop, kwargs))
    if rule == "product" and composite.product != "gradient":
        share = 1 / max(len(activations((args, kwargs))), 1)
        args, kwargs = (_each(lambda x: scale_gradient(x, share), part) for part in (args, kwargs))
    if rule in ("identity", "norm"):
        return _identity(composite, declaration, function, args, kwargs)
    if rule in ("gated", "attention"):
        return (_gated if rule == "gated" else _attention)(composite, declaration, function, args, kwargs)
    return function(*args, **kwargs)


def _identity(
    composite: Composite, declaration: Declaration, function: Call, args: tuple[Any, ...], kwargs: dict
) -> Any:
    inputs = activations((args, kwargs))
    if len(inputs) != 1:
        raise ValueError(
            f"{declaration.name} is declared {declaration.rule!r}, the rule of a function of one activation, but got "
            f'{len(inputs)}; a function of several is "linear", "product" or "gated", or has a reference of yours'
        )
    (x,) = inputs
    if (composite.activation if declaration.rule == "identity" else composite.norm) == "gradient":
        y = function(*args, **kwargs)
    else:
        at_zero = _AtZero.apply(x, 1.0)
        y = function(*_each(lambda _: at_zero, args), **_each(lambda _: at_zero, kwargs))
        y = _Quotient.apply(x, _same_shape(declaration, x, y), 1.0)
    return mark(y, "gate") if declaration.rule == "identity" else y


def _gated(composite: Composite, declaration: Declaration, function: Call, args: tuple[Any, ...], kwargs: dict) -> Any:
    places = declaration.places(len(args))
    gate, up = (_at(args, kwargs, place) for place in places)
    share = 0.5 if composite.product == "uniform" and gate.requires_grad and up.requires_grad else 1.0
    if composite.product == "stop_gate" and up.requires_grad:
        gate_in, quotient = stop(gate), False
    elif composite.activation == "identity" and gate.requires_grad:
        gate_in, quotient = _AtZero.apply(gate, share), True
    else:
        gate_in, quotient = (scale_gradient(gate, share) if gate.requires_grad else gate), False
    up_in = scale_gradient(up, share) if up.requires_grad else up
    y = _called(function, args, kwargs, places, (gate_in, up_in))
    return _Quotient.apply(gate, _same_shape(declaration, gate, y), share) if quotient else y


def _attention(
    composite: Composite, declaration: Declaration, function: Call, args: tuple[Any, ...], kwargs: dict
) -> Any:
    if composite.softmax_temperature != 1 and composite.attention != "value_only":
        raise ValueError(
            f"Composite(softmax_temperature={composite.softmax_temperature}) needs the softmax, which "
            f"{declaration.name}, declared as attention, never shows; declare a reference written in torch operations"
        )
    places = declaration.places(len(args))
    given = [_at(args, kwargs, place) for place in places]
    if composite.attention != "gradient":  # what else depends on the input, a mask or a bias, is a constant
        mine = set(map(id, given))
        args, kwargs = (_each(lambda x: x if id(x) in mine else stop(x), part) for part in (args, kwargs))
    return _called(function, args, kwargs, places, under_rule(composite, *given))


def stand_in(declaration: Declaration, function: Call, reference: Call, args: tuple[Any, ...], kwargs: dict) -> Any:
    """The function's own numbers with the backward of `reference`, which is called with the same arguments.

    Raises:
        ValueError: the reference's numbers are others.
    """
    with torch.no_grad():
        value = function(*args, **kwargs)
    return _grafted(declaration, reference(*args, **kwargs), value)


def _grafted(declaration: Declaration, result: Any, value: Any) -> Any:
    if isinstance(result, (tuple, list)) and isinstance(value, (tuple, list)) and len(result) == len(value):
        parts = [_grafted(declaration, *pair) for pair in zip(result, value, strict=True)]
        return type(result)(parts) if type(result) in (tuple, list) else tuple(parts)
    if not isinstance(result, Tensor) or not isinstance(value, Tensor):
        return value
    close = torch.finfo(value.dtype).eps ** 0.5 if value.is_floating_point() else 0.0
    same = result.shape == value.shape
    scale = distance = 0.0
    if same and value.numel():
        scale = float(torch.where(value.isfinite(), value, 0).abs().amax())
        equal = (result == value) | (result.isnan() & value.isnan())  # infinities have no difference
        distance = float(torch.where(equal, 0, result.detach() - value).abs().amax())
    if not same or not distance <= close * scale:
        found = f"differs by {distance:.2g} of at most {scale:.2g}" if same else f"has shape {tuple(result.shape)}"
        raise ValueError(
            f"the reference declared for {declaration.name} {found}, where {declaration.name} gives shape "
            f"{tuple(value.shape)}: it must compute the same"
        )
    return copy_mark(result, _Graft.apply(result, value)) if result.requires_grad else value


def _same_shape(declaration: Declaration, x: Tensor, y: Any) -> Tensor:
    if isinstance(y, Tensor) and y.shape == x.shape:
        return y
    got = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
    raise ValueError(
        f"{declaration.name} is declared {declaration.rule!r} and must return one tensor of its input's shape "
        f"{tuple(x.shape)}, got {got}; declare a reference written in torch operations in its place"
    )


def _at(args: tuple[Any, ...], kwargs: dict, place: int | str) -> Any:
    return args[place] if isinstance(place, int) else kwargs[place]


def _called(function: Call, args: tuple[Any, ...], kwargs: dict, places: tuple, values: tuple) -> Any:
    positional, named = list(args), dict(kwargs)
    for place, value in zip(places, values, strict=True):
        if isinstance(place, int):
            positional[place] = value
        else:
            named[place] = value
    return function(*positional, **named)


def _each(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with every activation in it changed."""
    if isinstance(value, Tensor):
        return change(value) if value.requires_grad else value
    if type(value) in (tuple, list):
        return type(value)(_each(change, item) for item in value)
    return {key: _each(change, item) for key, item in value.items()} if type(value) is dict else value


class _AtZero(torch.autograd.Function):
    """Lets coefficients through where x is 0 only: the part of an identity rule that a quotient can't give."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float) -> Tensor:
        ctx.share = share
        ctx.save_for_backward(x)
        return torch.ops.aten._unsafe_view(x, x.shape)

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return torch.where(x == 0, c * ctx.share, 0.0), None


class _Quotient(torch.autograd.Function):
    """c_x = share (y / x) c_y where x isn't 0; the rest goes through y's own backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, share: float) -> Tensor:
        ctx.share = share
        ctx.save_for_backward(x, y)
        return torch.ops.aten._unsafe_view(y, y.shape)

    @staticmethod
    def backward(ctx: Any, c_y: Tensor) -> tuple[Tensor, Tensor, None]:
        x, y = ctx.saved_tensors
        dtype = wide(x.dtype)
        quotient = y.to(dtype) / torch.where(x == 0, 1.0, x.to(dtype))
        return torch.where(x == 0, 0.0, quotient * c_y * ctx.share).to(x.dtype), c_y, None


class _Graft(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, result: Tensor, value: Tensor) -> Tensor:
        return torch.ops.aten._unsafe_view(value, value.shape)

    @staticmethod
    def backward(ctx: Any, c_y: Tensor) -> tuple[Tensor, None]:
        return c_y, None
