"""Steering: the model runs with some of its activations set, added to, scaled or ablated.

    with explainer.steer({("neuron", 7, 1234): 3.0, ("head", 5, 1): 0.0, ("residual", 6): Add(vector)}):
        model.generate(...)

1. Hooks stand where `lxt.latents` reads relevance: residual is a layer's output, heads and neurons are the input of
   the attention's and of the MLP's last projection, attn_out and mlp_out what these add to the stream. What is
   explained meanwhile is the steered model.
2. `lxt.counting` says which token of which row each position is, so that a cache or padding changes nothing.
3. Several changes of one activation happen in the order in which they are given; an inner `with` comes after an outer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from lxt.counting import Counter
from lxt.encdec import forward, with_prefix
from lxt.inputs import Model, batches, prepare, read, task
from lxt.interventions import (
    STEERABLE,
    Ablate,
    Activations,
    Add,
    Intervention,
    Key,
    Latent,
    Scale,
    Set,
    changes_of,
    chosen,
    latent_of,
    named,
    numbered,
)
from lxt.latents import KINDS, Keep, Site, UnknownPlace, alias, hooked, sites, wanted
from lxt.latents.adding import carried, replaced
from lxt.marks import copy_mark
from lxt.patches import patch_map_for
from lxt.patchmap import PatchMap

__all__ = ["Ablate", "Activations", "Add", "Intervention", "Key", "Scale", "Set", "Steering", "activations"]


class Steering:
    """Steers a model inside a `with` block, which can be entered again; afterwards the model is as it was.

    Only forwards in the thread that entered it are steered, and their backwards belong inside. Meanwhile compiled code
    of the process runs eagerly, since it doesn't know of the hooks.

    Args:
        model: a transformers model.
        patch_map: says where its latents are.
        interventions: for each latent what is done to it: a number or a vector to set, an Intervention, or a list of
            them.

    Raises:
        ValueError: a latent that there is none of, or a value that doesn't fit it.
        TypeError: a key that names no latent, or a value that is none.
    """

    def __init__(self, model: Model, patch_map: PatchMap, interventions: Mapping[Key, Any]) -> None:
        if not isinstance(interventions, Mapping) or not interventions:
            raise TypeError(
                "steering takes a mapping of latents to what is done to them, such as {('neuron', 7, 1234): 3.0}; got "
                f"{interventions!r}"
            )
        known = _sites(model, patch_map, interventions)
        self._model = model
        self._plan: dict[tuple[str, int], list[tuple[Latent, Intervention]]] = {}
        self._sites = known
        for key, asked in interventions.items():
            latent = latent_of(key, known)
            site = known[latent.name, latent.layer]
            for change in (one.resolved(latent) for one in changes_of(asked)):
                width = _width(model, site)
                if width is not None:
                    _check(latent, change, site, width, model.dtype)
                self._plan.setdefault((latent.name, latent.layer), []).append((latent, change))
        self._counter = Counter(model, next(iter(known.values())).module)
        self._longest = 0
        self._reached: set[tuple[str, int]] = set()
        self._undo: ExitStack | None = None

    def __repr__(self) -> str:
        latents = [str(latent) for changes in self._plan.values() for latent, _ in changes]
        return f"<Steering of {type(self._model).__name__}: {', '.join(latents)}>"

    def __enter__(self) -> Steering:
        if self._undo is not None:
            raise RuntimeError("this steering is already in force; call explainer.steer() again for another")
        self._longest, self._reached = 0, set()
        with ExitStack() as undo:
            undo.enter_context(torch.compiler.set_stance("force_eager"))
            undo.enter_context(self._counter.counting())
            for place, changes in self._plan.items():
                site = self._sites[place]
                undo.enter_context(_placed(site, partial(self._steered, site, changes)))
            self._undo = undo.pop_all()
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        if self._undo is None:
            return
        undo, self._undo = self._undo, None
        undo.close()
        if kind is None and (self._longest or self._counter.forwards):
            self._refuse_unreached()

    def _steered(self, site: Site, changes: Sequence[tuple[Latent, Intervention]], x: Tensor) -> Tensor:
        count = self._counter.of(x)
        if count is None:
            return x
        self._longest = max(self._longest, count.longest)
        self._reached.add((site.latent, site.layer))
        y = x.reshape(*count.positions.shape, x.shape[-1])
        for latent, change in changes:
            if y.shape[-1] != _width(self._model, site):
                _check(latent, change, site, y.shape[-1], y.dtype)
            meant = chosen(change.positions, count).to(y.device)
            columns = latent.columns(y.shape[-1], site.heads)
            columns = None if columns is None else columns.to(y.device)
            part = y if columns is None else y.index_select(-1, columns)
            part = torch.where(meant[..., None], change.changed(part, count), part)
            y = part if columns is None else y.index_copy(-1, columns, part)
        return copy_mark(x, y.view_as(x))

    def _refuse_unreached(self) -> None:
        for key, changes in self._plan.items():
            for latent, change in changes:
                if key not in self._reached:
                    raise ValueError(
                        f"{latent} was to be steered, and no forward of {type(self._model).__name__} ran that layer "
                        f"({type(self._sites[key].module).__name__}) with these inputs; steer a layer that runs"
                    )
                for place in numbered(change.positions):
                    if place >= self._longest:
                        raise ValueError(
                            f"{latent} was to be steered at position {place}, and the longest row had "
                            f"{self._longest} tokens; a slice may reach further"
                        )


class Explains(Protocol):
    """What is read of an Attributor."""

    model: Any
    tokenizer: Any
    patch_map: PatchMap | None


def activations(
    explainer: Explains, prompts: object, latents: Sequence[Key | str], batch_size: int | None = None
) -> Activations:
    """What latents are for these prompts: references for mean and resample ablation, and vectors to steer by.

    >>> found = activations(explainer, ["The cat", "A dog"], [("head", 5, 1), "residual"])  # doctest: +SKIP
    >>> found["residual", 6].mean(0)  # doctest: +SKIP

    Args:
        explainer: an Attributor.
        prompts: texts, chats or token ids, as in `Attributor.attribute`.
        latents: keys, or names, which are that latent in all layers, or paths of modules. All tokens of all of them
            are kept.
        batch_size: how many prompts run at once; None is all that can.

    Raises:
        ValueError: a latent that there is none of, or prompts that the model can't read.
    """
    if isinstance(latents, (str, tuple)) or not latents:
        raise TypeError(
            f"latents must be a list of keys and names, such as [('head', 5, 1), 'neuron'], got {latents!r}"
        )
    model = explainer.model
    patch_map = explainer.patch_map if explainer.patch_map is not None else patch_map_for(model)
    asked = [named(one) for one in latents]
    known = _sites(model, patch_map, [(one,) if _is_kind(one) else one for one in asked])
    found: dict[Latent, None] = {}
    for one in asked:
        keys = ([place for place in known if place[0] == one] or [(one, 0)]) if _is_kind(one) else [one]
        found |= dict.fromkeys(latent_of(key, known) for key in keys)
    rows = read(prompts, model, explainer.tokenizer)
    if task(model) == "seq2seq":  # the encoder is read: what its decoder begins with changes nothing
        rows = [replace(row, decoder=(getattr(model.config, "decoder_start_token_id", None) or 0,)) for row in rows]
    kept: dict[Latent, list[Tensor]] = {latent: [torch.empty(0)] * len(rows) for latent in found}
    thread = threading.get_ident()

    with torch.no_grad():
        for group in batches(rows, model, batch_size, square=False):
            prepared = with_prefix(prepare([rows[i] for i in group], model, explainer.tokenizer), model)

            def keep(latent: Latent, site: Site, mask: Tensor, group: Sequence[int], x: Tensor) -> Tensor:
                if threading.get_ident() == thread:
                    site.refuse_other_tokens(x, mask.shape)
                    columns = latent.columns(x.shape[-1], site.heads)
                    values = x.detach().reshape(*mask.shape, -1).cpu()
                    values = values if columns is None else values[..., columns]
                    for place, row, real in zip(group, values, mask, strict=True):
                        kept[latent][place] = row[real].clone()
                return x

            with ExitStack() as undo:
                for latent in found:
                    site = known[latent.name, latent.layer]
                    undo.enter_context(_placed(site, partial(keep, latent, site, prepared.mask, group)))
                forward(model, prepared)
    heads = next((site.heads for site in known.values() if site.latent == "head"), 1)
    return Activations(
        {latent: torch.cat(parts) for latent, parts in kept.items()}, tuple(len(row) for row in rows), heads
    )


def _sites(model: Model, patch_map: PatchMap, keys: Any) -> dict[tuple[str, int], Site]:
    """Every place of the latents whose names the keys begin with; unknown names are for `latent_of` to refuse."""
    layers: dict[str, list[Any]] = {}
    paths = []
    for key in map(named, keys):
        if isinstance(key, tuple) and key and key[0] in STEERABLE:
            layers.setdefault(key[0], []).append(key[1] if len(key) > 1 else None)
        elif isinstance(key, str) and alias(key) is None and not _is_kind(key):
            paths += wanted(key)
    found = sites(model, patch_map, paths)
    for name, numbers in (layers or ({} if paths else {"residual": []})).items():
        found += _of_layers(model, patch_map, name, numbers)
    return {(site.latent, site.layer): site for site in found}


def _of_layers(model: Model, patch_map: PatchMap, name: str, layers: Sequence[Any]) -> list[Site]:
    """The latent's places in all layers, or in those asked for where others don't have it."""
    try:
        try:
            return sites(model, patch_map, [Keep(name)])
        except ValueError:
            if not layers or not all(isinstance(layer, int) and layer >= 0 for layer in layers):
                raise
            return sites(model, patch_map, [Keep(name, layers=layers)])
    except UnknownPlace as error:
        ways = [f"{name!r} in the layers that have one: layers={error.layers}"] if error.layers else []
        ways += ["'mlp_out', what the experts add together"] if error.experts else []
        known = f", or give the Attributor a PatchMap with the {name} path" if name in ("head", "neuron") else ""
        ways = ways or [f"the output of a module by its path{known}"]
        raise ValueError(f"{error.what} Steer {'; or '.join(ways)}") from None


def _is_kind(key: object) -> bool:
    return isinstance(key, str) and key in KINDS


def _placed(site: Site, change: Callable[[Tensor], Tensor]) -> AbstractContextManager[None]:
    return replaced(site, change) if site.end == "branch" else hooked(site, carried(change))


def _check(latent: Latent, change: Intervention, site: Site, width: int, dtype: torch.dtype) -> None:
    columns = latent.columns(width, site.heads)
    change.fits(latent, width if columns is None else len(columns), dtype)


def _width(model: Model, site: Site) -> int | None:
    """How many numbers the activation has, where that can be known before it is there."""
    if site.latent not in KINDS:
        width = getattr(site.module, "out_features", getattr(site.module, "nf", None))
    elif site.latent in ("residual", "residual_pre", "attn_out", "mlp_out"):
        width = getattr(model.config.get_text_config(), "hidden_size", None)
    else:
        width = getattr(site.module, "in_features", getattr(site.module, "nx", None))  # nx: GPT-2's Conv1D
    return width if isinstance(width, int) else None
