"""Why a head looked where it looked: the relevance of one attention score, through its query and through its key.

A score s = scale * q . k, before the softmax, is a product of two activations, of which the uniform rule gives each one
half. What made the head look at one key rather than at others is a difference of scores, since a softmax does not see
what is added to all scores of a query.

1. The forward runs under the rules up to the chosen layer's softmax, and ends there.
2. The explained number, s or a difference, has two backwards: one in which only the query's side is open, and one in
   which only the keys' is.
3. Each gives the relevance of every token, and of every head of the layers below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral
from typing import Any, get_args

import torch
from torch import Tensor, nn

from lxt import rules
from lxt.encdec import forward, with_prefix
from lxt.graph import refuse_foreign_functions
from lxt.holds import Holds, make_constant
from lxt.inputs import Model, prepare, read, task
from lxt.latents import Keep, capture, residual_layers, sites
from lxt.latents.attending import refuse_unseen
from lxt.latents.factors import Factor, Fused, Product
from lxt.latents.hooking import watched
from lxt.latents.watching import Watch
from lxt.marks import copy_mark
from lxt.mode import current_mode
from lxt.patchmap import PatchMap
from lxt.preconditions import refuse_missing_weights, refuse_virtual_tokens
from lxt.qkrelevance import Foil, Side

__all__ = ["attribute_attention"]


def attribute_attention(
    model: Model,
    tokenizer: Any,
    inputs: object,
    layer: int,
    head: int,
    query: int,
    key: int | None,
    contrast: Foil,
    patch_map: PatchMap,
    patch: Callable[[], AbstractContextManager[Any]],
) -> dict[str, Any]:
    """The fields of an AttentionRelevance that the model decides; arguments as in `Attributor.attribute_attention`.

    Raises:
        ValueError: several prompts; a layer, head or position that there is none of; a key that the query does not
            see; attention without scores.
        TypeError: numbers that aren't whole.
    """
    refuse_missing_weights(model)
    refuse_virtual_tokens(model)
    rows = read(inputs, model, tokenizer)
    if len(rows) != 1:
        raise ValueError(f"attribute_attention explains one prompt at a time, got {len(rows)}; call it for each")
    if task(model) == "seq2seq":  # the encoder's scores; its decoder is never reached, whatever it is given to read
        rows = [replace(row, decoder=(0,)) for row in rows]
    layers = residual_layers(model, patch_map)
    layer = _place("layer", layer, len(layers))
    refuse_unseen([layers[layer]])
    with torch.inference_mode(False), torch.enable_grad():
        prepared = with_prefix(prepare(rows, model, tokenizer), model)
        tokens, leaf = prepared.labels[0], prepared.embeds.requires_grad_()
        ask = _Ask(layer, head, _place("query", query, len(tokens)))
        keeps = (Keep("head", layers=tuple(range(layer))),) if layer else ()
        places = _heads_below(model, patch_map, keeps)
        with (
            capture(places or (), 1, len(tokens), keeps) as sink,
            _unchecked(model),
            Holds().hold(model.parameters(), make_constant),
            patch(),
        ):
            found = _scores(model, prepared, layers[layer], ask, patch_map)
            weights = found.row.detach().double().softmax(-1)
            wanted = _wanted(weights[: len(tokens)], tokens, key, contrast, ask)
            seen = wanted.of != 0
            value = (found.row[: len(tokens)][seen] * wanted.of[seen].to(found.row)).sum()
            sides: dict[str, Tensor | None] = {}
            for side in get_args(Side):
                sides[side] = _through(side, value, found.products, leaf)
                none = None if places is None else torch.zeros(0, len(tokens), 0)
                sides[f"{side}_heads"] = sink.stacked("head", prepared.mask).values[:, 0] if places else none
    return sides | {
        "tokens": tokens,
        "special": prepared.special[0].tolist(),
        "layer": layer,
        "head": found.head,
        "query_position": ask.query,
        "key_position": wanted.key,
        "contrast": wanted.contrast,
        "score": float(found.row[wanted.key].detach()),
        "value": float(value.detach()),
        "weights": weights[: len(tokens)].to(leaf.dtype if leaf.dtype == torch.float64 else torch.float32).cpu(),
    }


@dataclass(frozen=True)
class _Ask:
    layer: int
    head: int
    query: int


@dataclass(frozen=True, eq=False)
class _Wanted:
    """What is explained: `of`, [key], times the row of scores."""

    key: int
    contrast: Foil
    of: Tensor


def _through(side: Side, value: Tensor, products: Sequence[Product], leaf: Tensor) -> Tensor:
    """The relevance of each token, [token], by one side; the graph stays."""
    for product in products:
        product.query.open, product.key.open = side == "query", side == "key"
    (gradient,) = torch.autograd.grad(value, leaf, retain_graph=True)
    relevance = rules.relevance(leaf.detach(), gradient)[0].cpu()
    if not relevance.isfinite().all():
        raise ValueError(
            f"the relevance is not finite: the backward overflows in {leaf.dtype}; load the model with "
            "dtype='bfloat16' or 'float32'"
        )
    return relevance


def _wanted(weights: Tensor, tokens: Sequence[str], key: int | None, contrast: Foil, ask: _Ask) -> _Wanted:
    seen = weights > 0  # a masked key's is exactly 0
    count, length = int(seen.sum()), len(tokens)

    def place(name: str, given: object) -> int:
        chosen = _place(name, given, length)
        if not seen[chosen]:
            raise ValueError(
                f"the query {ask.query} ({tokens[ask.query]!r}) does not see the {name} {chosen} "
                f"({tokens[chosen]!r}): a mask hides it; keys that it sees: {_listed(seen.nonzero()[:, 0].tolist())}"
            )
        return chosen

    chosen = int(weights.argmax()) if key is None else place("key", key)
    of = torch.zeros_like(weights)
    of[chosen] = 1
    if contrast == "mean":
        if count == 1:
            raise ValueError(
                f"the query {ask.query} ({tokens[ask.query]!r}) sees one key alone, so there are no others to compare "
                "it with; use contrast=None to explain the score itself, or a later query"
            )
        of[seen] -= 1 / count
    elif contrast is not None:
        if isinstance(contrast, str):
            raise ValueError(f"unknown contrast {contrast!r}; allowed: 'mean', the position of another key, or None")
        contrast = place("contrast", contrast)
        if contrast == chosen:
            raise ValueError(f"contrast {contrast} is the explained key itself; give another, 'mean', or None")
        of[contrast] -= 1
    return _Wanted(chosen, contrast, of)


def _listed(places: Sequence[int]) -> str:
    whole = list(places) == list(range(places[0], places[-1] + 1))
    return f"{places[0]} to {places[-1]}" if whole else ", ".join(map(str, places))


def _place(name: str, given: object, count: int) -> int:
    if isinstance(given, bool) or not isinstance(given, Integral):
        raise TypeError(f"{name} must be a whole number, got {given!r}")
    place = int(given)
    if not -count <= place < count:
        raise ValueError(f"{name} {place} is out of range; there are {count}, 0 to {count - 1}")
    return place % count


def _heads_below(model: Model, patch_map: PatchMap, keeps: Sequence[Keep]) -> list[Any] | None:
    try:
        return sites(model, patch_map, keeps)
    except ValueError:
        return None


@contextmanager
def _unchecked(model: nn.Module) -> Iterator[None]:
    """Without transformers' checkpoints: what ends a forward would end its recomputation too."""
    modules: list[Any] = [part for part in model.modules() if getattr(part, "gradient_checkpointing", False) is True]
    try:
        for module in modules:
            module.gradient_checkpointing = False
        yield
    finally:
        for module in modules:
            module.gradient_checkpointing = True


