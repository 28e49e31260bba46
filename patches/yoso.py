"""YOSO: attention by the expected number of hash collisions, or by hashing, in autograd functions of its own."""

from __future__ import annotations

from typing import Any

from lxt.declarations import Declaration
from lxt.mode import current_mode
from lxt.patches._forwards import rebound
from lxt.patchmap import PatchMap

__all__ = ["YOSO"]

_SLOTS = ("query", "key", "value")


class _Cumulation:
    """Weights times values, the weights a function of query and key: attention's shares, with their own backward."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def apply(self, *args: Any) -> Any:
        """The function under the attention rule; (query_mask, key_mask, query, key, value, config)."""
        mode = current_mode()
        if mode is None:
            return self.function.apply(*args)
        parameters = ("query_mask", "key_mask", *_SLOTS, "config")
        declaration = Declaration("attention", self.function.__name__, _SLOTS, parameters)
        return mode.declared(declaration, self.function.apply, args, {})


YOSO = PatchMap(
    architectures=("yoso",),
    forwards={"YosoSelfAttention": rebound(YosoCumulation=_Cumulation, YosoLSHCumulation=_Cumulation)},
    layers=("YosoLayer",),
    head="attention.output.dense",
    neuron="output.dense",
)
