"""What handlers do with operands: put them in their places, make them constants, hand them on.

A handler is called as handler(func, args, kwargs) in place of func(*args, **kwargs), with gradients on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lxt import rules

__all__ = ["Handler", "constant", "positional", "run", "stop_all", "swap"]

Handler = Callable[[Callable, tuple[Any, ...], dict[str, Any]], Any]


def stop_all(value: Any) -> Any:
    """`value` with every activation in it made a constant."""
    if isinstance(value, Tensor):
        return rules.stop(value) if value.requires_grad else value
    if isinstance(value, (tuple, list)):
        return type(value)([stop_all(item) for item in value])
    return {key: stop_all(item) for key, item in value.items()} if isinstance(value, dict) else value


def positional(args: tuple[Any, ...], kwargs: dict[str, Any], *slots: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Operands that came by name, moved to their place; a slot is the names that torch has for one operand."""
    operands, options = list(args), dict(kwargs)
    for slot in slots[len(args) :]:
        name = next((name for name in slot.split() if name in options), None)
        if name is None:
            break
        operands.append(options.pop(name))
    return tuple(operands), options


def swap(value: Any, tensors: Mapping[int, Tensor]) -> Any:
    """`value` with the tensors of these ids in it replaced."""
    if isinstance(value, (tuple, list)):
        return type(value)([swap(item, tensors) for item in value])
    if isinstance(value, dict):
        return {key: swap(item, tensors) for key, item in value.items()}
    return tensors.get(id(value), value)


def constant(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """All its operands are constants."""
    return func(*stop_all(args), **stop_all(kwargs))


def run(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """As it is: the plain gradient is the rule."""
    return func(*args, **kwargs)