class _Found(Exception):
    """Ends the forward with the scores of one query, [key], and the products that they are."""

    def __init__(self, row: Tensor, products: Sequence[Product], head: int) -> None:
        super().__init__()
        self.row, self.products, self.head, self.mode = row, products, head, current_mode()


def _scores(model: Model, prepared: Any, layer: nn.Module, ask: _Ask, patch_map: PatchMap) -> _Found:
    with ExitStack() as undo:
        undo.enter_context(watched(layer, partial(_Scores, ask, prepared.embeds.shape[1])))
        try:
            forward(model, prepared)
        except _Found as found:
            if found.mode is not None:
                composite, approved = found.mode.composite, found.mode.approved
                refuse_foreign_functions(found.row, prepared.embeds, patch_map.operations, approved, composite.linear)
            if not found.row.requires_grad:
                raise ValueError(
                    f"the scores of layer {ask.layer} ({type(layer).__name__}) don't depend on the embeddings"
                ) from None
            return found
    raise ValueError(
        f"layer {ask.layer} ({type(layer).__name__}) computes no scores q k^T between the prompt's tokens that a "
        "softmax follows, as recurrent, linear and block-wise attention don't; choose a layer with attention"
    )


@dataclass(eq=False)
class _Gate:
    """Whether relevance passes a factor."""

    open: bool = True


class _Through(torch.autograd.Function):
    """Identity whose backward passes where the gate is open."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: _Gate) -> Tensor:
        ctx.gate = gate
        return torch.ops.aten._unsafe_view(x, x.shape)

    @staticmethod
    def backward(ctx: Any, c_x: Tensor) -> tuple[Tensor, None]:
        return (c_x if ctx.gate.open else torch.zeros_like(c_x)), None


class _Scores(Watch):
    """Ends the forward at a layer's first scores between the prompt's tokens."""

    def __init__(self, ask: _Ask, length: int) -> None:
        super().__init__()
        self._ask, self._length = ask, length

    def factor(self, x: Tensor, factor: Factor) -> tuple[Tensor, _Gate]:
        gate = _Gate()
        return (copy_mark(x, _Through.apply(x, gate)) if x.requires_grad else x), gate

    def softmax(self, scores: Tensor, products: Sequence[Product]) -> Any:
        if scores.shape[-2] != self._length or scores.shape[-1] < self._length:  # more: with a sink
            return None
        by_head = scores.reshape(-1, *scores.shape[-2:])  # one prompt
        head = _place("head", self._ask.head, len(by_head))
        raise _Found(by_head[head, self._ask.query], products, head)

    def fused(self, call: Fused, repeats: tuple[int, int], run: Callable[..., Tensor]) -> Tensor:
        if call.query.dim() != 4 or (call.query.shape[2], call.key.shape[2]) != (self._length, self._length):
            return run(call.query, call.key, call.value)
        head = _place("head", self._ask.head, call.query.shape[1])
        query, one = self.factor(call.query, Factor((), 0))
        key, other = self.factor(call.key, Factor((), 0))
        gated = Fused(query, key, call.value, call.mask, 0.0, call.is_causal, call.scale, call.enable_gqa)
        scores = gated.scores(head, slice(self._ask.query, self._ask.query + 1))
        raise _Found(scores[0, 0], (Product(one, other),), head)
