"""Reads the gradient that arrives at an activation, together with what was kept in the forward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from lxt.checkpointing import carry, saved_as
from lxt.marks import copy_mark

__all__ = ["Read", "is_named", "name", "names", "reading"]

_NAMES = "_lxt_names"

Read = Callable[..., None]
"""(gradient, *kept) -> None, called in the backward; all tensors are detached."""


def reading(x: Tensor, kept: tuple[Tensor | None, ...], read: Read, written_into: bool = False) -> Tensor:
    """`x`, whose backward calls `read` with its gradient and what was kept, and leaves the gradient as it is.

    What is kept is kept as autograd keeps it: checkpoints replace it by a recomputation, and the backward raises where
    somebody wrote into it, or into what goes on in the place of a kept `x`.

    Args:
        x: the activation.
        kept: tensors, `x` may be one of them.
        read: gets the gradient, and them.
        written_into: the model may write into what goes on, which is a copy then.
    """
    alias = not written_into and any(tensor is x for tensor in kept)
    with saved_as(x) or nullcontext():  # a checkpointed layer's output is not kept
        detached = (None if tensor is None else tensor.detach() for tensor in kept)
        y: Any = _Reading.apply(x, read, written_into, alias, *detached)
    for one in names(x):
        name(y, one)
    return copy_mark(x, carry(x, y))


def name(x: Tensor, one: object) -> None:
    """From here on `x` goes by that name too, until something is written into it."""
    setattr(x, _NAMES, (x._version, (*names(x), one)))


def is_named(x: Tensor, one: object) -> bool:
    """Whether `x` goes by that name, or is a view, as dropout and reshapes make, of what does."""
    return one in names(x)


def names(x: Tensor) -> tuple[object, ...]:
    """What `x` goes by."""
    with torch._C.DisableTorchFunction():
        base = x._base
    for tensor in (x,) if base is None else (x, base):
        version, own = getattr(tensor, _NAMES, (0, ()))
        if own and version == tensor._version:  # views have their base's
            return own
    return ()


class _Reading(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, read: Read, copied: bool, alias: bool, *kept: Tensor | None) -> Tensor:
        y = x.clone() if copied else torch.ops.aten._unsafe_view(x, x.shape)  # no view: models may write into it
        ctx.save_for_backward(*kept, *((y,) if alias else ()))  # its writes are counted apart from those into x
        ctx.read, ctx.count = read, len(kept)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        kept = ctx.saved_tensors[: ctx.count]
        ctx.read(gradient.detach(), *(None if tensor is None else tensor.detach() for tensor in kept))
        return gradient, None, None, None, *[None] * ctx.count
