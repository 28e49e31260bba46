"""Handlers of activation functions: element-wise functions with f(0) = 0 get the identity rule, and mark a gate."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lxt import opnames, rules
from lxt.carrying import overwrite
from lxt.coefficients import ratio
from lxt.marks import mark, mark_of
from lxt.operands import positional, stop_all

__all__ = ["by_ratio", "closed_form", "gelu", "marking_gate"]


def gelu(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One of the two forms of GELU."""
    approximate = args[1] if len(args) > 1 else kwargs.get("approximate", "none")
    return closed_form("gelu_tanh" if approximate == "tanh" else "gelu", func, args, kwargs)


def closed_form(form: str, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """f(x) / x is the function called `form` in lxt.coefficients."""
    x, *rest = args if args else (kwargs["input"],)
    options = {key: value for key, value in kwargs.items() if key not in ("input", "inplace")}
    in_place = kwargs.get("inplace") or (rest and rest[0] is True)
    if in_place:
        x, target, rest = x.clone(), x, []
    result = mark(rules.identity(x, lambda x: func(x, *rest, **options), form), "gate")
    return overwrite(target, result) if in_place else result


def by_ratio(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """f(x) / x is computed by dividing; a function with f(0) other than 0 is a constant."""
    args, kwargs = positional(args, kwargs, "input self")
    x, rest = args[0], stop_all(args[1:])
    options = stop_all({key: value for key, value in kwargs.items() if key != "inplace"})
    at_zero, slope = _near_zero(func, rest, options, x)
    if at_zero:  # a lower bound above 0 and kin
        result = func(rules.stop(x), *rest, **options)
    else:

        def function(x: Tensor) -> Tensor:
            return func(x, *rest, **options)

        dtype = x.dtype
        base = x.clone() if kwargs.get("inplace") else x
        result = rules.identity(base, function, lambda x: ratio(function(x.to(dtype)).to(x.dtype), x, slope))
        # a bound is not an activation: models clamp gate and up alike
        mark(result, mark_of(x) if opnames.operation_name(func) in opnames.BOUNDS else "gate")
    return overwrite(x, result) if kwargs.get("inplace") else result


def _near_zero(func: Callable, rest: tuple[Any, ...], options: dict[str, Any], x: Tensor) -> tuple[bool, float]:
    """Whether f(0) is something else than 0, and f(x) / x as x rises to 0."""
    if any(isinstance(value, Tensor) for value in (*rest, *options.values())):
        return bool((func(torch.zeros_like(x), *rest, **options) != 0).any()), 1.0
    try:
        return _probed(func, rest, tuple(options.items()))
    except TypeError:  # an option that can't be hashed, such as a list
        return _probed.__wrapped__(func, rest, tuple(options.items()))


@functools.lru_cache(maxsize=256)
def _probed(func: Callable, rest: tuple[Any, ...], options: tuple[tuple[str, Any], ...]) -> tuple[bool, float]:
    points = torch.tensor([0.0, -1e-20], dtype=torch.float64)
    at_zero, below = func(points, *rest, **dict(options)).tolist()
    return at_zero != 0, below / -1e-20


def marking_gate(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The plain gradient, under composites that ask for it; a gate all the same."""
    return mark(func(*args, **kwargs), "gate")
