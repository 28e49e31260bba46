"""The latents of a result, by name: read when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from lxt.latents.names import KINDS, Keep, alias, suggestion
from lxt.latents.values import LatentRelevance, Tokens

__all__ = ["Latents"]

Source = Callable[[], LatentRelevance]
_RANKS = {"pattern": 5, "flow": 5}


class Latents(Mapping[str, LatentRelevance]):
    """Name -> relevance. Nothing is read, cut or copied before its name is asked for.

    Names are those that were asked for: kinds ("head"), paths of modules, features. TransformerLens' names
    (`blocks.5.attn.hook_z`) give the one layer of their kind.

    Args:
        sources: by name, what gives it.
        tokens: what they were read at.
        check: whether what comes has yet to be checked.
    """

    def __init__(self, sources: Mapping[str, Source], tokens: Tokens, check: bool = True) -> None:
        self._sources = dict(sources)
        self._tokens = tokens
        self._check = check
        self._made: dict[str, LatentRelevance] = {}

    @classmethod
    def of(cls, latents: Mapping[str, Tensor], tokens: Tokens) -> Latents:
        """Those that are there already; plain tensors have all layers from 0.

        Raises:
            ValueError: one doesn't fit the tokens, or holds numbers that aren't finite.
        """
        if isinstance(latents, Latents):
            there = {name: partial(_same, one) for name, one in latents._made.items()}
            return cls(latents._sources | there, tokens, check=latents._check)
        made = cls({name: partial(_named, name, latent) for name, latent in latents.items()}, tokens)
        for name in made:
            made[name]
        return made

    def __getitem__(self, name: str) -> LatentRelevance:
        if not isinstance(name, str):
            raise TypeError(f"a latent is chosen by its name, such as 'head', got {name!r}; of a row: out[row].latents")
        kind, layer = self._resolved(name)
        if kind is None:
            raise KeyError(self._missing(name))
        if kind not in self._made:
            latent = self._sources[kind]()
            if self._check:
                _check(latent, self._tokens.mask.shape)
            self._made[kind] = latent.replaced(tokens=self._tokens)
        if layer is None:
            return self._made[kind]
        try:
            return self._made[kind].layer(layer)
        except IndexError as error:
            raise KeyError(
                f"{name!r}: {error}. If the model has that layer, ask for it: attribute(..., latents=({name!r},))"
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        kind, layer = self._resolved(name)
        return kind is not None and (layer is None or layer in self[kind].layers)

    def __repr__(self) -> str:
        return f"Latents({', '.join(self._sources) or 'none'})"

    def __reduce__(self) -> tuple[object, ...]:
        return Latents.of, (dict(self), self._tokens)  # what lies in a file is read: the copy stands for itself

    def of_row(self, row: int) -> Latents:
        """Those of one row, without padding."""
        keep = self._tokens.mask[row]

        def one(name: str) -> LatentRelevance:
            return self[name].of_row(row, keep)

        return Latents({name: partial(one, name) for name in self._sources}, self._tokens.of_row(row), check=False)

    def _resolved(self, name: str) -> tuple[str | None, int | None]:
        if name in self._sources:
            return name, None
        kind, layer = alias(name) or (Keep(name).name, None)
        return (kind, layer) if kind in self._sources else (None, None)

    def _missing(self, name: str) -> str:
        kept = f"kept were {', '.join(self._sources)}" if self._sources else "none was kept"
        kind, _ = alias(name) or (Keep(name).name, None)
        known = kind in KINDS or "." in name
        more = [*self._sources, name if known else "..."]
        hint = "" if known else suggestion(name, {*self._sources, *KINDS})
        return f"no latent {name!r}: {kept}{hint}; others are kept by attribute(..., latents={more})"


def _same(latent: LatentRelevance) -> LatentRelevance:
    return latent


def _named(name: str, latent: Tensor) -> LatentRelevance:
    found = latent if isinstance(latent, LatentRelevance) else LatentRelevance(name, latent, range(len(latent)))
    return found.mapped(lambda tensor: tensor.detach().cpu())


def _check(latent: LatentRelevance, tokens: tuple[int, ...]) -> None:
    """Whether it fits these tokens, [batch, token].

    Raises:
        ValueError: a shape that doesn't, or numbers that aren't finite.
    """
    shape, name = tuple(latent.values.shape), latent.name
    kind = KINDS.get(name)
    usual = _RANKS.get(name, 3 if kind is not None and kind.parts is None else 4)
    rank = usual if kind is not None else max(3, min(4, len(shape)))  # of a module or features either
    batch, length = tokens
    if rank == 5:
        wanted = ["layer", batch, "head", length, length if latent.indices is None else "key"]
    else:
        wanted = ["layer", batch, length, *([(kind and kind.parts) or "part"] if rank > 3 else [])]
    right = len(shape) == rank and all(isinstance(a, str) or a == b for a, b in zip(wanted, shape, strict=True))
    if not right:
        raise ValueError(f"latents[{name!r}] has shape {shape}; it must be {wanted}")
    if len(latent.layers) != shape[0]:
        raise ValueError(f"latents[{name!r}] has {shape[0]} layers, but {len(latent.layers)} numbers for them")
    if (latent.indices is None) != (latent.rest is None):
        raise ValueError(f"latents[{name!r}] must have both indices and rest, or neither")
    if latent.indices is not None and latent.rest is not None:
        if latent.indices.shape != latent.values.shape or latent.rest.shape != latent.values.shape[:-1]:
            raise ValueError(
                f"latents[{name!r}] has indices {tuple(latent.indices.shape)} and rest {tuple(latent.rest.shape)}; "
                f"they must be {shape} and {shape[:-1]}"
            )
        low, high = (int(end) for end in latent.indices.aminmax()) if latent.indices.numel() else (0, 0)
        count = length if rank == 5 else high + 1 if latent.parts is None else latent.parts
        if low < 0 or high >= count:
            raise ValueError(f"latents[{name!r}] has indices from {low} to {high}; allowed are 0 to {count - 1}")
    for part in (latent.values, latent.rest):
        # inf and NaN show in the extremes, which take no memory; isfinite() takes twice that of all layers.
        if part is not None and part.numel() and not torch.stack(part.aminmax()).isfinite().all():
            raise ValueError(f"latents[{name!r}] holds numbers that aren't finite; use a wider dtype")
