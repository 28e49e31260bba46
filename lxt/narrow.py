"""Compute only what the explained positions need: their logits, and the last layer's projections for them alone.

What follows the selected modules (scaling, a softcap, residual additions) still happens: the output projection's input
becomes two-dimensional, [batch * K, hidden], and its output [batch, K, vocabulary]; a module of the last layer works on
[batch, K, hidden] and its output is put back among zeros, which no explained logit reads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["narrowed"]


@contextmanager
def narrowed(
    head: nn.Module | None, places: Tensor, positionwise: Sequence[nn.Module] = ()
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Narrow the forwards inside; yields what brings a model's output to [batch, K, vocabulary].

    The slice that transformers' `logits_to_keep` takes would send bf16 down a slow path on the CPU; this one does not.

    Args:
        head: the output projection, where there is one over the vocabulary.
        places: [batch, K], the explained positions; no row names one twice if `positionwise` is given.
        positionwise: modules of the last layer that treat each position by itself.
    """
    batch, count = places.shape
    rows = torch.arange(batch).unsqueeze(1).expand_as(places)
    thread = threading.get_ident()
    reached = False

    def applies(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return (
            len(args) == 1
            and not kwargs
            and isinstance(args[0], Tensor)
            and args[0].dim() == 3
            and args[0].shape[0] == batch
            and args[0].requires_grad
            and torch.is_grad_enabled()  # whoever generates with the model meanwhile wants all of it
        )

    def select(hidden: Tensor) -> Tensor:
        return hidden[rows.to(hidden.device), places.to(hidden.device)]

    def before_head(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal reached
        if not applies(args, kwargs) or threading.get_ident() != thread:
            return None
        reached = True
        return (select(args[0]).flatten(0, 1),), kwargs

    def after_head(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        ours = reached and threading.get_ident() == thread
        return output.unflatten(0, (batch, count)) if ours and output.dim() == 2 else None

    def finish(logits: Tensor) -> Tensor:
        if reached:
            return logits
        return logits.unsqueeze(1) if logits.dim() == 2 else select(logits)

    with ExitStack() as undo:
        if isinstance(head, nn.Linear):
            undo.callback(head.register_forward_pre_hook(before_head, with_kwargs=True).remove)
            undo.callback(head.register_forward_hook(after_head).remove)
        for module in positionwise:
            _narrow_in_place(module, places.shape, applies, select, (rows, places), undo)
        yield finish


def _narrow_in_place(
    module: nn.Module,
    shape: torch.Size,
    applies: Callable[[tuple[Any, ...], dict[str, Any]], bool],
    select: Callable[[Tensor], Tensor],
    where: tuple[Tensor, Tensor],
    undo: ExitStack,
) -> None:
    lengths: list[int] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        lengths.clear()
        if not applies(args, kwargs) or args[0].shape[1] <= shape[1]:
            return None
        lengths.append(args[0].shape[1])
        return (select(args[0]),), kwargs

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not lengths:
            return None
        part = output if isinstance(output, Tensor) else output[0]
        full = part.new_zeros(shape[0], lengths[0], *part.shape[2:])
        full = full.index_put(tuple(index.to(part.device) for index in where), part)
        return full if isinstance(output, Tensor) else (full, *output[1:])

    undo.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
    undo.callback(module.register_forward_hook(after).remove)
