"""Experts of every architecture whose gated product transformers leaves to a method: it runs as one operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lxt.composites import Composite
from lxt.mode import unwatched
from lxt.patches._forwards import bare, coefficient_of, is_fusable, is_watched
from lxt.rules import gated_product

__all__ = ["gated_experts", "has_gated_experts"]


def has_gated_experts(module: nn.Module) -> bool:
    """Whether the module multiplies act_fn(gate) and up, the halves of one projection, in transformers' own method."""
    gate = getattr(type(module), "_apply_gate", None)
    return getattr(gate, "__name__", "") == "_default_apply_gate" and hasattr(module, "act_fn")


def gated_experts(module: Any, composite: Composite) -> Callable | None:
    """The module's own forward in whatever implementation, with a fused gate; eager ones write theirs out."""
    if coefficient_of(module.act_fn) is None or not is_fusable(composite):
        return None

    def gate(experts: Any, gate_up: Tensor) -> Tensor:
        coefficient = coefficient_of(experts.act_fn)
        if coefficient is None or is_watched(experts.act_fn):
            return experts._apply_gate(gate_up)
        first, up = gate_up.chunk(2, dim=-1)
        stop_gate = composite.product == "stop_gate"
        return unwatched(gated_product, first, up, bare(experts.act_fn), coefficient, stop_gate)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return type(self).forward(_WithGate(self, gate), *args, **kwargs)

    return forward


class _WithGate:
    """The experts to all who ask, with another `_apply_gate`; the module itself stays as it is."""

    def __init__(self, experts: Any, gate: Callable[[Any, Tensor], Tensor]) -> None:
        self._experts, self._gate = experts, gate

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        return self._gate(self._experts, gate_up)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._experts, name)
