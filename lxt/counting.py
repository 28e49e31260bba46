"""Which token of its row a position of a forward is, also while a cache stands for the tokens before.

1. Hooks on the model, and on the parts of it that hold all layers, read the masks that they are called with: columns
   of the mask that are 0 are padding, and the others count from 0. Without a mask the given positions count, and
   without them what the cache holds; of one that doesn't say, as of a recurrent state, the last count goes on.
2. Where the prompt ends is remembered from the first forward for those that continue it, with a cache or without.
3. What a checkpoint runs again in the backward is outside of any forward: the graph keeps its own count alive.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from lxt.inputs import Model

__all__ = ["Count", "Counter"]


@dataclass(frozen=True, eq=False)
class Count:
    """The tokens of one forward.

    Attributes:
        positions: [batch, token], each token's place in its row, -1 at padding.
        prompt: [batch], how many tokens the prompt of each row has; None where nothing was seen of it.
    """

    positions: Tensor
    prompt: Tensor | None

    @cached_property
    def longest(self) -> int:
        """How many tokens the longest row has had by now."""
        return int(self.positions.max()) + 1


class Counter:
    """Counts the tokens of the forwards of one thread; foreign threads have none."""

    def __init__(self, model: Model, layer: nn.Module) -> None:
        from transformers import PreTrainedModel

        holders = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
        self._holders = [part for part in holders if any(inner is layer for inner in part.modules())]
        self._thread = 0
        self._open: list[Count | None] = []
        self._of_graphs: weakref.WeakSet[Count] = weakref.WeakSet()
        self._prompt: _Prompt | None = None
        self._ends: Tensor | None = None
        self.forwards = 0
        self._of_caches: weakref.WeakKeyDictionary[Any, Tensor] = weakref.WeakKeyDictionary()

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Meanwhile this thread's forwards are counted."""
        self._thread, self._prompt, self._ends = threading.get_ident(), None, None
        self.forwards = 0
        handles = []
        try:
            for part in self._holders:
                handles.append(part.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True))
                handles.append(part.register_forward_hook(self._leave, always_call=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._open.clear()

    def of(self, x: Tensor) -> Count | None:
        """The count of the forward that computes `x`, [batch, token, size] or [batch * token, size]; None is another
        thread's.

        Raises:
            RuntimeError: a checkpoint runs a layer again, and it could be that of several forwards.
            ValueError: it has another number of tokens than the forward, or another order of them.
        """
        mine = threading.get_ident() == self._thread
        if mine and self._open:
            count = self._open[-1] or _alone(x)
        elif torch._C._current_graph_task_id() != -1 and (mine or _is_autograds()):
            count = self._recalled(x)
        else:
            count = _alone(x) if mine else None
        if count is not None and not _is_by_token(x.shape, count.positions.shape):
            raise ValueError(
                f"an activation of shape {tuple(x.shape)} has not one place for each of the forward's "
                f"{count.positions.shape[0]} x {count.positions.shape[1]} tokens, in this order, so it can't be "
                "steered; steer another latent, another layer, or one row at a time"
            )
        return count

    def _recalled(self, x: Tensor) -> Count | None:
        fitting = [count for count in self._of_graphs if count.positions.numel() == x.shape[:-1].numel()]
        if any(not torch.equal(count.positions, fitting[0].positions) for count in fitting[1:]):
            raise RuntimeError(
                "a checkpointed layer runs again, and it could belong to several forwards whose tokens differ in "
                "position; run the backward of each before the next forward, or without checkpointing"
            )
        return fitting[0] if fitting else None

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() != self._thread:
            return
        self.forwards += 1
        given = _given(module, args, kwargs)
        outer = self._open[-1] if self._open else None
        self._open.append(None)  # what may fail below is undone by _leave, which is always called
        positions = self._positions(given, outer.positions if outer else None)
        if positions is not None and outer is None:
            self._remember(given, positions.amax(-1) + 1)
        if positions is not None:
            same = outer is not None and torch.equal(positions, outer.positions)
            self._open[-1] = outer if same else Count(positions, self._prompt_of(positions, given))

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if threading.get_ident() != self._thread or not self._open:
            return
        count = self._open.pop()
        node = next((tensor.grad_fn for tensor in _tensors(output) if tensor.grad_fn is not None), None)
        if count is not None and node is not None:
            kept: Any = node.metadata  # lives as long as the graph
            kept.setdefault(__name__, []).append(count)
            self._of_graphs.add(count)

    def _positions(self, given: Mapping[str, Any], outer: Tensor | None) -> Tensor | None:
        read = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        if not isinstance(read, Tensor) or read.dim() < 2:
            return outer
        batch, length = read.shape[:2]
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        if isinstance(mask, Tensor) and mask.dim() == 2 and len(mask) == batch and mask.shape[1] >= length:
            real = mask.to(read.device) != 0
            return (real.long().cumsum(-1) - 1).masked_fill(~real, -1)[:, -length:]
        if outer is not None and outer.shape == (batch, length):  # a mask in another form comes from the one out there
            return outer
        if isinstance(positions, Tensor) and positions.dim() == 2 and positions.shape[1] == length:
            return positions.to(read.device).expand(batch, length)
        return (torch.arange(length, device=read.device) + self._cached(given)).expand(batch, length)

    def _cached(self, given: Mapping[str, Any]) -> Tensor | int:
        """How many tokens the cache holds: the same for all rows, or [batch, 1]."""
        cache = _cache(given)
        if cache is None:
            return 0
        try:
            return cache.get_seq_length()
        except (AttributeError, ValueError):  # a recurrent state, which counts nothing
            known = self._ends if isinstance(cache, (list, tuple)) else self._of_caches.get(cache)
        if known is not None:
            return known[:, None]
        if isinstance(cache, (list, tuple)) or cache.has_previous_state():
            raise ValueError(
                "the model goes on from a state that doesn't say how many tokens it has read; steer the forward that "
                "reads the prompt too, or pass the attention mask of all tokens"
            )
        return 0

    def _remember(self, given: Mapping[str, Any], ends: Tensor) -> None:
        self._ends, cache = ends, _cache(given)
        if cache is not None and not isinstance(cache, (list, tuple)):
            self._of_caches[cache] = ends

    def _prompt_of(self, positions: Tensor, given: Mapping[str, Any]) -> Tensor | None:
        ids = given.get("input_ids")
        known = self._prompt
        if not (positions == 0).any():  # with a cache
            return known.lengths if known is not None and len(known.lengths) == len(positions) else None
        if known is None or not known.continues(ids):
            self._prompt = known = _Prompt(positions.amax(-1) + 1, ids, positions.shape[1])
        known.width = positions.shape[1]
        return known.lengths


@dataclass
class _Prompt:
    """The prompt of each row: how many tokens it has, its ids, and how wide the last forward without a cache was."""

    lengths: Tensor
    ids: Tensor | None
    width: int

    def continues(self, ids: Tensor | None) -> bool:
        """Whether a forward that starts anew reads the prompt and one token more than the last: no cache is used."""
        if self.ids is None or ids is None or len(ids) != len(self.ids) or ids.shape[1] != self.width + 1:
            return False
        return torch.equal(ids[:, : self.ids.shape[1]], self.ids)


def _given(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        return signature(type(module).forward).bind_partial(module, *args, **kwargs).arguments
    except TypeError:  # the forward itself will say so
        return kwargs


def _cache(given: Mapping[str, Any]) -> Any:
    names = ("past_key_values", "cache_params", "state")
    return next((given[name] for name in names if given.get(name) is not None), None)


def _alone(x: Tensor) -> Count:
    """A layer called by itself, or a model that reads no tokens: what it gets is the row."""
    batch, length = (x.shape[0], x.shape[1]) if x.dim() > 2 else (1, x.shape[0])
    positions = torch.arange(length, device=x.device).expand(batch, length)
    return Count(positions, torch.full((batch,), length, device=x.device))


def _is_by_token(shape: torch.Size, tokens: torch.Size) -> bool:
    """Whether an activation has one place for each token, row by row; some models put the tokens before the rows."""
    rows_first = len(shape) < 3 or 1 in (shape[0], *tokens) or shape[:2] == tokens
    return rows_first and shape[:-1].numel() == tokens.numel()


def _is_autograds() -> bool:
    """Whether this is one of the threads in which autograd runs the backward of a device."""
    return all(thread.ident != threading.get_ident() for thread in threading.enumerate())


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from _tensors(tuple(output.values()))
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from _tensors(part)
