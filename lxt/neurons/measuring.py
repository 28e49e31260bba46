"""Extremes, their places and moments of every neuron's relevance and activation, taken while the backward passes.

A `Measure` is an identity in the forward. When the gradient arrives, relevance is activation × gradient as everywhere;
both are reduced over the tokens on the spot, so that layers × tokens × neurons is never held. What is said of neurons
holds for heads too: a head's relevance is the sum over its numbers, and its activation their Euclidean length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lxt import rules
from lxt.checkpointing import carry, saved_as
from lxt.coefficients import wide
from lxt.latents import Site, hooked
from lxt.marks import copy_mark

__all__ = ["KINDS", "LABELLED", "SIGNS", "Extremes", "Measured", "measured"]

LABELLED = ("neuron", "head")
"""The latents that can be labelled."""

KINDS = ("relevance", "activation")
SIGNS = {"positive": 1, "negative": -1}


@dataclass(frozen=True, eq=False)
class Extremes:
    """One quantity of a layer's neurons in a batch of windows.

    Attributes:
        score: by sign, [window, neuron]: the highest value over the window's tokens that is above 0, and the lowest
            below; 0 where there is none.
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
    def forward(ctx: Any, x: Tensor, site: Site, into: Measured, owner: object) -> Tensor:
        ctx.save_for_backward(x)
        ctx.site, ctx.into, ctx.owner = site, into, owner
        return torch.ops.aten._unsafe_view(x, x.shape)  # no view: models write into it

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        into, site, dtype = ctx.into, ctx.site, wide(x.dtype)
        if into.owners.setdefault(site.layer, ctx.owner) is not ctx.owner:
            raise ValueError(
                f"layer {site.layer} runs more than once in a forward, so its {site.latent}s have no one value"
            )
        shape, tokens = (*into.tokens.shape, -1), into.tokens.to(x.device)
        activation, c_x = x.detach().reshape(shape), gradient.detach().reshape(shape)
        if site.latent == "head":
            relevance = rules.relevance(activation, c_x, site.heads)
            activation = torch.linalg.vector_norm(activation.unflatten(-1, (site.heads, -1)), dim=-1, dtype=dtype)
        else:
            activation = activation.to(dtype)
            relevance = activation * c_x.to(dtype)
        into.found[site.layer, "activation"] = _extremes(activation, tokens)
        into.found[site.layer, "relevance"] = _extremes(relevance, tokens)
        return gradient, None, None, None


def _extremes(value: Tensor, tokens: Tensor) -> Extremes:
    # What doesn't count may be 0: no rank takes a 0.
    inside = value.masked_fill(~tokens.unsqueeze(-1), 0)
    high, low = inside.max(1), inside.min(1)
    squares = torch.stack([window.double().square().sum(0) for window in inside])  # each alone, for twice the width
    above = torch.gt(inside, 0, out=torch.empty_like(inside))  # as numbers, which are added up faster than truths
    return Extremes(
        {"positive": high.values, "negative": low.values},
        {"positive": high.indices.to(torch.int32), "negative": low.indices.to(torch.int32)},  # half the memory
        torch.stack([inside.sum((0, 1), dtype=torch.float64), squares.sum(0), above.sum((0, 1)).double()]),
    )


@contextmanager
def measured(places: Sequence[Site], tokens: Tensor) -> Iterator[Measured]:
    """Measure at these places during the forwards inside; filled by their backward.

    Args:
        places: those of the neurons or heads.
        tokens: [window, token], True where a token counts.
    """
    into = Measured(tokens)
    first = min(place.layer for place in places)

    def measure(site: Site, x: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            return x
        site.refuse_other_tokens(x, tokens.shape)
        if site.layer == first:
            into.lowest = x
        with saved_as(x) or nullcontext():
            return copy_mark(x, carry(x, Measure.apply(x, site, into, object())))  # type: ignore[arg-type]

    with ExitStack() as undo:
        for place in places:
            undo.enter_context(hooked(place, partial(measure, place)))
        yield into
