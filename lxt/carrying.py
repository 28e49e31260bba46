"""Handlers of sums, copies and writes: the plain gradient is their rule, and they decide which mark the result has."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from lxt.marks import all_marked, copy_mark, is_activation, mark, mark_of
from lxt.operands import Handler, positional

__all__ = ["copy", "in_place", "keep_weights", "overwrite", "scalar_sum", "scalar_sum_in_place", "set_item"]

SMALLEST_GATE_SCALAR = 1e-2  # a larger Python scalar added to an activation makes a gate; a smaller one is an epsilon


def keep_weights(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What is put together of softmax weights alone is softmax weights."""
    weights = all_marked((args, kwargs), "weights")
    result = func(*args, **kwargs)
    return mark(result, "weights") if weights else result


def scalar_sum(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A Python scalar added to an activation makes a gate where the sum is a factor: see lxt.shifted."""
    a, b = args[:2] if len(args) > 1 else positional(args, kwargs, "input self", "other")[0][:2]
    result = func(*args, **kwargs)
    if _is_shift(a) or _is_shift(b):
        return mark(result, "shifted")
    return mark(result, "weights") if mark_of(a) == "weights" and _are_weights((a, b)) else result


def _is_shift(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) > SMALLEST_GATE_SCALAR


def _are_weights(operands: Iterable[Any]) -> bool:
    return all(is_activation(x) and mark_of(x) == "weights" for x in operands)


def scalar_sum_in_place(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`scalar_sum` into its first operand, which loses the mark it had."""
    target, other = positional(args, kwargs, "self", "other")[0][:2]
    if _is_shift(other):
        return mark(func(*args, **kwargs), "shifted")
    name = "weights" if _are_weights((target, other)) else None
    return mark(func(*args, **kwargs), name)


def copy(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What is copied into has the mark of what comes in."""
    source = args[1] if len(args) > 1 else kwargs.get("src")
    return mark(func(*args, **kwargs), mark_of(source))  # and not that of what was there


def set_item(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A mark stays where what comes in has it too; softmax weights written into constants are softmax weights."""
    target, _, source = args
    if is_activation(source):
        before = mark_of(target) if is_activation(target) else "weights"
        mark(target, before if mark_of(source) == before else None)
    func(*args, **kwargs)


def overwrite(target: Tensor, result: Tensor) -> Tensor:
    """`result` in the memory of `target`; a constant leaves no activation behind."""
    constant = not result.requires_grad and target.requires_grad
    if constant and target._is_view():
        # torch can't detach a part: it goes on as a factor that is a constant where another is none
        return mark(target.copy_(result), "shifted")
    if constant:
        target.detach_()
    return mark(target.copy_(result), mark_of(result))


def in_place(handler: Handler, out_of_place: Callable) -> Handler:
    """An in-place operation computed out of place, on a copy, then copied back: what was saved stays as it was."""

    def handle(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = handler(out_of_place, (copy_mark(args[0], args[0].clone()), *args[1:]), kwargs)
        return overwrite(args[0], result)

    return handle
