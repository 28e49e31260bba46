"""PatchMap: what lxt knows about one architecture family beyond what the operator mode finds out by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn

from lxt.composites import Composite

__all__ = ["ForwardFactory", "PatchMap"]

ForwardFactory = Callable[[nn.Module, Composite], Callable | None]
"""(module, composite) -> a forward taking `self` first, or None to leave the module to the operator mode."""


@dataclass(frozen=True)
class PatchMap:
    """The fused forwards and the latents of one architecture family.

    Attributes:
        architectures: `config.model_type` values that the map serves.
        forwards: class name -> factory of the fused forward.
        layers: class names of the layers whose outputs are the residual stream.
        head: path inside a layer to the attention's output projection; its input holds the heads,
            [batch, token, head * d_head].
        neuron: path inside a layer to the MLP's down projection; its input holds the neurons,
            [batch, token, d_mlp].
        tokens_first: whether the layers hand on [token, batch, hidden].
        operations: names of operations that the mode doesn't know -> "linear" (the plain gradient is right),
            "identity" (element-wise with f(0) = 0), "product" or "constant".
        rules: the composite that belongs to the map, where it is made for one; None leaves it to the caller.
    """

    architectures: tuple[str, ...] = ()
    forwards: Mapping[str, ForwardFactory] = field(default_factory=dict)
    layers: tuple[str, ...] = ()
    head: str | None = None
    neuron: str | None = None
    tokens_first: bool = False
    operations: Mapping[str, str] = field(default_factory=dict)
    rules: Composite | None = None
