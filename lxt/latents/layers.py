"""The layers of a model: which modules hand on the residual stream."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lxt.inputs import Model
from lxt.patchmap import PatchMap

__all__ = ["residual_layers", "streams"]

_PARTS_OF_LAYERS = ("Attention", "FFN", "FeedForward", "MLP", "Norm")


def residual_layers(model: Model, patch_map: PatchMap) -> list[nn.Module]:
    """The layers whose outputs are the residual stream: those the map names, else the list nearest to the embedding.

    1. From the embedding of the tokens go up to the first module that has lists of layers in it: a model that also
       sees or hears has its other lists elsewhere.
    2. Of these lists take the one that lies least deep, and of several the longest. A list inside another is none.

    For encoder-decoders, those of the encoder: they share the tokens of the input.

    Raises:
        ValueError: there are none.
    """
    root = model
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and hasattr(model, "get_encoder"):
        root = model.get_encoder()
    found = _layers(root, patch_map)
    if not found:
        wanted = f"layers of class {', '.join(patch_map.layers)}" if patch_map.layers else "list of layers"
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
        decoder = model.get_decoder()
        found.append(_layers(decoder, patch_map) or _layers(decoder, PatchMap()))
    return [layers for layers in found if layers]


def _layers(root: nn.Module, patch_map: PatchMap) -> list[nn.Module]:
    if patch_map.layers:
        return [module for module in root.modules() if type(module).__name__ in patch_map.layers]
    lists = _lists(root)
    paths = list(_above_the_embedding(root))
    for path in paths:
        inside = {
            name: layers for name, layers in lists.items() if name.startswith(path) and all(map(_is_layer, layers))
        }
        if inside:
            return inside[min(inside, key=lambda name: (name.count("."), -len(inside[name])))]
    if paths:
        return []
    alike = [layers for layers in lists.values() if len({type(layer) for layer in layers}) == 1]
    return max(alike, key=lambda layers: (_is_layer(layers[0]), len(layers)), default=[])


def _lists(root: nn.Module) -> dict[str, list[nn.Module]]:
    """Lists of modules that lie in no other list, by path."""
    named = {name: part for name, part in root.named_modules() if isinstance(part, nn.ModuleList) and len(part)}
    return {
        name: list(_flat(part))
        for name, part in named.items()
        if not any(name.startswith(f"{other}.") for other in named)
    }


def _flat(layers: nn.ModuleList) -> Iterator[nn.Module]:
    for layer in layers:
        if isinstance(layer, nn.ModuleList):  # blocks of layers
            yield from _flat(layer)
        else:
            yield layer


def _is_layer(module: nn.Module) -> bool:
    """Whether it may be a layer: it has parts, perhaps in a list of its own as in T5, and is none."""
    return len(list(module.modules())) > 2 and not type(module).__name__.endswith(_PARTS_OF_LAYERS)


def _above_the_embedding(root: nn.Module) -> Iterator[str]:
    """The paths of the modules around the embedding of the tokens, each with a dot behind it, the innermost first."""
    try:
        table = root.get_input_embeddings()  # type: ignore[operator]  # a method, where it is there
    except (AttributeError, NotImplementedError):  # a model that reads no tokens
        table = None
    path = next((name for name, module in root.named_modules() if module is table), None)
    while path:
        path = path.rpartition(".")[0]
        yield f"{path}." if path else ""
