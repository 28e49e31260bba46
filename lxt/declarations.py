"""What users declared: which rule stands for a function, a module or an operation of theirs.

A declaration rides on what it is about, and nowhere else: an attribute of the nn.Module, its class, the autograd
function or the wrapper of a plain function. Torch's operations can't carry one; they have the registry below, the
only one. The rules' mode and the auditor both read declarations and apply them each in its own way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import nn

__all__ = [
    "ALLOWED",
    "WATCHER",
    "Declaration",
    "Watcher",
    "attach",
    "declaration_of",
    "declared_operations",
    "register_operation",
]

ALLOWED = ("linear", "identity", "norm", "product", "gated", "attention", "constant")
_ATTRIBUTE = "_lxt_declaration"

# The one registry: names of torch operations -> their declaration. Replaced as a whole and never changed in place, so
# that readers need no lock.
_OPERATIONS: dict[str, Declaration] = {}
_OPERATIONS_LOCK = threading.Lock()


@dataclass(frozen=True)
class Declaration:
    """A rule, and for what.

    Attributes:
        rule: one of `ALLOWED`, or a reference implementation that stands in for the function.
        name: of what is declared, for messages.
        slots: names of the parameters that the rule tells apart: query, key and value, or gate and up.
        parameters: names of all parameters, in order.
    """

    rule: str | Callable[..., Any]
    name: str
    slots: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()

    def places(self, arguments: int) -> tuple[int | str, ...]:
        """Where the slots are in a call with that many positional arguments: an index, or a keyword."""
        indices = [self.parameters.index(slot) for slot in self.slots]
        return tuple(i if i < arguments else slot for i, slot in zip(indices, self.slots, strict=True))


Watcher = Callable[[Declaration, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""(declaration, function, args, kwargs) -> result: who runs declared functions while the auditor looks on."""
WATCHER: ContextVar[Watcher | None] = ContextVar("lxt_watcher", default=None)


def attach(thing: Any, declaration: Declaration | None) -> None:
    """Put a declaration on an object or class, or take off its own."""
    if declaration is not None:
        setattr(thing, _ATTRIBUTE, declaration)
    elif _ATTRIBUTE in vars(thing):
        delattr(thing, _ATTRIBUTE)


def declaration_of(thing: Any) -> Declaration | None:
    """What is declared for a module instance, a class or a function.

    A module has its own before its class's; a subclass with a forward of its own is something else than its base.
    """
    own = vars(thing).get(_ATTRIBUTE) if hasattr(thing, "__dict__") else None
    if own is not None or not isinstance(thing, nn.Module):
        return own
    for cls in type(thing).__mro__:
        if _ATTRIBUTE in vars(cls) or "forward" in vars(cls):
            return vars(cls).get(_ATTRIBUTE)
    return None


def register_operation(name: str, declaration: Declaration | None) -> None:
    """Enter a torch operation into the registry; None removes it."""
    global _OPERATIONS
    with _OPERATIONS_LOCK:
        others = {key: value for key, value in _OPERATIONS.items() if key != name}
        _OPERATIONS = others if declaration is None else {**others, name: declaration}


def declared_operations() -> Mapping[str, Declaration]:
    """The registry as it is now."""
    return _OPERATIONS
