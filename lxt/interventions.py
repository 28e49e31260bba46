"""What steering does to an activation: set, add, scale, ablate; at which latents and at which tokens.

A key names the latent: ("residual", layer), ("attn_out", layer), ("head", layer, head) or ("neuron", layer, neuron);
with a tuple of numbers in the last place it is several of them, and without one it is all of the layer.
TransformerLens's names are keys of whole layers: "blocks.5.attn.hook_z" is ("head", 5). The path of a module is the key
of its output.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from numbers import Real
from operator import index
from random import Random
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lxt.counting import Count
from lxt.latents import KINDS, Site, alias
from lxt.latents.names import suggestion

__all__ = [
    "STEERABLE",
    "Ablate",
    "Activations",
    "Add",
    "Change",
    "Intervention",
    "Key",
    "Latent",
    "Positions",
    "Scale",
    "Set",
    "changes_of",
    "chosen",
    "latent_of",
    "named",
    "numbered",
]

Key = tuple[Any, ...] | str
Positions = int | slice | Sequence[int] | None
Change = Literal["zero", "mean", "resample"]
STEERABLE = ("residual", "residual_pre", "attn_out", "mlp_out", "head", "neuron")


@dataclass(frozen=True)
class Latent:
    """One latent of a layer, or several, or a module's output by its path.

    `parts` are heads, neurons or dimensions; None is all of the layer.
    """

    name: str
    layer: int
    parts: tuple[int, ...] | None = None

    def __str__(self) -> str:
        if self.name not in KINDS:
            return repr(self.name)
        parts = "" if self.parts is None else ", " + (str(self.parts[0]) if len(self.parts) == 1 else str(self.parts))
        return f"({self.name!r}, {self.layer}{parts})"

    def columns(self, width: int, heads: int) -> Tensor | None:
        """[size], which numbers of the layer's activation are the latent's; None is all of them.

        Args:
            width: how many numbers the layer's activation has.
            heads: how many heads share them.

        Raises:
            ValueError: a part that the layer doesn't have.
        """
        if self.parts is None:
            return None
        each = width // heads if self.name == "head" else 1
        count, kind = width // each, {"head": "heads", "neuron": "neurons"}.get(self.name, "dimensions")
        for part in self.parts:
            if not 0 <= part < count:
                raise ValueError(f"{self}: layer {self.layer} has the {kind} 0 to {count - 1}, and {part} is none")
        return torch.cat([torch.arange(part * each, (part + 1) * each) for part in self.parts])


def named(key: object) -> object:
    """The key, as (name, layer) where it is one of TransformerLens's names."""
    meant = alias(key) if isinstance(key, str) else None
    return key if meant is None or meant[1] is None else meant


def latent_of(key: object, sites: Mapping[tuple[str, int], Site]) -> Latent:
    """The latent that a key names; `sites` are those of the model.

    Raises:
        TypeError: not such a key.
        ValueError: no such latent, or no such layer.
    """
    whole = named(key)
    paths = {name: layer for name, layer in sites if name not in KINDS}
    if isinstance(whole, str) and whole in paths:
        return Latent(whole, paths[whole])
    name, *numbers = whole if isinstance(whole, tuple) and whole else (None,)
    if not isinstance(name, str) or not 1 <= len(numbers) <= 2:
        raise TypeError(
            "a latent is named by (name, layer) or (name, layer, number), such as ('residual', 6), ('head', 5, 1) or "
            f"('neuron', 7, (12, 34)), or as 'blocks.5.attn.hook_z' or 'model.layers.5.mlp'; got {key!r}"
        )
    if name not in STEERABLE:
        what = "can be read but not steered." if name in KINDS else f"is no latent{suggestion(name, STEERABLE) or '.'}"
        raise ValueError(
            f"{name!r} {what} Steered can be {', '.join(STEERABLE)}, each as (name, layer); and the output of a "
            "module, as its path alone"
        )
    last = numbers[1] if len(numbers) == 2 else None
    try:
        layer = _whole(numbers[0])
        parts = None if last is None else tuple(map(_whole, last if isinstance(last, (tuple, range)) else (last,)))
    except TypeError:
        raise TypeError(f"layers, heads and neurons are whole numbers, got {key!r}") from None
    layers = [number for kind, number in sites if kind == name]
    if layer not in layers:
        raise ValueError(f"{key!r}: the model has the layers {min(layers)} to {max(layers)}, and {layer} is none")
    if parts is not None and (not parts or len(set(parts)) < len(parts)):
        raise ValueError(f"{key!r} names no {name}, or one twice; name each once")
    return Latent(name, layer, parts)


