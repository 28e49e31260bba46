"""Temporary changes to a model that several runs share: made by the first that needs them, undone by the last."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

__all__ = ["Holds", "make_constant", "make_still"]

Undo = Callable[[], Any]


class Holds:
    """Counts, for each changed object, the runs that need the change; safe for threads that run one model together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[Any, tuple[int, Undo]] = {}

    @contextmanager
    def hold(self, objects: Iterable[Any], change: Callable[[Any], Undo | None]) -> Iterator[None]:
        """Meanwhile all `objects` are changed.

        Args:
            objects: hashable by identity.
            change: makes the change and returns how to undo it, or None where there is nothing to change.
        """
        mine: list[Any] = []
        try:
            with self._lock:
                for item in objects:
                    count, undo = self._held.get(item) or (0, change(item))
                    if undo is not None:
                        self._held[item] = count + 1, undo
                        mine.append(item)
            yield
        finally:
            with self._lock:
                for item in mine:
                    count, undo = self._held.pop(item)
                    if count > 1:
                        self._held[item] = count - 1, undo
                    else:
                        undo()


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
    if module.training and not getattr(module, "gradient_checkpointing", False):
        module.training = False
        return partial(setattr, module, "training", True)
    own = module.__dict__
    still: dict[str, Any] = {"layerdrop": 0.0} if module.training and own.get("layerdrop") else {}
    rates = getattr(own.get("config"), "__dict__", {})
    if module.training and any(rate for name, rate in rates.items() if name.endswith("layerdrop")):
        still["config"] = copy.copy(own["config"])  # others may have this one, too
        for name in rates:
            if name.endswith("layerdrop"):
                setattr(still["config"], name, 0.0)
    before = {name: own[name] for name in still}
    own.update(still)
    return partial(own.update, before) if before else None
