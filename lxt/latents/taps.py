"""Relevance inside the model, read during the one backward.

Relevance is activation × gradient. A tap (`lxt.latents.reading`) is an identity in the forward that keeps its input
the way autograd does; when the gradient arrives in the backward it multiplies the two and stores the result only. So no
activation outlives its place in the graph, and under checkpointing none lives longer than its layer's recomputation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lxt import rules
from lxt.coefficients import wide
from lxt.latents.adding import carried, on_branches
from lxt.latents.attending import attention_reader
from lxt.latents.features import on_features
from lxt.latents.hooking import hooked
from lxt.latents.names import KINDS, Keep, parts_of
from lxt.latents.reading import reading
from lxt.latents.routing import on_experts, on_routers
from lxt.latents.sink import End, Sink, Site

__all__ = ["READERS", "Reader", "capture", "hooked"]

Reader = Callable[[Sequence[Site], Sink, torch.Size], AbstractContextManager[Any]]
"""(sites, where to write, [batch, token]) -> a context in which forwards are tapped there."""


def _on_module(sites: Sequence[Site], sink: Sink, shape: torch.Size) -> AbstractContextManager[Any]:
    """Reads outputs and inputs of modules, by hooks."""

    def tapped(site: Site, x: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            return x
        sink.ran.add((site.latent, site.layer))
        site.refuse_other_tokens(x, shape)
        # Of any module nobody knows what is done with its output: Falcon adds to its MLP's in place.
        return reading(x, (x,), partial(_write, site, sink, object(), shape), written_into=site.latent not in KINDS)

    undo = ExitStack()
    for site in sites:
        undo.enter_context(hooked(site, carried(partial(tapped, site))))
    return undo


def _write(site: Site, sink: Sink, owner: object, shape: torch.Size, c_x: Tensor, x: Tensor) -> None:
    x, c_x = (tensor.reshape(*shape, -1) for tensor in (x, c_x))
    if parts_of(site.latent) is None:
        relevance = rules.relevance(x, c_x)
    elif site.latent == "head":
        relevance = rules.relevance(x, c_x, site.heads)
    else:
        relevance = x.to(wide(x.dtype)) * c_x.to(wide(x.dtype))
    sink.write(site, owner, relevance)


READERS: Mapping[End, Reader] = {
    "output": _on_module,
    "input": _on_module,
    "branch": on_branches,
    "attention": attention_reader,
    "experts": on_experts,
    "router": on_routers,
    "features": on_features,
}


@contextmanager
def capture(places: Sequence[Site], batch: int, length: int, keeps: Sequence[Keep] = ()) -> Iterator[Sink]:
    """Tap these places during the forwards inside; the sink is filled by their backward.

    Args:
        places: where.
        batch: how many rows the forwards have.
        length: how many tokens their rows have, with padding.
        keeps: how much to keep of each latent; all, where that isn't said.
    """
    sink = Sink({keep.name: keep for keep in keeps}, places=tuple(places))
    with ExitStack() as undo:
        for reader in dict.fromkeys(READERS.values()):
            here = [site for site in places if READERS[site.end] is reader]
            if here:
                undo.enter_context(reader(here, sink, torch.Size((batch, length))))
        yield sink
