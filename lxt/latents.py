"""Relevance inside the model, read during the one backward.

Relevance is activation × gradient. A `Tap` is an identity in the forward that keeps its input the way autograd does;
when the gradient arrives in the backward it multiplies the two and stores the result only. So no activation outlives
its place in the graph, and under checkpointing none lives longer than its layer's recomputation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from lxt import rules
from lxt.checkpointing import carry, saved_as
from lxt.coefficients import wide
from lxt.inputs import Model
from lxt.patchmap import PatchMap

__all__ = ["LATENTS", "Sink", "Site", "capture", "names", "residual_layers", "sites", "streams"]

LATENTS = ("residual", "head", "neuron")


@dataclass(frozen=True)
class Site:
    """Where a latent is read: the output of a layer, or the input of a projection inside it.

    Attributes:
        latent: one of LATENTS.
        layer: the layer's number.
        module: the layer, or the projection.
        heads: how many heads share the last dimension, for `head`.
    """

    latent: str
    layer: int
    module: nn.Module
    heads: int = 1


@dataclass
class Sink:
    """What the taps of one backward wrote, by latent and layer."""

    values: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    owners: dict[tuple[str, int], object] = field(default_factory=dict)

    def write(self, site: Site, owner: object, value: Tensor) -> None:
        """Keep the value; a second backward through the same tap overwrites it.

        Raises:
            ValueError: the module ran twice in one forward, so that there is no one value for its layer.
        """
        key = (site.latent, site.layer)
        if self.owners.setdefault(key, owner) is not owner:
            raise ValueError(
                f"layer {site.layer} ({type(site.module).__name__}) runs more than once in a forward, as where layers "
                f"are shared, so {site.latent!r} has no one value for it; leave that latent out"
            )
        self.values[key] = value

    def stacked(self, latent: str, mask: Tensor) -> Tensor:
        """[layer, batch, token, …] on the CPU, 0 at padding; the sink gives it away.

        Raises:
            ValueError: a layer's tap was never reached, or layers differ in size.
        """
        keys = [key for key in sorted(self.values) if key[0] == latent]
        shapes = sorted({tuple(self.values[key].shape) for key in keys})
        if len(shapes) != 1:
            raise ValueError(
                f"{latent!r} has {shapes or 'no value'} in the layers, not one shape; leave that latent out"
            )
        first = self.values[keys[0]]
        stack = first.new_empty((len(keys), *first.shape), device="cpu")
        for layer, key in zip(stack, keys, strict=True):
            layer.copy_(self.values.pop(key))  # which goes as its copy comes, so that there is one of all
        return stack if mask.all() else stack.masked_fill_(~mask.view(1, *mask.shape, *[1] * (stack.dim() - 3)), 0)


class Tap(torch.autograd.Function):
    """Identity that writes activation × gradient to a sink when the backward passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, site: Site, sink: Sink, owner: object, shape: torch.Size) -> Tensor:
        ctx.save_for_backward(x)  # through autograd, so that checkpointing replaces it by a recomputation
        ctx.site, ctx.sink, ctx.owner, ctx.shape = site, sink, owner, shape
        return torch.ops.aten._unsafe_view(x, x.shape)  # no view: models write into it

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        (x,) = ctx.saved_tensors
        activation, c_x = (tensor.detach().reshape(*ctx.shape, -1) for tensor in (x, gradient))
        if ctx.site.latent == "residual":
            relevance = rules.relevance(activation, c_x)
        elif ctx.site.latent == "head":
            relevance = rules.relevance(activation, c_x, ctx.site.heads)
        else:
            dtype = wide(x.dtype)
            relevance = (
                activation.to(dtype) * c_x.to(dtype)
            ).cpu()  # layers × tokens × neurons is large: it does not wait on the device
        ctx.sink.write(ctx.site, ctx.owner, relevance)
        return gradient, None, None, None, None


