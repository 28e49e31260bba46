"""Upstream's three rules for models that are edited by hand: identity, uniform, stop.

hidden = identity_rule_implicit(self.act_fn, self.gate_proj(x))
hidden = divide_gradient(hidden * self.up_proj(x), 2)
x = (x - mean) / stop_gradient(std)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from lxt.coefficients import COEFFICIENTS, Coefficient, ratio
from lxt.opnames import CLOSED_FORMS, operation_name
from lxt.patches._forwards import coefficient_of
from lxt.rules import identity, scale_gradient, stop

__all__ = ["divide_gradient", "identity_rule_implicit", "stop_gradient"]


def identity_rule_implicit(fn: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
    """The identity rule (AttnLRP, arXiv 2402.05602, eq. 9) for an element-wise function: c_x = (f(x) / x) c_y.

    In closed form for the activations of torch and transformers; for others f(x) / x, and its one-sided limit where
    x is too small to divide by.

    Args:
        fn: element-wise, with fn(0) = 0; a function or a module.
        input: any shape.

    Raises:
        ValueError: fn(0) is not 0, so that no part of its output belongs to the input.
    """
    known = _known_coefficient(fn)
    if known is None and input.requires_grad:
        _refuse_offset(fn, input)
    forward = _out_of_place(fn) if _is_in_place(fn) else fn
    return identity(input, forward, known or partial(_quotient, forward))


def divide_gradient(input: Tensor, factor: float = 2) -> Tensor:
    """The uniform rule (AttnLRP eq. 7), behind a product of `factor` activations: c_x = c_y / factor."""
    if factor == 0:
        raise ValueError("divide_gradient needs a factor other than 0; stop_gradient stops the relevance")
    return scale_gradient(input, 1 / factor)


def stop_gradient(input: Tensor) -> Tensor:
    """A constant to the backward: no relevance flows through it (CP-LRP, Ali et al. 2022)."""
    return stop(input)


def _known_coefficient(fn: Callable) -> Coefficient | None:
    """The closed form of f(x) / x, None where there is none."""
    if isinstance(fn, nn.Module):
        return coefficient_of(fn)
    options: dict[str, object] = {}
    while isinstance(fn, partial) and not fn.args:
        options = fn.keywords | options
        fn = fn.func
    if getattr(fn, "__module__", None) not in _TORCH:
        return None  # a function of the user's that happens to be called gelu
    name = operation_name(fn).removesuffix("_")
    if name == "gelu":
        return COEFFICIENTS["gelu_tanh" if options.get("approximate") == "tanh" else "gelu"]
    return COEFFICIENTS.get(CLOSED_FORMS.get(name, ""))


# Where torch's own functions say they live; builtins as torch.tanh have no module.
_TORCH = (None, "torch", "torch.nn.functional", "torch._C._nn", "torch.special")


def _quotient(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    parameter = next(fn.parameters(), x) if isinstance(fn, nn.Module) else x  # some, as PReLU, don't promote
    info = torch.finfo(parameter.dtype)
    # Below this f(x) is subnormal and has lost digits, while f(x) / x has long reached its limit.
    smallest = info.tiny * 2.0 ** (info.bits - 16)
    x = torch.where(x.abs() < smallest, torch.copysign(torch.full_like(x, smallest), x), x)
    return ratio(fn(x.to(parameter.dtype)).to(x.dtype), x)


def _is_in_place(fn: Callable) -> bool:
    options = getattr(fn, "keywords", {})
    return bool(options.get("inplace") or getattr(fn, "inplace", False)) or operation_name(fn).endswith("_")


def _out_of_place(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`fn` on a copy: the backward needs the input as it was."""
    return lambda x: fn(x.clone())


def _refuse_offset(fn: Callable[[Tensor], Tensor], input: Tensor) -> None:
    with torch.no_grad():
        at_zero = fn(torch.zeros_like(input))
    if bool((at_zero != 0).any()):
        raise ValueError(
            f"the identity rule needs a function with f(0) = 0, got {operation_name(fn)!r} with f(0) = "
            f"{at_zero.flatten()[0].item():.4g}; a gate such as sigmoid is a constant: stop_gradient(fn(input))"
        )
