"""Temporary changes to a model that several runs share: made by the first that needs them, undone by the last."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

__all__ = ["Holds", "make_constant", "make_still", "parts_of"]

Undo = Callable[[], Any]


class Holds:
    """Counts, for each changed object, the runs that need the change; safe for threads that run one model together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[int, tuple[int, Undo, Any]] = {}  # id -> how many runs, how to undo it, the object

    @contextmanager
    def hold(self, objects: Iterable[Any], change: Callable[[Any], Undo | None]) -> Iterator[None]:
        """Meanwhile all `objects` are changed.

        Args:
            objects: those that may need the change.
            change: makes the change and returns how to undo it, or None where there is nothing to change.
        """
        mine: list[int] = []
        try:
            with self._lock:
                for item in objects:
                    count, undo, _ = self._held.get(id(item)) or (0, change(item), item)
                    if undo is not None:
                        self._held[id(item)] = count + 1, undo, item
                        mine.append(id(item))
            yield
        finally:
            with self._lock:
                for key in mine:
                    count, undo, item = self._held.pop(key)
                    if count > 1:
                        self._held[key] = count - 1, undo, item
                    else:
                        undo()


def parts_of(module: nn.Module) -> tuple[list[nn.Module], list[nn.Parameter]]:
    """All its modules and all their parameters, each once; torch's own walks also put their names together."""
    modules: dict[nn.Module, None] = {}
    parameters: dict[int, nn.Parameter] = {}
    todo: list[nn.Module | None] = [module]
    while todo:
        part = todo.pop()
        if part is None or part in modules:
            continue
        modules[part] = None
        todo += part._modules.values()
        for parameter in part._parameters.values():
            if parameter is not None:
                parameters[id(parameter)] = parameter
    return list(modules), list(parameters.values())


def make_constant(parameter: nn.Parameter) -> Undo | None:
    """A parameter that the rules don't take for an activation."""
    if not parameter.requires_grad:
        return None
    if not parameter.is_leaf:
        raise ValueError(
            f"a parameter of shape {tuple(parameter.shape)} was computed from others, as torch.func.functional_call "
            "has it, and can't be a constant to the rules; pass it detached"
        )
    parameter.requires_grad_(False)
    return partial(parameter.requires_grad_, True)


def make_still(module: nn.Module) -> Undo | None:
    """A module without randomness: dropped paths and layers follow its training flag.

    A module that checkpoints keeps the flag, since transformers asks for it then, and drops no layers all the same.
    """
    if not module.training:
        return None
    if not getattr(module, "gradient_checkpointing", False):
        module.training = False
        return partial(setattr, module, "training", True)
    own = module.__dict__
    still: dict[str, Any] = {"layerdrop": 0.0} if own.get("layerdrop") else {}
    rates = getattr(own.get("config"), "__dict__", {})
    if any(rate for name, rate in rates.items() if name.endswith("layerdrop")):
        still["config"] = copy.copy(own["config"])  # others may have this one, too
        for name in rates:
            if name.endswith("layerdrop"):
                setattr(still["config"], name, 0.0)
    before = {name: own[name] for name in still}
    own.update(still)
    return partial(own.update, before) if before else None