@dataclass(frozen=True, eq=False)
class Intervention:
    """A change of an activation at some tokens.

    Attributes:
        positions: the tokens, counted from 0 at the beginning of each row's own tokens, padding apart, and on through
            what is generated: a number, several, or a slice (`slice(5, None)` is from token 5 on). Negative ones count
            from the end of the prompt: -1 is its last token. None is all tokens.
    """

    _: KW_ONLY
    positions: Positions = None

    def __post_init__(self) -> None:
        _checked(self.positions)

    def resolved(self, latent: Latent) -> Intervention:
        """What it comes to for this latent, with a value that is known."""
        return self

    def fits(self, latent: Latent, size: int, dtype: torch.dtype) -> None:
        """Refuse a value that the latent, of so many numbers, can't have.

        Raises:
            ValueError: says what it is, and what it should be.
        """
        raise NotImplementedError

    def changed(self, x: Tensor, count: Count) -> Tensor:
        """The latent's activation, [batch, token, size], as it would be if all tokens were meant."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Set(Intervention):
    """Put a number, or a vector as long as the latent, in the activation's place."""

    value: Any

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "value", _value(self.value))

    def fits(self, latent: Latent, size: int, dtype: torch.dtype) -> None:
        """As in Intervention."""
        _fits(self.value, latent, size, dtype)

    def changed(self, x: Tensor, count: Count) -> Tensor:
        """As in Intervention."""
        return _like(self.value, x).expand_as(x)


@dataclass(frozen=True, eq=False)
class Add(Set):
    """Add a number, or a vector as long as the latent, to the activation."""

    def changed(self, x: Tensor, count: Count) -> Tensor:
        """As in Intervention."""
        return x + _like(self.value, x)


@dataclass(frozen=True, eq=False)
class Scale(Set):
    """Multiply the activation by a number, or by a vector as long as the latent, number by number."""

    def changed(self, x: Tensor, count: Count) -> Tensor:
        """As in Intervention."""
        return x * _like(self.value, x)


@dataclass(frozen=True, eq=False)
class Ablate(Intervention):
    """Put zero in the activation's place, or the mean of a reference, or a token drawn from it.

    The draw depends on the seed and on the token's position alone: it is the same in all latents and rows, with a cache
    and without.

    Attributes:
        to: "zero", "mean" or "resample".
        reference: what the latents are for other prompts (`lxt.steering.activations`); for "mean" and "resample".
        seed: other seeds draw other tokens.
    """

    to: Change = "zero"
    reference: Activations | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.to not in get_args(Change):
            raise ValueError(f"Ablate to {self.to!r} is unknown; allowed: {', '.join(get_args(Change))}")
        if self.to == "zero" and self.reference is not None:
            raise ValueError("Ablate to 'zero' takes no reference; was 'mean' or 'resample' meant?")
        if self.to != "zero" and not isinstance(self.reference, Activations):
            raise TypeError(
                f"Ablate to {self.to!r} needs reference=lxt.steering.activations(explainer, prompts, latents), got "
                f"{type(self.reference).__name__}"
            )

    def resolved(self, latent: Latent) -> Intervention:
        """As in Intervention."""
        if self.reference is None:
            return Set(0.0, positions=self.positions)
        known = self.reference.of(latent)
        if self.to == "mean":
            return Set(known.mean(0, dtype=torch.float64), positions=self.positions)
        return _Draw(known, self.seed, positions=self.positions)


@dataclass(frozen=True, eq=False)
class _Draw(Intervention):
    """Put a token of `known`, [token, size], in the activation's place."""

    known: Tensor
    seed: int

    def fits(self, latent: Latent, size: int, dtype: torch.dtype) -> None:
        _fits(self.known[0], latent, size, dtype)

    def changed(self, x: Tensor, count: Count) -> Tensor:
        places = count.positions.tolist()
        drawn = {place: self._drawn(place) for row in places for place in row}
        rows = torch.tensor([[drawn[place] for place in row] for row in places])
        return _like(self.known[rows], x)

    def _drawn(self, place: int) -> int:
        return Random(f"{self.seed} {place}").randrange(len(self.known))


@dataclass(frozen=True, eq=False)
class Activations:
    """What latents were for some prompts, on the CPU.

    Attributes:
        values: for each latent [token, size], the tokens of all prompts one after the other.
        lengths: how many tokens each prompt has.
        heads: how many heads share the width of a layer's "head".
    """

    values: Mapping[Latent, Tensor]
    lengths: tuple[int, ...]
    heads: int = 1

    def __repr__(self) -> str:
        names = list(map(str, self.values))
        shown = ", ".join(names[:4]) + (f", and {len(names) - 4} more" if len(names) > 4 else "")
        return f"Activations({shown}; {sum(self.lengths):,} tokens of {len(self.lengths)} prompts)"

    def __getitem__(self, key: Key) -> Tensor:
        """[token, size] of one latent, such as ("head", 5, 1)."""
        return self.of(latent_of(key, {(known.name, known.layer): None for known in self.values}))  # type: ignore[misc]

    def of(self, latent: Latent) -> Tensor:
        """[token, size], cut out of its whole layer where that is known.

        Raises:
            ValueError: neither the latent nor its layer was read.
        """
        if latent in self.values:
            return self.values[latent]
        whole = self.values.get(Latent(latent.name, latent.layer))
        if whole is None:
            raise ValueError(
                f"the reference has no {latent}; it has {', '.join(map(str, self.values))}: name it, or its whole "
                "layer, when reading the activations"
            )
        return whole[:, latent.columns(whole.shape[1], self.heads)]