def names(latents: str | Sequence[str]) -> tuple[str, ...]:
    """The wanted latents' names, checked.

    Raises:
        ValueError: there is no such latent.
        TypeError: not names.
    """
    if not isinstance(latents, (str, Iterable)):
        raise TypeError(f"latents must be names out of {', '.join(LATENTS)}, got {type(latents).__name__}")
    wanted = (latents,) if isinstance(latents, str) else tuple(dict.fromkeys(latents))
    for name in wanted:
        if name not in LATENTS:
            near = get_close_matches(str(name), LATENTS, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown latent {name!r}; allowed: {', '.join(LATENTS)}{hint}")
    return wanted


def residual_layers(model: Model, patch_map: PatchMap) -> list[nn.Module]:
    """The layers whose outputs are the residual stream: those the map names, else the longest list of like modules.

    A list inside another is none: it holds parts of a layer.

    For encoder-decoders, those of the encoder: they share the tokens of the input.

    Raises:
        ValueError: there are none.
    """
    root = model
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and hasattr(model, "get_encoder"):
        root = model.get_encoder()
    if patch_map.layers:
        found = [module for module in root.modules() if type(module).__name__ in patch_map.layers]
    else:
        named = {name: part for name, part in root.named_modules() if isinstance(part, nn.ModuleList)}
        outer = [part for name, part in named.items() if not any(name.startswith(f"{other}.") for other in named)]
        lists = [part for part in outer if len({type(layer) for layer in part}) == 1]
        found = list(max(lists, key=len)) if lists else []
    if not found:
        wanted = f"layers of class {', '.join(patch_map.layers)}" if patch_map.layers else "list of like layers"
        raise ValueError(f"{type(model).__name__} has no {wanted}, which latents are read from; leave latents out")
    return found


def streams(model: Model, patch_map: PatchMap) -> list[list[nn.Module]]:
    """The layers of each residual stream, which can be checkpointed: those of encoder-decoders have two.

    Raises:
        ValueError: there are none.
    """
    try:
        found = [residual_layers(model, patch_map)]
    except ValueError:
        raise ValueError(
            f"{type(model).__name__} has no list of layers that could be checkpointed; use checkpoint='off'"
        ) from None
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and hasattr(model, "get_decoder"):
        names = patch_map.layers or tuple({type(layer).__name__ for layer in found[0]})
        decoder = [module for module in model.get_decoder().modules() if type(module).__name__ in names]
        lists = [list(m) for m in model.get_decoder().modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
        found.append(decoder or max(lists, key=len, default=[]))
    return [layers for layers in found if layers]


def sites(model: Model, patch_map: PatchMap, latents: Sequence[str]) -> list[Site]:
    """Every place to tap for these latents.

    Raises:
        ValueError: the architecture has no such place, or it isn't known where; names what there is.
    """
    found: list[Site] = []
    layers = residual_layers(model, patch_map) if latents else []
    for latent in latents:
        for number, layer in enumerate(layers):
            if latent == "residual":
                found.append(Site(latent, number, layer))
                continue
            path = patch_map.head if latent == "head" else patch_map.neuron
            try:
                module = layer.get_submodule(path or "?")
            except AttributeError:
                linear = [name for name, part in layer.named_modules() if getattr(part, "weight", None) is not None]
                what = f"at {path!r} there is none" if path else "its patch map does not say where"
                where = f"layer {number} of {type(model).__name__} ({type(layer).__name__})"
                raise ValueError(
                    f"{latent!r} is not known for {where}: {what}; that layer has {', '.join(linear)}. Leave "
                    f"{latent!r} out, or give the Attributor a PatchMap with the {latent} path"
                ) from None
            found.append(Site(latent, number, module, _heads(model) if latent == "head" else 1))
    return found


def _heads(model: Model) -> int:
    config = model.config.get_text_config()
    for name in ("num_attention_heads", "n_head", "n_heads", "num_heads"):
        if isinstance(getattr(config, name, None), int):
            return getattr(config, name)
    raise ValueError(
        f"the configuration of {type(model).__name__} does not say how many heads there are; leave 'head' out"
    )


@contextmanager
def capture(places: Sequence[Site], batch: int, length: int) -> Iterator[Sink]:
    """Tap these places during the forwards inside; the sink is filled by their backward."""
    sink, handles = Sink(), []
    shape = torch.Size((batch, length))

    def tapped(site: Site, x: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            return x
        with saved_as(x) or nullcontext():  # a checkpointed layer's output is not kept
            return carry(x, Tap.apply(x, site, sink, object(), shape))  # type: ignore[arg-type]

    def on_output(site: Site) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if isinstance(output, Tensor):
                return tapped(site, output)
            return (tapped(site, output[0]), *output[1:])

        return hook

    def on_input(site: Site) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
            return (tapped(site, args[0]), *args[1:])

        return hook

    try:
        for site in places:
            if site.latent == "residual":
                handles.append(site.module.register_forward_hook(on_output(site)))
            else:
                handles.append(site.module.register_forward_pre_hook(on_input(site)))
        yield sink
    finally:
        for handle in handles:
            handle.remove()
