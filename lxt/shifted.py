"""A number added to an activation, as in (up + 1) * glu or 1 + tanh(x): a gate where it is a factor, else a bias.

The sum is marked "shifted". With no input it still has a value, so a product with it has relevance for the other
factor only, and a function of it is a constant. So has a product of nothing but shifted factors, which is shifted too:
in linear attention, (elu(q) + 1) (elu(k) + 1)^T v, the values take all. The mark stays on what only masks, scales, sums
up or puts together. In a linear map the number takes its share, as biases do: images are centred that way, and their
pixels must not lose their relevance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lxt import rules
from lxt.marks import activations, all_marked, is_activation, mark, mark_of

__all__ = ["constant_if_shifted", "keep_shifted", "shifted_is_constant"]

_Handler = Callable[[Callable, tuple[Any, ...], dict[str, Any]], Any]


def shifted_is_constant(handler: _Handler, summands: int = 0) -> _Handler:
    """The handler of a product, with shifted factors as constants where another factor is none.

    Args:
        handler: of a product.
        summands: how many operands stand before its factors.
    """

    def handle(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not kwargs and not _may_be_shifted(args):
            return handler(func, args, kwargs)
        factors = activations((args[summands:], kwargs))
        shifted = sum(mark_of(factor) == "shifted" for factor in factors)
        if 0 < shifted < len(factors):
            args = (*args[:summands], *map(_stopped, args[summands:]))
            kwargs = {name: _stopped(value) for name, value in kwargs.items()}
        elif shifted > 1 and all(mark_of(summand) == "shifted" for summand in activations(args[:summands])):
            return mark(handler(func, args, kwargs), "shifted")
        return handler(func, args, kwargs)

    return handle


def keep_shifted(handler: _Handler) -> _Handler:
    """The handler of what sums up or puts together: of shifted operands alone, the result is shifted."""

    def handle(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        shifted = all_marked((args, kwargs), "shifted")
        result = handler(func, args, kwargs)
        return mark(result, "shifted") if shifted else result

    return handle


def constant_if_shifted(handler: _Handler) -> _Handler:
    """The handler of an element-wise function, which is a constant where its operand is shifted."""

    def handle(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not kwargs and not _may_be_shifted(args):
            return handler(func, args, kwargs)
        if any(mark_of(x) == "shifted" for x in activations((args, kwargs))):
            args, kwargs = tuple(map(_stopped, args)), {name: _stopped(value) for name, value in kwargs.items()}
            return func(*args, **kwargs)
        return handler(func, args, kwargs)

    return handle


def _may_be_shifted(args: tuple[Any, ...]) -> bool:
    """A quick look: nearly nothing is."""
    for value in args:
        if mark_of(value) == "shifted" or isinstance(value, (tuple, list)):
            return True
    return False


def _stopped(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)([_stopped(item) for item in value])
    return rules.stop(value) if is_activation(value) and mark_of(value) == "shifted" else value
