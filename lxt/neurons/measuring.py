"""Extremes, their places and moments of every neuron's relevance and activation, taken while the backward passes.

A `Measure` is an identity in the forward. When the gradient arrives, relevance is activation × gradient as everywhere;
both are reduced over the tokens on the spot, so that layers × tokens × neurons is never held.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lxt.checkpointing import carry, saved_as
from lxt.coefficients import wide
from lxt.latents import Site

__all__ = ["KINDS", "SIGNS", "Extremes", "Measured", "measured"]

KINDS = ("relevance", "activation")
SIGNS = {"positive": 1, "negative": -1}


@dataclass(frozen=True, eq=False)
class Extremes:
    """One quantity of a layer's neurons in a batch of windows.

    Attributes:
        score: by sign, [window, neuron]: the highest and the lowest value over the window's tokens.
        position: by sign, [window, neuron]: the first token that has it, in the padded batch.
        moments: [3, neuron]: over all tokens the sum, the sum of squares, and how many are above 0.
    """

    score: dict[str, Tensor]
    position: dict[str, Tensor]
    moments: Tensor


@dataclass
class Measured:
    """What the backward of a batch gave.

    Attributes:
        tokens: [window, token], True where a token counts.
        found: by layer and kind.
        lowest: the neurons of the lowest layer: how far down the backward has to go.
    """

    tokens: Tensor
    found: dict[tuple[int, str], Extremes] = field(default_factory=dict)
    owners: dict[int, object] = field(default_factory=dict)
    lowest: Tensor | None = None


class Measure(torch.autograd.Function):
    """Identity that reduces activation and relevance when the backward passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: int, into: Measured, owner: object) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer, ctx.into, ctx.owner = layer, into, owner
        return torch.ops.aten._unsafe_view(x, x.shape)  # no view: models write into it

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        into, dtype = ctx.into, wide(x.dtype)
        if into.owners.setdefault(ctx.layer, ctx.owner) is not ctx.owner:
            raise ValueError(f"layer {ctx.layer} runs more than once in a forward, so its neurons have no one value")
        shape = (*into.tokens.shape, -1)
        activation = x.detach().reshape(shape).to(dtype)
        tokens = into.tokens.to(x.device)
        into.found[ctx.layer, "activation"] = _extremes(activation, tokens)
        into.found[ctx.layer, "relevance"] = _extremes(activation * gradient.detach().reshape(shape).to(dtype), tokens)
        return gradient, None, None, None


def _extremes(value: Tensor, tokens: Tensor) -> Extremes:
    outside = ~tokens.unsqueeze(-1)
    high, low = value.masked_fill(outside, -torch.inf).max(1), value.masked_fill(outside, torch.inf).min(1)
    inside = value.masked_fill(outside, 0)
    square = torch.linalg.vector_norm(inside, dim=(0, 1), dtype=torch.float64).square()
    sums = inside.sum((0, 1), dtype=torch.float64)
    return Extremes(
        {"positive": high.values, "negative": low.values},
        {"positive": high.indices.to(torch.int32), "negative": low.indices.to(torch.int32)},  # half the memory
        torch.stack([sums, square, (inside > 0).sum((0, 1)).double()]),
    )


@contextmanager
def measured(places: Sequence[Site], tokens: Tensor) -> Iterator[Measured]:
    """Measure at these places during the forwards inside; filled by their backward.

    Args:
        places: those of the neurons.
        tokens: [window, token], True where a token counts.
    """
    into, handles = Measured(tokens), []
    first = min(place.layer for place in places)

    def on_input(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
            x = args[0]
            if not (torch.is_grad_enabled() and x.requires_grad):
                return None
            if layer == first:
                into.lowest = x
            with saved_as(x) or nullcontext():
                y: Any = Measure.apply(x, layer, into, object())
            return (carry(x, y), *args[1:])

        return hook

    try:
        for place in places:
            handles.append(place.module.register_forward_pre_hook(on_input(place.layer)))
        yield into
    finally:
        for handle in handles:
            handle.remove()
