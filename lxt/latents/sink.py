"""Where a latent is read, and what its readings become."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from lxt.latents.names import KINDS, Keep
from lxt.latents.values import LatentRelevance

__all__ = ["End", "Sink", "Site"]

End = Literal["output", "input", "branch", "attention", "experts", "router", "features"]
"""At which end of its module a latent is, or what reads it there (`lxt.latents.taps.READERS`)."""


@dataclass(frozen=True)
class Site:
    """Where a latent is read in a layer.

    Attributes:
        latent: the name that it is kept by.
        layer: the layer's number.
        module: whose output or input it is.
        end: which of them.
        heads: how many heads share the last dimension, for `head`; how many experts there are, for `router`.
        of: other places that it is read from, where its reader needs them.
    """

    latent: str
    layer: int
    module: nn.Module
    end: End = "output"
    heads: int = 1
    of: tuple[Site, ...] = ()

    def refuse_other_tokens(self, x: Tensor, shape: torch.Size) -> None:
        """Only [batch, token, ...], or both in one, can be told by the prompt's tokens.

        Raises:
            ValueError: the activation is of another shape.
        """
        alone = 1 in shape and x.shape[:2].numel() == shape.numel()  # the order of one row is clear
        # of any module nobody knows whether heads or tokens come first, where there are as many
        either = self.latent not in KINDS and x.dim() > 3 and x.shape[2] == shape[1] > 1
        if (x.dim() > 2 and (x.shape[:2] == shape or alone) and not either) or (
            x.dim() == 2 and len(x) == shape.numel()
        ):
            return
        raise ValueError(
            f"{self.latent!r} in layer {self.layer} ({type(self.module).__name__}) has the shape {tuple(x.shape)}, "
            f"where the prompt's is {tuple(shape)}: these are other tokens, or in another order; leave it out"
        )


@dataclass
class Sink:
    """What the taps of one backward wrote, by latent and layer.

    Attributes:
        keeps: by latent, how much of it to keep.
        values: by latent and layer, [batch, token, ...]; where only the largest are kept, with their indices and the
            sum of the rest.
        owners: by latent and layer, whose taps wrote.
        parts: by latent, how many parts there are, where only the largest are kept.
        expected: by latent and layer, shape and dtype of what is 0 if nothing is written.
        places: where something should be written.
        ran: by latent and layer, whose modules ran.
    """

    keeps: Mapping[str, Keep] = field(default_factory=dict)
    values: dict[tuple[str, int], tuple[Tensor, ...]] = field(default_factory=dict)
    owners: dict[tuple[str, int], object] = field(default_factory=dict)
    parts: dict[str, int] = field(default_factory=dict)
    expected: dict[tuple[str, int], tuple[torch.Size, torch.dtype]] = field(default_factory=dict)
    places: Sequence[Site] = ()
    ran: set[tuple[str, int]] = field(default_factory=set)

    def expect(self, site: Site, shape: torch.Size, dtype: torch.dtype) -> None:
        """The site is there, and is 0 where the rules send nothing back to it; [batch, token, ...]."""
        self.expected[site.latent, site.layer] = shape, dtype

    def write(self, site: Site, owner: object, value: Tensor) -> None:
        """Keep what is wanted of [batch, token, ...]; a second backward through the same tap overwrites it.

        Raises:
            ValueError: the module ran twice in one forward, so that there is no one value for its layer.
        """
        key = (site.latent, site.layer)
        if self.owners.setdefault(key, owner) is not owner:
            raise ValueError(
                f"layer {site.layer} ({type(site.module).__name__}) runs more than once in a forward, as where layers "
                f"are shared, so {site.latent!r} has no one value for it; leave that latent out"
            )
        self.values[key] = self._kept(site.latent, value)

    def _refuse_missing(self, latent: str, keys: Sequence[tuple[str, int]]) -> None:
        missing = [site for site in self.places if site.latent == latent and (latent, site.layer) not in keys]
        if not missing:
            return
        site = missing[0]
        name = type(site.module).__name__
        why = f"{name} did not run, or nothing that is explained depends on it"
        if latent == "residual_mid":
            why = "nothing was seen that attention is added to and the MLP reads, as where both read the same stream"
        elif (latent, site.layer) in self.ran:
            why = f"{name} ran, and nothing that is explained depends on its output, or on the first tensor of that"
            why += " ('router' is the relevance of a router's logits)" if "router" in name.lower() else ""
        there = tuple(layer for _, layer in keys)
        other = f"ask for Keep({latent!r}, layers={there})" if there else f"leave {latent!r} out"
        raise ValueError(f"no relevance came to {latent!r} in layer {site.layer}: {why}; {other}")

    def _kept(self, latent: str, value: Tensor) -> tuple[Tensor, ...]:
        keep = self.keeps.get(latent)
        if keep is None or keep.top is None or keep.top >= value.shape[-1]:
            # layers × tokens × neurons is large: it does not wait on the device
            return (value.cpu() if value.dim() > 2 else value,)
        self.parts[latent] = value.shape[-1]
        indices = value.abs().topk(keep.top, -1).indices
        largest = value.gather(-1, indices)
        return largest.cpu(), indices.to(torch.int32).cpu(), (value.sum(-1) - largest.sum(-1)).cpu()

    def stacked(self, latent: str, mask: Tensor) -> LatentRelevance:
        """All layers' on the CPU, 0 at padding; the sink gives them away.

        Raises:
            ValueError: a layer's tap was never reached, or layers differ in size.
        """
        for key, (shape, dtype) in self.expected.items():
            if key[0] == latent and key not in self.values:
                self.values[key] = self._kept(latent, torch.zeros(shape, dtype=dtype))
        keys = [key for key in sorted(self.values) if key[0] == latent]
        self._refuse_missing(latent, keys)
        shapes: dict[tuple[int, ...], list[int]] = {}
        for key in keys:
            shapes.setdefault(tuple(self.values[key][0].shape), []).append(key[1])
        if len(shapes) != 1:
            each = "; ".join(f"{size} in layers {', '.join(map(str, layers))}" for size, layers in shapes.items())
            first = tuple(next(iter(shapes.values()), ()))
            raise ValueError(
                f"{latent!r} has not one shape in all layers: {each or 'no value'}. Ask for those of one shape, as "
                f"Keep({latent!r}, layers={first})"
            )
        stacks = [part.new_empty((len(keys), *part.shape), device="cpu") for part in self.values[keys[0]]]
        for number, key in enumerate(keys):
            for stack, part in zip(stacks, self.values.pop(key), strict=True):  # which goes as its copy comes
                stack[number].copy_(part)
        if not mask.all():
            real = mask[:, None] if latent in ("pattern", "flow") else mask  # [batch, head, query, ...]
            for stack in stacks:
                stack.masked_fill_(~real.view(1, *real.shape, *[1] * (stack.dim() - 1 - real.dim())), 0)
        numbers = tuple(layer for _, layer in keys)
        return LatentRelevance(latent, stacks[0], numbers, *stacks[1:], parts=self.parts.get(latent))
