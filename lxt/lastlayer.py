"""The last decoder layer only where it is needed: keys and values of all positions, the rest of the last one alone.

Nothing behind the last layer mixes positions, so where one position's logits are explained, only that position needs
the layer's queries, output projection and MLP. The architecture's own code does both halves:
 1. The layer starts on all positions, with a cache that ends it when it hands over its keys and values.
 2. The layer runs on the last position, with a cache that answers with those keys and values, as in decoding.
The other positions of the output are zeros, and so is their relevance in truth.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from lxt.swapping import swap_forward

__all__ = ["last_position_only"]

CACHE_ARGUMENTS = ("past_key_values", "layer_past")


@contextmanager
def last_position_only(layer: nn.Module) -> Iterator[None]:
    """Meanwhile `layer` computes its output at the last position only, [batch, token, hidden] with zeros elsewhere.

    A layer whose arguments aren't understood (no cache among them, or an attention mask of another form) runs in
    full, as it does under gradient checkpointing, which takes its cache away.

    Args:
        layer: the last decoder layer of a causal language model.
    """
    restore = swap_forward(layer, _narrowed)
    try:
        yield
    finally:
        restore()


def _narrowed(previous: Callable) -> Callable:
    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        arguments = _arguments(module, args, kwargs)
        if arguments is None:
            return previous(module, *args, **kwargs)
        hidden, cache, rest, last = arguments
        try:
            return previous(module, hidden, **rest, **{cache: _Ending()})
        except _KeysAndValues as found:
            known = _Known(found.keys, found.values)
        output = previous(module, hidden[:, -1:], **last, **{cache: known})
        first, *others = (output,) if isinstance(output, Tensor) else output
        padded = F.pad(first, (0, 0, hidden.shape[1] - 1, 0))
        return padded if isinstance(output, Tensor) else (padded, *others)

    return forward


def _arguments(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, str, dict[str, Any], dict[str, Any]] | None:
    """(hidden states, the cache's name, the other arguments, those for the last position), None if not understood."""
    signature = inspect.signature(type(module).forward)
    bound = signature.bind(module, *args, **kwargs).arguments
    extra = next((p.name for p in signature.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD), None)
    named = {key: value for key, value in bound.items() if key != extra} | bound.get(extra or "", {})
    _, hidden, *_ = bound.values()
    cache = next((name for name in CACHE_ARGUMENTS if name in signature.parameters), None)
    if cache is None or not isinstance(hidden, Tensor) or hidden.dim() != 3 or hidden.shape[1] < 2:
        return None
    if named.get(cache) is not None:
        return None
    rest = {key: value for key, value in list(named.items())[2:] if key != cache}
    try:
        last = {key: _at_last(key, value, hidden.shape[1]) for key, value in rest.items()}
    except _NotUnderstood:
        return None
    return hidden, cache, rest, last


def _at_last(name: str, value: Any, length: int) -> Any:
    """An argument of the layer for its last position only."""
    if name == "position_embeddings" and isinstance(value, tuple):
        return tuple(_at_last("position_ids", part, length) for part in value)
    if not isinstance(value, Tensor):
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise _NotUnderstood(name)
    if name == "attention_mask" and value.dim() == 4 and value.shape[2] in (1, length):
        return value[:, :, -1:]
    if name == "position_ids" and value.dim() >= 2 and value.shape[1] == length:
        return value[:, -1:]
    raise _NotUnderstood(name)


class _NotUnderstood(Exception):
    """An argument with no known restriction to one position."""


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
    """A cache that holds all positions already, the last one too."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._keys, self._values = keys, values

    def update(self, keys: Tensor, values: Tensor, *where: Any, **options: Any) -> tuple[Tensor, Tensor]:
        return self._keys, self._values
