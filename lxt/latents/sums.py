"""Sums of a latent's relevance, layer by layer: no copy is as large as all layers.

They add in float64 and come in the latent's own dtype. What was not kept of a token counts in the sums over its parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lxt.latents.values import LatentRelevance

__all__ = ["by_layer", "by_part", "by_token", "dense"]


def by_layer(latent: LatentRelevance) -> Tensor:
    """[layer, batch]."""
    return by_token(latent).double().sum(-1).to(latent.values.dtype)


def by_token(latent: LatentRelevance, of: Literal["query", "key"] = "query") -> Tensor:
    """[layer, batch, token]; `of` says which, where an entry has two.

    Raises:
        ValueError: an unknown `of`; or by key, where the largest keys alone were kept.
    """
    if of not in ("query", "key"):
        raise ValueError(f"unknown token {of!r}; allowed: 'query' (that looks), 'key' (that is looked at)")
    values, rest = latent.values, latent.rest
    if values.dim() == 3:
        return values
    if values.dim() == 4:
        sums = _each(values, lambda layer: layer.sum(-1))
        return sums if rest is None else (sums.double() + rest).to(values.dtype)
    if of == "query":
        sums = _each(values, lambda layer: layer.sum((1, 3)))
        return sums if rest is None else (sums.double() + rest.double().sum(2)).to(values.dtype)
    if latent.indices is not None:
        raise ValueError(
            f"{latent.name!r} was kept for the largest keys of each query alone, so the sum over all queries isn't "
            f"known by key; keep all: latents=({latent.name!r},)"
        )
    return _each(values, lambda layer: layer.sum((1, 2)))


def by_part(latent: LatentRelevance) -> Tensor:
    """[layer, batch, part].

    Raises:
        ValueError: there are no parts.
    """
    values = latent.values
    if values.dim() == 3:
        raise ValueError(f"{latent.name!r} has one number for each token, no parts to sum by; take by_token()")
    if values.dim() == 5:
        return by_head(latent)
    if latent.indices is None:
        return _each(values, lambda layer: layer.sum(1))
    out = values.new_zeros(*values.shape[:2], _count(latent), dtype=torch.float64)
    for into, layer, indices in zip(out, values, latent.indices, strict=True):
        into.scatter_add_(-1, indices.long().flatten(1), layer.double().flatten(1))
    return out.to(values.dtype)


def by_head(latent: LatentRelevance) -> Tensor:
    """[layer, batch, head] of pattern and flow."""
    sums = _each(latent.values, lambda layer: layer.sum((2, 3)))
    return sums if latent.rest is None else (sums.double() + latent.rest.double().sum(-1)).to(sums.dtype)


def dense(latent: LatentRelevance) -> Tensor:
    """All parts, of a latent that holds the largest; 0 for the others."""
    values, indices = latent.values, latent.indices
    if indices is None:
        return values
    out = values.new_zeros(*values.shape[:-1], _count(latent))
    for into, layer, which in zip(out, values, indices, strict=True):
        into.scatter_add_(-1, which.long(), layer)  # at padding all of a token's slots name part 0
    return out


def _count(latent: LatentRelevance) -> int:
    if latent.parts is not None:
        return latent.parts
    if latent.values.dim() == 5:
        return latent.values.shape[3]
    indices = latent.indices
    return int(indices.max()) + 1 if indices is not None and indices.numel() else 0


def _each(values: Tensor, add: Callable[[Tensor], Tensor]) -> Tensor:
    """`add` in float64, of each layer by itself."""
    if not len(values):
        return add(values.new_zeros(values.shape[1:]))[None][:0]
    return torch.stack([add(layer.double()).to(values.dtype) for layer in values])
