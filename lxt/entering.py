"""Enter a function that torch implements in Python, so that a mode sees its parts and not the whole once more."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any

import torch

__all__ = ["enter"]

_QUESTIONS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


def enter(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`func(*args, **kwargs)`, which does not first offer itself to the mode that is entered."""
    skip = getattr(torch._C, "_skip_one_hop_torch_function", None)
    if skip is not None:
        return skip(func, (), args, kwargs)
    return _unasking(func)(*args, **kwargs)  # an older torch


@functools.lru_cache(maxsize=256)
def _unasking(func: Any) -> Callable:
    """A copy of the function that asks for no mode, nor do its private parts; what else it calls asks as ever."""
    names = {name: func.__globals__.get(name) for name in func.__code__.co_names if name.startswith("_")}
    parts = {name: _unasking(x) for name, x in names.items() if isinstance(x, FunctionType) and x is not func}
    answers = dict.fromkeys(_QUESTIONS, lambda *_: False)
    cells = tuple(
        CellType(_unasking(cell.cell_contents)) if isinstance(cell.cell_contents, FunctionType) else cell
        for cell in func.__closure__ or ()
    )
    copy = FunctionType(
        func.__code__, func.__globals__ | answers | parts, func.__name__, func.__defaults__, cells or None
    )
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy
