"""Which tensors are activations, and the marks that ride on them.

A tensor is marked "gate" where it is the output of an activation function, "weights" where it is a softmax's, and
"shifted" where it is an activation plus a number (lxt.shifted).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["activations", "all_marked", "copy_mark", "is_activation", "mark", "mark_of"]

_MARK = "_lxt_mark"


def activations(value: Any) -> list[Tensor]:
    """The tensors that require grad in nested tuples, lists and dicts, in order."""
    found: list[Tensor] = []
    _collect(value, found)
    return found


def _collect(value: Any, found: list[Tensor]) -> None:
    if isinstance(value, Tensor):
        if value.requires_grad:
            found.append(value)
    elif isinstance(value, (tuple, list)):
        for item in value:
            _collect(item, found)
    elif isinstance(value, dict):
        for item in value.values():
            _collect(item, found)


def is_activation(value: Any) -> bool:
    """Whether it is a tensor that requires grad."""
    return isinstance(value, Tensor) and value.requires_grad


def mark_of(value: Any) -> str | None:
    """The mark on a tensor, None where there is none."""
    return getattr(value, _MARK, None)


def all_marked(value: Any, name: str) -> bool:
    """Whether no activation in nested tuples, lists and dicts is without the mark `name`."""
    if isinstance(value, Tensor):
        return not value.requires_grad or getattr(value, _MARK, None) == name
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return True
    for item in value:
        if not all_marked(item, name):
            return False
    return True


def mark(result: Any, name: str | None) -> Any:
    """`result`, with the mark `name` on it, or on each of its tensors."""
    if isinstance(result, Tensor):
        setattr(result, _MARK, name)
        return result
    for tensor in result:
        if isinstance(tensor, Tensor):  # x.type() is a string
            setattr(tensor, _MARK, name)
    return result


def copy_mark(source: Any, result: Any) -> Any:
    """`result`, with the mark of `source`, if it has one."""
    name = mark_of(source)
    return result if name is None else mark(result, name)
