"""Where latents are in a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from lxt.inputs import Model
from lxt.latents.anatomy import Anatomy, NotThere, heads_of, norms
from lxt.latents.attending import ATTENTION
from lxt.latents.features import Features
from lxt.latents.layers import residual_layers
from lxt.latents.names import ALLOWED, KINDS, Keep, suggestion
from lxt.latents.routing import routing_sites
from lxt.latents.sink import Site
from lxt.patchmap import PatchMap

__all__ = ["UnknownPlace", "sites"]


class UnknownPlace(ValueError):
    """It isn't known where a latent is in a layer.

    Attributes:
        what: the latent, the layer, the reason, and what that layer has.
        layers: those where it is known.
        experts: whether neurons are wanted where experts have them.
    """

    def __init__(self, what: str, layers: Sequence[int], experts: bool, instead: str) -> None:
        super().__init__(f"{what} {instead}")
        self.what, self.layers, self.experts = what, tuple(layers), experts


def sites(model: Model, patch_map: PatchMap, latents: Sequence[Keep]) -> list[Site]:
    """Every place to tap for these latents; none for `embed`, which the pass itself has.

    Raises:
        UnknownPlace: it isn't known where it is; names what there is.
        ValueError: there is no such latent or layer.
    """
    found: list[Site] = []
    for keep in latents:
        latent = keep.name
        if isinstance(keep, Features):
            found.append(keep.site(partial(sites, model, patch_map)))
            continue
        if latent == "embed":
            continue
        if latent not in KINDS:
            found.append(_of_path(model, patch_map, latent))
            continue
        layers = residual_layers(model, patch_map)
        numbers = range(len(layers)) if keep.layers is None else keep.layers
        for number in numbers:
            if not 0 <= number < len(layers):
                raise ValueError(
                    f"{latent!r} is wanted of layer {number}, and the model has the layers 0 to {len(layers) - 1}"
                )
        if latent in ATTENTION:
            found += [Site(latent, number, layers[number], "attention") for number in numbers]
        elif latent in ("expert", "router"):
            found += routing_sites(keep, layers, numbers)
        else:
            found += _in_layers(keep, layers, numbers, model, patch_map)
    return found


def _in_layers(
    keep: Keep, layers: Sequence[nn.Module], numbers: Sequence[int], model: Model, patch_map: PatchMap
) -> list[Site]:
    def find(number: int) -> Site:
        return _FINDERS[keep.name](number, layers[number], model, patch_map)

    found = []
    for number in numbers:
        try:
            found.append(find(number))
        except NotThere as reason:
            having = [other for other in range(len(layers)) if _succeeds(find, other)]
            experts = keep.name == "neuron" and Anatomy(layers[number], patch_map).has_experts
            raise _unknown_place(keep.name, number, layers[number], model, str(reason), having, experts) from None
    return found


def _unknown_place(
    latent: str, number: int, layer: nn.Module, model: Model, reason: str, having: Sequence[int], experts: bool
) -> UnknownPlace:
    parts = [name for name, part in layer.named_modules() if getattr(part, "weight", None) is not None]
    where = f"layer {number} of {type(model).__name__} ({type(layer).__name__})"
    what = f"{latent!r} is not known for {where}: {reason}. That layer has {', '.join(parts)}."
    ways = []
    if having:
        those = f"layers={tuple(having)}"
        ways.append(f"the layers that have one: {those}, as in Keep({latent!r}, {those})")
    if experts:
        ways.append("'expert', the relevance of each expert")
    if ways:
        return UnknownPlace(what, having, experts, f"Ask for {'; or for '.join(ways)}")
    path = {"head": "head", "neuron": "neuron"}.get(latent)
    known = f", or give the Attributor a PatchMap with the {path} path" if path else ""
    instead = f"Leave {latent!r} out{known}, or ask for a module by its path, whose output is then read"
    return UnknownPlace(what, having, experts, instead)


def _succeeds(find: Callable[[int], Site], number: int) -> bool:
    try:
        find(number)
    except NotThere:
        return False
    return True


def _output(number: int, layer: nn.Module, model: Model, patch_map: PatchMap) -> Site:
    return Site("residual", number, layer)


def _input(number: int, layer: nn.Module, model: Model, patch_map: PatchMap) -> Site:
    return Site("residual_pre", number, layer, "input")


def _head(number: int, layer: nn.Module, model: Model, patch_map: PatchMap) -> Site:
    parts = Anatomy(layer, patch_map)
    if parts.output is None:
        raise NotThere(
            "it has no attention"
            if parts.attention is None
            else f"its attention ({type(parts.attention).__name__}) has no output projection that is a module"
        )
    return Site("head", number, parts.output, "input", heads_of(parts.attention, parts.output, model))


def _neuron(number: int, layer: nn.Module, model: Model, patch_map: PatchMap) -> Site:
    parts = Anatomy(layer, patch_map)
    if parts.down is None:
        why = "its MLP has no single down projection" if parts.mlp is not None else "it has no MLP"
        raise NotThere(f"{why}: each of its experts has one" if parts.has_experts else why)
    return Site("neuron", number, parts.down, "input")


def _attention_output(number: int, layer: nn.Module, model: Model, patch_map: PatchMap) -> Site:
    module = _added_by_attention(Anatomy(layer, patch_map))
    return Site("attn_out", number, module, "branch", of=(Site("residual", number, layer),))


def _mlp_output(number: int, layer: nn.Module, model: Model, patch_map: PatchMap) -> Site:
    module = _added_by_mlp(Anatomy(layer, patch_map))
    return Site("mlp_out", number, module, "branch", of=(Site("residual", number, layer),))


def _between(number: int, layer: nn.Module, model: Model, patch_map: PatchMap) -> Site:
    attention = _attention_output(number, layer, model, patch_map)
    mlp = _mlp_output(number, layer, model, patch_map)
    return Site("residual_mid", number, layer, "branch", of=(Site("residual", number, layer), attention, mlp))


def _added_by_attention(parts: Anatomy) -> nn.Module:
    _refuse_layer_within(parts)
    if parts.output is not None:
        return parts.output
    if parts.attention is None:
        raise NotThere("it has no attention")
    if norms(parts.attention):
        raise NotThere(f"its {type(parts.attention).__name__} adds to the residual stream by itself")
    return parts.attention


def _refuse_layer_within(parts: Anatomy) -> None:
    if parts.within is not None:
        raise NotThere(f"its attention and MLP lie in a {type(parts.within).__name__}, which is added as a whole")


def _added_by_mlp(parts: Anatomy) -> nn.Module:
    _refuse_layer_within(parts)
    if parts.mlp is not None and (parts.down is None or _is_plain(parts.mlp)):
        return parts.mlp
    if parts.down is None:
        raise NotThere("it has no MLP")
    return parts.down


def _is_plain(mlp: nn.Module) -> bool:
    """Whether it is the MLP alone: with a norm in it, or given two tensors, it may add to the stream by itself."""
    return not norms(mlp) and len(inspect.signature(type(mlp).forward).parameters) == 2


_FINDERS: dict[str, Callable[[int, nn.Module, Model, PatchMap], Site]] = {
    "residual": _output,
    "residual_pre": _input,
    "residual_mid": _between,
    "attn_out": _attention_output,
    "mlp_out": _mlp_output,
    "head": _head,
    "neuron": _neuron,
}


def _of_path(model: Model, patch_map: PatchMap, path: str) -> Site:
    try:
        module = model.get_submodule(path)
    except AttributeError:
        names = [name for name, _ in model.named_modules() if name]
        near = suggestion(path, names if "." in path else [*KINDS, *names])
        raise ValueError(
            f"{path!r} is neither a latent nor a module of {type(model).__name__}{near or '.'} Allowed: {ALLOWED}"
        ) from None
    if module is _table(model):
        raise ValueError(
            f"{path!r} is the table of embeddings, and what is explained begins behind it; 'embed' has their relevance"
        )
    if getattr(model.config, "is_encoder_decoder", False) and hasattr(model, "get_decoder"):
        decoder = set(model.get_decoder().modules())
        if module in decoder or module is model.get_output_embeddings():
            raise ValueError(
                f"{path!r} is in the decoder, or behind it, which reads other tokens than those of the prompt; only "
                "what the encoder does has relevance by the prompt's tokens"
            )
    layers = residual_layers(model, patch_map)
    number = next((number for number, layer in enumerate(layers) if module in set(layer.modules())), 0)
    return Site(path, number, module)


def _table(model: Model) -> nn.Module | None:
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # a model that reads no tokens
        return None
