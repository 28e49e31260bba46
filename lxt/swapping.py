"""Give a module, or a class, another forward, and put the former one back exactly."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

__all__ = ["ForwardMaker", "has_class_forward", "swap_class_forward", "swap_forward"]

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
    previous, on_class = own.get(slot, _ABSENT), has_class_forward(module)

    def call_previous(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return type(module).forward(module, *args, **kwargs) if previous is _ABSENT else previous(*args, **kwargs)

    made, home = make(call_previous), weakref.ref(module)
    theirs: Any = previous.__func__ if isinstance(previous, MethodType) else type(module).forward
    of_copies = getattr(theirs, "of_copies", theirs)  # ours may come on top of ours

    @functools.wraps(type(module).forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # A deep copy takes this forward with it; it is a model of its own, without rules.
        return (made if self is home() else of_copies)(self, *args, **kwargs)

    forward.of_copies = of_copies  # type: ignore[attr-defined]
    forward.on_class = on_class  # type: ignore[attr-defined]
    replacement = MethodType(forward, module)
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


def has_class_forward(module: nn.Module) -> bool:
    """Whether below our forwards, and accelerate's, an instance has its class's and nobody else's."""
    own = module.__dict__
    forward = own.get("_old_forward", own.get("forward"))
    function = getattr(forward, "__func__", forward)
    return forward is None or function is type(module).forward or getattr(function, "on_class", False)


def swap_class_forward(cls: type[nn.Module], make: ForwardMaker, name: str = "forward") -> Callable[[], None]:
    """The same for all instances of a class: their forward, or their `__call__`."""
    own, previous = cls.__dict__.get(name, _ABSENT), getattr(cls, name)
    replacement = functools.wraps(previous)(make(previous))
    setattr(cls, name, replacement)

    def restore() -> None:
        if cls.__dict__.get(name) is not replacement:
            return  # somebody wrapped it since; ours passes calls through
        if own is _ABSENT:
            delattr(cls, name)
        else:
            setattr(cls, name, own)

    return restore
