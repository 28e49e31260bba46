"""Temporary changes to objects that several runs share: made by the first that needs them, undone by the last."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Holds"]

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
