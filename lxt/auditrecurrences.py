"""The auditor's reading of recurrences: which edges of the graph lead out of one to what steers it.

Calls of Python functions leave no trace in an autograd graph, so while the plain model runs a profile function looks at
each call. One whose parameters are those of a state-space scan, a delta rule or a matrix memory is a recurrence: what
autograd records during it is its inside, and each edge from there to a tensor that came in belongs to the parameter
that brought it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from lxt.composites import Composite

__all__ = ["Recurrences", "observed"]

# What a recurrence's parameters include -> those that carry values, and those that read the state.
_KINDS = {
    frozenset({"dt", "A", "B", "C"}): ({"hidden_states", "z", "state", "initial_states"}, {"C"}),
    frozenset({"query", "key", "value", "g", "beta"}): ({"value", "initial_state"}, {"query"}),
    frozenset({"query", "key", "value", "igate", "fgate"}): (
        {"value", "c_initial", "n_initial", "m_initial"},
        {"query"},
    ),
}


class Recurrences:
    """The outermost recurrences of one forward."""

    def __init__(self) -> None:
        self._calls: list[tuple[int, int, dict[tuple[Node, int], str]]] = []
        self._entered: tuple[FrameType, int, dict[tuple[Node, int], str]] | None = None

    def steers(self, node: Node, edge: int, composite: Composite) -> bool:
        """Whether an edge carries what the composite takes as a constant."""
        if composite.recurrence == "gradient":
            return False
        role = self._role(node, edge)
        return role == "steers" or (role == "reads" and composite.recurrence == "value_only")

    def _role(self, node: Node, edge: int) -> str | None:
        number, operand = node._sequence_nr(), node.next_functions[edge]
        return next((roles.get(operand) for start, end, roles in self._calls if start <= number < end), None)  # type: ignore[arg-type]

    def look(self, frame: FrameType, event: str, argument: Any) -> None:
        """The profile function: takes note of a recurrence's begin and end."""
        if event == "call" and self._entered is None and torch.is_grad_enabled():
            code = frame.f_code
            names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
            for wanted, (values, reads) in _KINDS.items():
                if wanted.issubset(names):
                    self._entered = frame, _number(), _roles(frame, names, values, reads)
        elif event == "return" and self._entered is not None and self._entered[0] is frame:
            _, start, roles = self._entered
            self._calls.append((start, _number(), roles))
            self._entered = None


def _roles(frame: FrameType, names: tuple[str, ...], values: set[str], reads: set[str]) -> dict[tuple[Node, int], str]:
    found: dict[tuple[Node, int], str] = {}
    for name in names:
        tensor = frame.f_locals.get(name)
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            edge = get_gradient_edge(tensor)
            found[edge.node, edge.output_nr] = "value" if name in values else "reads" if name in reads else "steers"
    return found


@contextmanager
def observed() -> Iterator[Recurrences]:
    """Meanwhile this thread's recurrences are noted; a profiler that was there is suspended."""
    found, former = Recurrences(), sys.getprofile()
    sys.setprofile(found.look)
    try:
        yield found
    finally:
        sys.setprofile(former)


def _number() -> int:
    return torch.autograd._get_sequence_nr()  # pyright: ignore[reportPrivateImportUsage]
