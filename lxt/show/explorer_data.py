"""What the explorer's page holds: one row's tokens and latents, packed, in as much detail as it is told to.

By their shapes, latents become one of four things:

    stream  [layer, token]               a number for each token: residual, attn_out, ...
    grid    [layer, part], [.., token]   few parts: head, expert, ...; the sums over tokens are always exact
    list    [layer, token, largest]      many parts: neuron, feature, ...; the largest at each token, and of all tokens
    map     [head, query, key]           flow, pattern: the heads with the most relevance first
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lxt.latents.names import KINDS, parts_of
from lxt.latents.ranking import label, letter
from lxt.latents.values import LatentRelevance
from lxt.show.labels import Labels
from lxt.show.packing import floats, integers, packed
from lxt.show.rows import Row, unit
from lxt.show.words import direction, listed, shorten, visible

if TYPE_CHECKING:
    from lxt.attribution import Attribution
    from lxt.neurons.results import Context, Neuron, Neurons

__all__ = [
    "Detail",
    "is_causal",
    "most_relevant",
    "named",
    "row_data",
    "shape_of",
    "text_data",
]

_GRID = 256  # parts that a map of layers × parts can show as columns; with more they are a list
_OVERALL = 40  # parts of a layer that the list for all tokens names
_TOKEN = 60  # characters shown of one token
_EXACT = 1000  # characters of a token that saved tables have as it is
_NAME = 200  # of a label that the user gives


@dataclass(frozen=True)
class Detail:
    """How much of a row the page holds; sums are not affected.

    Attributes:
        heads: of a grid, how many parts in all layers together have their tokens.
        largest: of a list, how many parts at each token.
        named: how many parts of lists come with their labelled contexts.
        contexts: how many contexts of each kind.
        maps: how many heads have their query × key map.
    """

    heads: int
    largest: int
    named: int
    contexts: int
    maps: int = 0


def shape_of(latent: LatentRelevance) -> str:
    """`stream`, `grid`, `list` or `map`."""
    if latent.values.dim() == 5:
        return "map"
    if latent.values.dim() == 3:
        return "stream"
    listed_parts = latent.name == "neuron" or latent.indices is not None or latent.values.shape[-1] > _GRID
    return "list" if listed_parts else "grid"


def row_data(row: Row, one: Attribution, latents: Mapping[str, LatentRelevance], detail: Detail) -> dict[str, Any]:
    """One row of the page, without its tokens.

    Args:
        row: prepared for views, with its special tokens.
        one: the same as an Attribution of one row.
        latents: its latents.
        detail: how much of them.
    """
    explained = row.explained
    shapes = {"stream": _stream, "grid": _grid, "list": _list, "map": _map}
    found: dict[str, dict[str, Any]] = {shape: {} for shape in shapes}
    for name, latent in latents.items():
        if latent.values.numel():
            shape = shape_of(latent)
            found[shape][name] = shapes[shape](latent, detail) | _words(name)
    return {
        "target": row.target,
        "value": row.value,
        "unit": unit(explained.kind),
        "facts": _facts(row),
        "asked": row.asked,
        "conserved": row.conserved,
        "note": row.note,
        "relevance": floats(one.relevance[0]),
        "streams": found["stream"],
        "grids": found["grid"],
        "lists": found["list"],
        "maps": found["map"],
    }


def text_data(one: Attribution) -> dict[str, Any]:
    """The tokens, as they are shown; rows that explain the same prompt share them."""
    shown = [shorten(token, _TOKEN) if token else "∅" for token in one.tokens[0]]
    pairs = enumerate(zip(one.tokens[0], shown, strict=True))
    return {
        "tokens": shown,
        "exact": {place: token for place, (token, text) in pairs if token != text and len(token) <= _EXACT},
        "names": [listed(token, 24) for token in one.tokens[0]],
        "special": one.special[0].nonzero().flatten().tolist(),
        "direction": direction(one.tokens[0]),
    }


def named(labels: Labels, layer: int, part: int, count: int) -> dict[str, Any] | None:
    """What a neuron or head stands for as the page shows it, with so many contexts; None where nobody knows."""
    if isinstance(labels, Mapping):
        text = shorten(str(labels.get((layer, part), "")), _NAME)
        return {"label": text, "auroc": None, "contexts": []} if text else None
    neuron = _labelled(labels, layer, part)
    return None if neuron is None else _contexts(neuron, labels.by, count)


def _contexts(neuron: Neuron, by: str, count: int) -> dict[str, Any]:
    order = sorted(neuron.contexts, key=lambda key: (key[1] != "positive", key[0] != by))
    return {
        "label": visible(neuron.label),
        "auroc": None if neuron.auroc is None else round(neuron.auroc, 3),
        "contexts": [
            {"kind": f"{sign} {kind}", "shown": [_context(context) for context in found[:most]]}
            for (kind, sign), most in zip(order, [count, *[min(count, 3)] * 3], strict=True)
            if (found := neuron.contexts[kind, sign])
        ],
    }


def most_relevant(latent: LatentRelevance) -> list[tuple[float, int, int]]:
    """(|relevance|, layer, part) of the parts that the page can name, strongest first; at one token or in all."""
    best: dict[tuple[int, int], float] = {}
    for place, layer in enumerate(latent.layers):
        values, parts = _largest(latent, place, 20)
        for value, part in zip(values.abs().flatten().tolist(), parts.flatten().tolist(), strict=True):
            best[layer, part] = max(best.get((layer, part), 0.0), value)
        sums = _sums(latent, place)
        for part in sums.abs().topk(min(_OVERALL, len(sums))).indices.tolist():
            best[layer, part] = max(best.get((layer, part), 0.0), abs(float(sums[part])))
    return sorted(((value, *key) for key, value in best.items()), key=lambda entry: (-entry[0], *entry[1:]))


def _words(name: str) -> dict[str, Any]:
    meaning = KINDS[name].meaning if name in KINDS else name
    return {"meaning": meaning, "parts": parts_of(name) or "feature", "letter": letter(name)}


def _facts(row: Row) -> list[str]:
    """What else is known of the explained value."""
    known = row.standing or (row.predicted and f"the model predicts {row.predicted}")
    return [fact for fact in (known, row.places_asked) if fact]


def _stream(latent: LatentRelevance, detail: Detail) -> dict[str, Any]:
    names = [label(latent.name, layer, None) for layer in latent.layers]
    return {"layers": list(latent.layers), "names": names, "values": packed(latent.values[:, 0])}


def _grid(latent: LatentRelevance, detail: Detail) -> dict[str, Any]:
    values = latent.values[:, 0].double()  # [layer, token, part]
    layers, _, parts = values.shape
    series = values.transpose(1, 2).flatten(0, 1)  # [layer · part, token]
    order = series.abs().sum(-1).argsort(descending=True, stable=True)[: detail.heads].sort().values
    return {
        "layers": list(latent.layers),
        "count": parts,
        "sums": floats(values.sum(1)),
        "kept": None if len(order) == layers * parts else order.tolist(),
        "values": packed(series[order]),
    }


def _list(latent: LatentRelevance, detail: Detail) -> dict[str, Any]:
    values, parts, rest, best, sums, others = [], [], [], [], [], []
    for place in range(len(latent.layers)):
        kept, which = _largest(latent, place, detail.largest)
        values.append(kept.flatten())
        parts.append(which.flatten())
        rest.append(_all(latent, place) - kept.sum(-1))
        overall = _sums(latent, place)
        top = overall.abs().argsort(descending=True, stable=True)[:_OVERALL]
        best.append(top)
        sums.append(overall[top])
        others.append(_all(latent, place).sum() - overall[top].sum())
    return {
        "layers": list(latent.layers),
        "largest": kept.shape[-1],
        "values": packed(torch.stack(values)),
        "indices": integers(torch.stack(parts)),
        "rest": packed(torch.stack(rest)),
        "best": integers(torch.stack(best)),
        "width": len(top),
        "sums": floats(torch.stack(sums)),
        "others": floats(torch.stack(others)),
        "complete": latent.indices is None,
    }


def _map(latent: LatentRelevance, detail: Detail) -> dict[str, Any]:
    heads, length = latent.values.shape[2], latent.values.shape[3]
    order = torch.zeros(0, dtype=torch.long)
    if detail.maps:
        strength = torch.cat([layer[0].abs().sum((-2, -1)) for layer in latent.values])  # [layer · head]
        order = strength.argsort(descending=True, stable=True)[: detail.maps].sort().values
    layer, head = order // heads, order % heads
    maps = latent.values[layer, 0, head]  # [map, query, key]
    if latent.indices is not None:
        keys = latent.indices[layer, 0, head].long()
        whole = maps.new_zeros(len(order), length, length)
        known = whole.scatter(-1, keys, 1.0).bool()
        # add: slots of padding, which are 0, may name the key of another slot
        maps = whole.scatter_add(-1, keys, maps).masked_fill(~known, torch.nan)
    causal = not maps.nan_to_num().triu(1).any()
    rows, columns = torch.tril_indices(length, length)
    return {
        "layers": list(latent.layers),
        "count": heads,
        "kept": order.tolist(),
        "causal": causal,
        "largest": None if latent.indices is None else latent.values.shape[-1],
        "values": packed(maps[:, rows, columns] if causal else maps.flatten(1)),
    }


def is_causal(latent: LatentRelevance) -> bool:
    """Whether no query of a map looks at a later key."""
    if latent.indices is None:
        return not latent.values.triu(1).any()
    queries = torch.arange(latent.values.shape[3])[:, None]
    return not (latent.values.bool() & (latent.indices > queries)).any()


def _largest(latent: LatentRelevance, place: int, count: int) -> tuple[Tensor, Tensor]:
    """A layer's largest values at each token and whose they are, [token, count] both, largest first."""
    values = latent.values[place, 0].double()
    top = values.abs().topk(min(count, values.shape[-1]), -1).indices
    which = top if latent.indices is None else latent.indices[place, 0].long().gather(-1, top)
    return values.gather(-1, top), which


