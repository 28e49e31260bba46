"""The logits of the explained positions only.

What follows the output projection (scaling, a softcap) still happens: its input becomes two-dimensional,
[batch * K, hidden], and its output [batch, K, vocabulary].
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["narrowed"]


@contextmanager
def narrowed(head: nn.Module | None, places: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
    """Narrow the forwards inside; yields what brings a model's output to [batch, K, vocabulary].

    The slice that transformers' `logits_to_keep` takes would send bf16 down a slow path on the CPU; this one does not.

    Args:
        head: the output projection, where there is one over the vocabulary.
        places: [batch, K], the explained positions.
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
        yield finish
