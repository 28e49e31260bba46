"""Give a module, or a class, another forward, and put the former one back exactly."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

__all__ = ["ForwardMaker", "swap_class_forward", "swap_forward"]

_ABSENT = object()

ForwardMaker = Callable[[Callable], Callable]
"""The former forward -> the new one; both take the module first."""


def swap_forward(module: nn.Module, make: ForwardMaker) -> Callable[[], None]:
    """Give one module instance another forward; returns how to put the former one back.

    accelerate keeps its hook in the instance's `forward` and the model's own in `_old_forward`, so where its hook is
    on, ours goes below it.
    """
    own = module.__dict__
    slot = "_old_forward" if "_old_forward" in own else "forward"
    previous = own.get(slot, _ABSENT)

    def call_previous(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return type(module).forward(module, *args, **kwargs) if previous is _ABSENT else previous(*args, **kwargs)

    replacement = MethodType(functools.wraps(type(module).forward)(make(call_previous)), module)
    own[slot] = replacement

    def restore() -> None:
        for slot in ("forward", "_old_forward"):
            if own.get(slot) is not replacement:
                continue
            if previous is not _ABSENT:
                own[slot] = previous
            elif slot == "forward":
                del own[slot]
            else:  # accelerate came after us and took ours for the model's own
                own[slot] = MethodType(type(module).forward, module)

    return restore


def swap_class_forward(cls: type[nn.Module], make: ForwardMaker) -> Callable[[], None]:
    """The same for all instances of a class."""
    own, previous = cls.__dict__.get("forward", _ABSENT), cls.forward
    replacement = functools.wraps(previous)(make(previous))
    cls.forward = replacement

    def restore() -> None:
        if cls.__dict__.get("forward") is not replacement:
            return  # somebody wrapped it since; ours passes calls through
        if own is _ABSENT:
            del cls.forward
        else:
            cls.forward = own

    return restore