def _all(latent: LatentRelevance, place: int) -> Tensor:
    """[token]: the sum over all parts of a layer, those that were not kept too."""
    total = latent.values[place, 0].double().sum(-1)
    return total if latent.rest is None else total + latent.rest[place, 0].double()


def _sums(latent: LatentRelevance, place: int) -> Tensor:
    """[part]: the sum over tokens; where only the largest were kept, over the tokens where it was among them."""
    values = latent.values[place, 0].double()
    if latent.indices is None:
        return values.sum(0)
    which = latent.indices[:, 0].long()  # as long in all layers
    sums = values.new_zeros(latent.parts or int(which.max()) + 1)
    return sums.scatter_add_(0, which[place].flatten(), values.flatten())


def _context(context: Context) -> list[Any]:
    before, peak, after = (visible("".join(part)) for part in (context.before, [context.peak], context.after))
    return [float(f"{context.score:.6g}"), before, peak, after, visible(f"{context.document}, token {context.token}")]


def _labelled(labels: Neurons, layer: int, part: int) -> Neuron | None:
    """The neuron as it was labelled; None where its layer was not.

    Raises:
        ValueError: the labels are of a model with other neurons.
    """
    if layer not in labels.layers:
        return None
    if not 0 <= part < labels.count(layer):
        raise ValueError(
            f"labels= are of another model: layer {layer} has {labels.count(layer)} {labels.latent}s in them, and the "
            f"explained model has a {labels.latent} {part} there; give the folder that `lxt label` wrote for this model"
        )
    return labels[layer, part]
