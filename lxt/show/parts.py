"""Heads, neurons and attention as the pictures draw them: one row's numbers out of what was kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lxt.show.words import listed

if TYPE_CHECKING:
    from lxt.attribution import Attribution
    from lxt.latents import LatentRelevance

__all__ = ["Parts", "carried", "kept", "layer_place", "only_row", "parts_of", "weights_of", "whole"]


@dataclass(frozen=True)
class Parts:
    """The relevance of a latent's parts (heads, neurons) in one row.

    Attributes:
        scores: [layer, part], in units of the explained value.
        totals: [layer], with what was not kept.
        layers: the number of each layer.
        where: which tokens they are of, in words.
        most: how many parts were kept at each token; None where all were.
    """

    scores: Tensor
    totals: Tensor
    layers: tuple[int, ...]
    where: str
    most: int | None = None

    @property
    def note(self) -> str:
        """What the sums don't know, where only the largest were kept; else nothing."""
        return f"of the {self.most} largest at each token, which were kept" if self.most else ""

    def strongest(self, top: int) -> list[tuple[int, int]]:
        """(place among `layers`, part) of the `top` largest |scores|, strongest first; none that are 0."""
        flat = self.scores.abs().flatten()
        best = flat.argsort(descending=True, stable=True)[:top].tolist()
        return [divmod(i, self.scores.shape[1]) for i in best if flat[i] > 0]


def kept(attribution: Attribution, name: str) -> LatentRelevance:
    """A latent that was kept.

    Raises:
        ValueError: it was not.
    """
    found = attribution.latents.get(name)
    if found is None:
        have = ", ".join(map(str, attribution.latents)) or "none"
        raise ValueError(
            f"this picture shows {name!r}, and of the latents {have} were kept; call "
            f"attribute(..., latents=({name!r},))"
        )
    return found


def only_row(attribution: Attribution, method: str) -> None:
    """Refuse several rows.

    Raises:
        ValueError: there isn't exactly one.
    """
    if len(attribution) != 1:
        raise ValueError(f"this picture shows one row, got {len(attribution)}; choose one: out[i].{method}(path)")


def whole(top: int) -> int:
    """How many to show, checked.

    Raises:
        ValueError: not a number from 1 on.
    """
    if isinstance(top, bool) or not isinstance(top, int) or top < 1:
        raise ValueError(f"top must be a whole number >= 1, got {top!r}")
    return top


def parts_of(
    attribution: Attribution,
    name: str,
    number: int,
    token: int | None,
    special: bool,
    layer: int | Sequence[int] | None = None,
) -> Parts:
    """The scores of a latent's parts.

    Args:
        attribution: what to draw.
        name: `head`, `neuron` or another latent with parts.
        number: of the row.
        token: which of the row's own tokens; negative ones count from the end; None is the sum of all.
        special: count special tokens in that sum.
        layer: the number of a layer, or several; None is all.

    Raises:
        ValueError: the latent wasn't kept, or has no parts.
        IndexError: there is no such token, or the layer wasn't kept.
    """
    found = kept(attribution, name)
    if found.values.dim() != 4:
        raise ValueError(f"{name!r} has no parts that could be compared, its shape is {tuple(found.values.shape)}")
    if layer is not None:
        found = found.chosen(layer)
    real = attribution.mask[number]
    places = real.nonzero().flatten()
    if token is None:
        chosen = places if special else places[~attribution.special[number, places]]
        where = f"sum over {'all' if special else 'the'} {len(chosen)} tokens"
        where += "" if special or len(chosen) == len(places) else " that are not special"
    else:
        if isinstance(token, bool) or not hasattr(token, "__index__"):
            raise TypeError(f"token must be a number, counted from 0 in the row, got {token!r}")
        if not -len(places) <= token < len(places):
            raise IndexError(f"token {token} of {len(places)}; allowed: {-len(places)} to {len(places) - 1}")
        chosen = places[token : token + 1 or None]
        where = f"at token {int(token) % len(places)} {listed(attribution.tokens[number][int(chosen)], 24, note=False)}"
    values = found.values[:, number, chosen].double()
    if found.indices is None:
        return Parts(values.sum(1), values.sum((1, 2)), found.layers, where)
    indices = found.indices[:, number, chosen].long()
    size = found.parts or (int(indices.max()) + 1 if indices.numel() else 1)
    scores = torch.zeros(len(values), size, dtype=torch.float64)
    scores.scatter_add_(1, indices.flatten(1), values.flatten(1))
    totals = values.sum((1, 2)) + (0 if found.rest is None else found.rest[:, number, chosen].double().sum(1))
    return Parts(scores, totals, found.layers, where, values.shape[-1])


def weights_of(found: LatentRelevance, number: int, keep: Tensor) -> Tensor:
    """[layer, head]: what each head carries in all, between the tokens to keep.

    Where only the largest keys of each query were kept, the sum of the others counts whole: which keys it is of isn't
    known.

    Args:
        found: [layer, batch, head, query, key].
        number: of the row.
        keep: [token], which tokens count.
    """
    values = found.values[:, number]
    if found.indices is not None:
        indices = found.indices[:, number].long()
        sums = (values.double() * (keep[indices] & keep[None, None, :, None])).sum((-2, -1))
        return sums if found.rest is None else sums + found.rest[:, number][..., keep].double().sum(-1)
    return torch.stack([layer[:, keep][:, :, keep].double().sum((-2, -1)) for layer in values])


def carried(found: LatentRelevance, number: int, layer: int, head: int, keep: Tensor) -> Tensor:
    """[query, key] of one head, between the tokens to keep; `layer` is a place in `found.layers`."""
    values = found.values[layer, number, head].double()
    if found.indices is not None:
        full = torch.zeros(len(keep), len(keep), dtype=torch.float64)
        # add: slots of padding, which are 0, may name the key of another slot
        values = full.scatter_add_(-1, found.indices[layer, number, head].long(), values)
    return values[keep][:, keep]


def layer_place(found: LatentRelevance, head: Any) -> tuple[int, int]:
    """(place in `found.layers`, head) of a head given as (layer, head).

    Raises:
        ValueError: there is no such layer or head, or it was not kept.
    """
    heads = found.values.shape[2]
    if not isinstance(head, (tuple, list)) or len(head) != 2:
        raise ValueError(f"a head is chosen by its layer and its number, as (5, 1), got {head!r}")
    layer, number = head
    if layer not in found.layers:
        kept_ = ", ".join(map(str, found.layers[:40]))
        raise ValueError(f"{found.name!r} was not kept for layer {layer!r}; it was for {kept_}")
    if not 0 <= number < heads:
        raise ValueError(f"there is no head {number!r}; allowed: 0 to {heads - 1}")
    return found.layers.index(layer), int(number)