def changes_of(wanted: object) -> list[Intervention]:
    """What stands behind a key: interventions, or a number or a vector to set.

    Raises:
        TypeError: something else.
    """
    several = wanted if isinstance(wanted, (list, tuple)) else [wanted]
    found = [one for one in several if isinstance(one, Intervention)]
    return found if found and len(found) == len(several) else [Set(wanted)]


def chosen(positions: Positions, count: Count) -> Tensor:
    """[batch, token], which tokens of a forward are meant; never padding.

    Raises:
        ValueError: counted from the end of a prompt that nothing is known of, or that is shorter.
    """
    here = count.positions
    if positions is None:
        return here >= 0
    if isinstance(positions, slice):
        meant = here >= 0
        if positions.start is not None:
            meant = meant & (here >= _from_start(positions.start, count))
        if positions.stop is not None:
            meant = meant & (here < _from_start(positions.stop, count))
        return meant
    meant = torch.zeros_like(here, dtype=torch.bool)
    for place in numbered(positions):
        own = _from_start(place, count)
        if isinstance(own, Tensor) and (own < 0).any():
            raise ValueError(
                f"position {place} is before the beginning of a prompt of {int((own - place).min())} tokens"
            )
        meant |= here == own
    return meant


def numbered(positions: Positions) -> list[int]:
    """The single tokens that are named, none for slices."""
    if positions is None or isinstance(positions, slice):
        return []
    return [_whole(place) for place in (positions if isinstance(positions, (Sequence, Tensor)) else (positions,))]


def _from_start(place: int, count: Count) -> Tensor | int:
    if place >= 0:
        return place
    if count.prompt is None:
        raise ValueError(
            f"position {place} counts from the end of the prompt, which the model read before it was steered; steer "
            "the forward that reads the prompt too, or count from its beginning"
        )
    return count.prompt[:, None] + place


def _checked(positions: Any) -> None:
    try:
        if isinstance(positions, slice):
            bounds = [_whole(bound) for bound in (positions.start, positions.stop) if bound is not None]
            if positions.step is not None:
                raise ValueError(f"positions as a slice take no step, got {positions}; name them one by one")
            alike = len({bound < 0 for bound in bounds}) == 1
            if len(bounds) == 2 and alike and bounds[0] >= bounds[1]:
                raise ValueError(f"positions {positions} hold no token")
        elif positions is not None and not numbered(positions):
            raise ValueError("positions hold no token; give at least one, or None for all")
    except TypeError:
        raise TypeError(
            "positions must be a whole number, several, a slice such as slice(5, None), or None for all tokens; got "
            f"{positions!r}"
        ) from None


def _whole(number: Any) -> int:
    if isinstance(number, bool):
        raise TypeError(f"{number} is no number")
    return index(number)


def _value(value: Any) -> float | Tensor:
    """A number, or a vector that no gradient leaves.

    Raises:
        TypeError: neither.
        ValueError: of another shape, or not finite.
    """
    if isinstance(value, Real) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ValueError(f"an activation can't be steered by {value}; give a finite number")
        return float(value)
    try:
        vector = torch.as_tensor(value).detach()
    except (TypeError, ValueError, RuntimeError):
        vector = None
    if vector is None or vector.dtype == torch.bool or vector.is_complex():
        raise TypeError(
            "a latent is steered by a number, a vector, or Set, Add, Scale or Ablate (several: a list of them); got "
            f"{type(value).__name__}"
        )
    if vector.dim() > 1:
        raise ValueError(f"a latent is steered by a number or one vector, got the shape {tuple(vector.shape)}")
    if not vector.isfinite().all():
        raise ValueError("a vector to steer by has NaN or inf in it; give finite numbers")
    return vector.clone()  # what its owner does with it later changes nothing here


def _fits(value: float | Tensor, latent: Latent, size: int, dtype: torch.dtype) -> None:
    if isinstance(value, Tensor) and value.dim() and len(value) != size:
        raise ValueError(f"{latent} has {size} number{'s' if size > 1 else ''}, and the vector for it {len(value)}")
    largest = float(value.abs().max()) if isinstance(value, Tensor) else abs(value)
    if largest > torch.finfo(dtype).max:
        raise ValueError(f"{latent} is in {dtype}, which can't hold {largest:g}; give a smaller number")


def _like(value: float | Tensor, x: Tensor) -> Tensor:
    return torch.as_tensor(value).to(x.device, x.dtype)
