"""The last decoder layer only where it is needed: keys and values of all positions, the rest of the explained ones.

Nothing behind the last layer mixes positions, so only the explained positions need its queries, output projection and
MLP. The architecture's own code does both halves:
 1. The layer starts on all positions, with a cache that ends it when it hands over its keys and values.
 2. The layer runs on the explained positions, with a cache that answers with those keys and values, as in decoding.
The other positions of the output are zeros; no explained logit reads them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lxt.swapping import swap_forward

__all__ = ["only_at"]

CACHE_ARGUMENTS = ("past_key_values", "layer_past")


@contextmanager
def only_at(layer: nn.Module | None, places: Tensor) -> Iterator[None]:
    """Meanwhile `layer` computes its output at `places` only, [batch, token, hidden] with zeros elsewhere.

    A layer whose arguments aren't understood (no cache among them, an attention mask of another form) runs in full,
    as it does under gradient checkpointing, which takes its cache away, and without gradients.

    Args:
        layer: the last decoder layer of a causal language model; None changes nothing.
        places: [batch, K] positions, none twice in a row.
    """
    if layer is None:
        yield
        return
    restore = swap_forward(layer, partial(_narrowed, places=places))
    try:
        yield
    finally:
        restore()


def _narrowed(previous: Callable, places: Tensor) -> Callable:
    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        arguments = _arguments(module, args, kwargs, places) if torch.is_grad_enabled() else None
        if arguments is None:
            return previous(module, *args, **kwargs)
        hidden, cache, rest, narrow = arguments
        try:
            return previous(module, hidden, **rest, **{cache: _Ending()})
        except _KeysAndValues as found:
            known = _Known(found.keys, found.values)
        where = torch.arange(len(places), device=hidden.device)[:, None], places.to(hidden.device)
        output = previous(module, hidden[where], **narrow, **{cache: known})
        first, *others = (output,) if isinstance(output, Tensor) else output
        whole = torch.zeros_like(hidden, dtype=first.dtype).index_put(where, first)
        return whole if isinstance(output, Tensor) else (whole, *others)

    return forward


def _arguments(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], places: Tensor
) -> tuple[Tensor, str, dict[str, Any], dict[str, Any]] | None:
    """(hidden states, the cache's name, the other arguments, those at `places`), None if not understood."""
    signature = inspect.signature(type(module).forward)
    bound = signature.bind(module, *args, **kwargs).arguments
    extra = next((p.name for p in signature.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD), None)
    named = {key: value for key, value in bound.items() if key != extra} | bound.get(extra or "", {})
    _, hidden, *_ = named.values()
    cache = next((name for name in CACHE_ARGUMENTS if name in signature.parameters), None)
    if cache is None or named.get(cache) is not None or not isinstance(hidden, Tensor) or hidden.dim() != 3:
        return None
    if len(hidden) != len(places) or hidden.shape[1] <= places.shape[1]:
        return None
    rest = {key: value for key, value in list(named.items())[2:] if key != cache}
    here, length = places.to(hidden.device), hidden.shape[1]
    ends = bool((places == length - 1).all())  # before it moves: this waits for a GPU otherwise
    try:
        narrow = {key: _at(here, key, value, length) for key, value in rest.items()}
        narrow["attention_mask"] = _mask_at(here, ends, module, rest.get("attention_mask"), length)
    except _NotUnderstood:
        return None
    return hidden, cache, rest, narrow


def _at(places: Tensor, name: str, value: Any, length: int) -> Any:
    """An argument of the layer at `places`."""
    if name == "position_embeddings" and isinstance(value, tuple):
        return tuple(_at(places, "position_ids", part, length) for part in value)
    if name == "attention_mask" or value is None or isinstance(value, (bool, int, float, str)):
        return value
    if name == "position_ids" and isinstance(value, Tensor) and value.dim() >= 2 and value.shape[1] == length:
        rows = torch.arange(len(places), device=value.device)[:, None]
        return value.expand(len(places), *value.shape[1:])[rows, places]
    raise _NotUnderstood(name)


def _mask_at(places: Tensor, ends: bool, module: nn.Module, mask: Any, length: int) -> Tensor | None:
    """The attention mask at `places` (`ends`: the last ones), [batch, 1, K, token]; none is torch's causal one."""
    if mask is None:
        if ends:
            return None  # the last position sees everything
        if not any(getattr(part, "is_causal", False) for part in module.modules()):
            raise _NotUnderstood("attention_mask")
        return (torch.arange(length, device=places.device) <= places[:, :, None])[:, None]
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[2] not in (1, length):
        raise _NotUnderstood("attention_mask")
    if mask.shape[2] == 1:
        return mask
    mask = mask.expand(len(places), *mask.shape[1:])
    return torch.stack([row[:, place] for row, place in zip(mask, places, strict=True)])


class _NotUnderstood(Exception):
    """An argument with no known restriction to some positions."""


class _KeysAndValues(Exception):
    """Ends a layer once its keys and values are known."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values


class _Ending:
    """A cache that ends the layer."""

    def update(self, keys: Tensor, values: Tensor, *where: Any, **options: Any) -> tuple[Tensor, Tensor]:
        raise _KeysAndValues(keys, values)


class _Known:
    """A cache that holds all positions already."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._keys, self._values = keys, values

    def update(self, keys: Tensor, values: Tensor, *where: Any, **options: Any) -> tuple[Tensor, Tensor]:
        return self._keys, self._values
