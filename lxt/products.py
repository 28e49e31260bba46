"""Handlers of what multiplies activations: products, matrix products, attention, powers, divisions and solves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lxt import linear_rules, opnames, rules
from lxt.attention import scaled_dot_product_attention
from lxt.composites import Composite, Epsilon, Gamma
from lxt.marks import activations, copy_mark, is_activation, mark, mark_of
from lxt.operands import constant, positional, stop_all, swap

__all__ = [
    "division",
    "glu",
    "grid_sampler",
    "linear_layer",
    "matrix_product",
    "power",
    "product",
    "reduction",
    "sdpa",
    "shared",
    "softmax",
    "solve",
    "square",
    "sum_of_product",
]


def shared(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A product of all its operands: 1/n for each of n activations."""
    result = func(*args, **kwargs)
    factors = len(activations((args, kwargs)))
    return result if factors < 2 else rules.scale_gradient(result, 1 / factors)


def product(composite: Composite, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The uniform rule: one half each; a gate, or a router's weight, may be a constant instead."""
    if len(args) != 2:
        args, kwargs = positional(args, kwargs, "input self", "other")
    a, b = args
    if not (is_activation(a) and is_activation(b)):
        return copy_mark(a if is_activation(a) else b, func(*args, **kwargs))
    if composite.softmax_temperature != 1 and "weights" in (mark_of(a), mark_of(b)):
        raise ValueError(
            f"Composite(softmax_temperature={composite.softmax_temperature}) is for attention, but a softmax met an "
            "element-wise product, as a router's does, and its backward can't be told from attention's; use 1.0"
        )
    for stops, name in ((composite.router == "stop", "weights"), (composite.product == "stop_gate", "gate")):
        if stops and (mark_of(a) == name) != (mark_of(b) == name):
            return func(rules.stop(a), b) if mark_of(a) == name else func(a, rules.stop(b))
    return rules.scale_gradient(func(*args, **kwargs), 0.5)


def _pair(composite: Composite, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The two factors of q k^T, of weights times values, or of another sum of products, with their shares."""
    query, key, value = composite.qkv
    if composite.attention == "gradient":
        return a, b
    if composite.attention == "value_only" or (query, key, value) == (0.25, 0.25, 0.5):
        return rules.scale_gradient(a, 0.5), rules.scale_gradient(b, 0.5)
    if query != key:
        raise ValueError(
            f"Composite(qkv={composite.qkv}) with different factors for query and key can't reach attention that is "
            'written out as matrix products; use model.set_attn_implementation("sdpa"), or equal factors'
        )
    if "weights" not in (mark_of(a), mark_of(b)):
        return rules.scale_gradient(a, 0.5), rules.scale_gradient(b, 0.5)
    # q k^T gives both one half; the rest of their factor goes on the weights.
    first, second = (2 * query if mark_of(x) == "weights" else value for x in (a, b))
    return rules.scale_gradient(a, first), rules.scale_gradient(b, second)


def matrix_product(composite: Composite, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The uniform rule for two activations; with a learned matrix it is a linear layer."""
    if len(args) == 2 and is_activation(args[0]) != is_activation(args[1]) and not kwargs:  # with a constant, mostly
        if composite.linear == _PLAIN and not isinstance(args[1], (list, tuple)):
            return func(*args)
    if len(args) == 2 and isinstance(args[1], (list, tuple)):  # einsum(equation, operands)
        args = (args[0], *args[1])
    factors = activations((args, kwargs))
    if len(factors) == 1 and composite.linear != _PLAIN and "weights" not in map(mark_of, args):
        return linear_rules.learned_product(func, args, kwargs, composite.linear)
    if composite.attention == "gradient":
        return func(*args, **kwargs)
    if len(factors) != 2 or composite.attention == "value_only" or composite.qkv == (0.25, 0.25, 0.5):
        return shared(func, args, kwargs)
    shares = dict(zip(map(id, factors), _pair(composite, *factors), strict=True))
    if len(shares) == 1:  # one tensor twice
        return shared(func, args, kwargs)
    return func(*swap(args, shares), **swap(kwargs, shares))


_PLAIN = Epsilon()
_SUM_OPERANDS = ("input self", "mat1 batch1 tensor1 vec1 mat", "mat2 batch2 tensor2 vec2 vec")


def sum_of_product(composite: Composite, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`product` or `matrix_product`, with a summand that passes."""
    (summand, a, b, *rest), kwargs = positional(args, kwargs, *_SUM_OPERANDS)
    pointwise = opnames.operation_name(func).startswith("addcmul")
    if composite.linear != _PLAIN and not pointwise and is_activation(a) != is_activation(b):
        if "weights" not in (mark_of(a), mark_of(b)):
            return linear_rules.sum_of_product(func, (summand, a, b, *rest), kwargs, composite.linear)
    if is_activation(a) and is_activation(b):
        if not pointwise:
            a, b = _pair(composite, a, b)
        elif composite.product != "gradient":
            a, b = rules.scale_gradient(a, 0.5), rules.scale_gradient(b, 0.5)
    return func(summand, a, b, *rest, **kwargs)


def linear_layer(
    composite: Composite, rule: Epsilon | Gamma, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The composite's rule for linear layers; a weight that depends on the input is a factor."""
    if rule == _PLAIN and len(args) > 1 and not args[1].requires_grad:
        return linear_rules.with_gradient(func(*args, **kwargs), args[1])
    (x, weight, *rest), kwargs = positional(args, kwargs, "input", "weight", "bias")
    if is_activation(weight):
        x, weight = _pair(composite, x, weight) if is_activation(x) else (x, weight)
        return func(x, weight, *rest, **kwargs)
    if rule == _PLAIN:
        return linear_rules.with_gradient(func(x, weight, *rest, **kwargs), weight)
    if type(weight) not in (Tensor, torch.nn.Parameter):
        raise linear_rules.unreachable(rule, type(weight).__name__)
    bias = rest.pop(0) if rest else None
    return linear_rules.linear(x, weight, bias, lambda x, w, b: func(x, w, b, *rest, **kwargs), rule)


def division(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The denominator is a constant."""
    args, kwargs = positional(args, kwargs, "input self")
    return copy_mark(args[0], func(args[0], *stop_all(args[1:]), **stop_all(kwargs)))


def solve(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The matrix is a denominator and so a constant; the solution is linear in the right-hand side."""
    args, kwargs = positional(args, kwargs, "input self A", "other B")
    return func(stop_all(args[0]), *args[1:], **kwargs)


def power(composite: Composite, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """x^p is a product of p factors where p >= 1, a constant otherwise."""
    base, exponent = positional(args, kwargs, "input self", "exponent")[0]
    if type(exponent) in (int, float) and exponent == 2 and len(args) == 2 and is_activation(base):
        return square(composite, func, args, kwargs)
    if isinstance(exponent, Tensor) and exponent.dim() == 0 and not exponent.requires_grad:
        exponent = exponent.item()
    if not is_activation(base) or not isinstance(exponent, (int, float)) or exponent < 1:
        return constant(func, args, kwargs)
    share = 1.0 if _ends_activation(composite, base) else 1 / float(exponent)
    return copy_mark(base, rules.scale_gradient(func(*args, **kwargs), share))


def square(composite: Composite, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A product of two equal factors."""
    base = args[0] if args else positional(args, kwargs, "input self")[0][0]
    if _ends_activation(composite, base):
        return copy_mark(base, func(*args, **kwargs))
    # Torch squares by multiplying, and half the gradient is that of one factor; float_power and autocast widen.
    if kwargs or opnames.operation_name(func) == "float_power" or torch.is_autocast_enabled(base.device.type):
        return copy_mark(base, rules.scale_gradient(func(*args, **kwargs), 0.5))
    return copy_mark(base, base * rules.stop(base))


def _ends_activation(composite: Composite, base: Tensor) -> bool:
    """Whether a power belongs to an activation function, as in relu(x)^2, that is differentiated as a whole."""
    return composite.activation == "gradient" and mark_of(base) == "gate"


def reduction(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Sums, means and selections are linear; a product of what falls together is not."""
    multiplies = any(isinstance(value, str) and value == "prod" for value in (*args, *kwargs.values()))
    return constant(func, args, kwargs) if multiplies else func(*args, **kwargs)


def softmax(composite: Composite, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Marks weights; a constant under CP-LRP."""
    if composite.attention == "value_only":
        return mark(constant(func, args, kwargs), "weights")
    if composite.softmax_temperature == 1:
        return mark(func(*args, **kwargs), "weights")
    named = dict(zip(("input", "dim", "dtype"), args[: 2 + isinstance(args[-1], torch.dtype)], strict=False)) | kwargs
    weights = rules.tempered_softmax(named["input"], named["dim"], named.get("dtype"), composite.softmax_temperature)
    return mark(weights, "weights")


def sdpa(composite: Composite, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The attention rule: lxt.attention."""
    return scaled_dot_product_attention(composite, *args, **kwargs)


def glu(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The gate is a constant: rules.glu."""
    return rules.glu(*args, **kwargs)


def grid_sampler(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The places to sample at are constants."""
    return func(args[0], *stop_all(args[1:]), **stop_all(kwargs))
