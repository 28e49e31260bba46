"""What enters attention, and what it carries: the latents query, key, value, pattern and flow.

While a layer runs, its attention is found by data flow (`lxt.latents.watching`), and taps are put on what it reads and
on what it gives. In the backward
    query, key, value   x * c summed over d_head
    pattern             P * c_P                         c_P: the coefficient of the weights P under the rules
    flow                P_qk (v_k . c_out,q)            c_out: the coefficient of the head's output
The flow needs no rule: out_q = sum_k P_qk v_k is a sum, so that a head's relevance at q is shared out over the keys.
scaled_dot_product_attention has no P; it is computed anew from q, k and the mask, one head at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lxt.attention import SEEN_BY_THE_MODE, share_of_weights
from lxt.coefficients import wide
from lxt.latents.factors import Factor, Fused, Layout, Product
from lxt.latents.hooking import watched
from lxt.latents.reading import reading
from lxt.latents.sink import Sink, Site
from lxt.latents.watching import Watch
from lxt.mode import current_mode
from lxt.preconditions import attention_names

__all__ = ["ATTENTION", "attention_reader", "refuse_unseen"]

ATTENTION = ("query", "key", "value", "pattern", "flow")


@contextmanager
def attention_reader(sites: Sequence[Site], sink: Sink, shape: torch.Size) -> Iterator[None]:
    """Taps what enters the attention of the sites' layers; arguments as those of every `lxt.latents.taps.Reader`.

    Raises:
        ValueError: in the forwards inside: a layer without an attention that can be seen, or with several.
    """
    layers: dict[int, dict[str, Site]] = {}
    for site in sites:
        layers.setdefault(site.layer, {})[site.latent] = site
    found: dict[int, bool] = {}

    def finished(number: int, taps: _Taps) -> None:
        found[number] = taps.attention is not None
        if number == max(layers):
            _refuse_without_attention(layers, found)

    refuse_unseen([site.module for site in sites])
    with ExitStack() as undo:
        for number, here in layers.items():
            layer = next(iter(here.values())).module
            undo.enter_context(watched(layer, partial(_Taps, here, sink, shape), partial(finished, number)))
        yield


def refuse_unseen(layers: Sequence[nn.Module]) -> None:
    """Refuse attention that isn't made of torch operations.

    Raises:
        ValueError: names the implementation.
    """
    for name in set().union(*(attention_names(layer) for layer in dict.fromkeys(layers))):
        if name not in SEEN_BY_THE_MODE:
            raise ValueError(
                f"the attention implementation {name!r} shows no queries, keys or weights; call "
                'model.set_attn_implementation("eager"), or "sdpa", first'
            )


def _refuse_without_attention(layers: dict[int, dict[str, Site]], found: dict[int, bool]) -> None:
    missing = [number for number in layers if not found.get(number)]
    if not missing:
        return
    site = next(iter(layers[missing[0]].values()))
    others = tuple(number for number in layers if found.get(number))
    step = f"name those that have: lxt.Keep({site.latent!r}, layers={others})" if others else "leave it out"
    raise ValueError(
        f"{site.latent!r} is not known for layer{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))} "
        f"({type(site.module).__name__}): no softmax of scores q k^T between the prompt's tokens was seen there, as "
        f"in recurrent, linear and block-wise attention, which have no such map; {step}"
    )


@dataclass(eq=False)
class _Attention:
    """One attention of one forward: where its taps write.

    Attributes:
        sites: by latent.
        shape: [batch, token]
        seen: which of query and key are known.
        parts: what the taps of the backward that runs now have written, by latent: several where scores are sums of
            products.
    """

    sites: dict[str, Site]
    sink: Sink
    shape: torch.Size
    seen: set[str] = field(default_factory=set)
    parts: dict[str, Tensor] = field(default_factory=dict)

    def expect(self, latent: str, like: torch.dtype, *shape: int) -> None:
        """What the backward does not reach, as queries and keys under CP-LRP, has no relevance."""
        self.sink.expect(self.sites[latent], torch.Size((self.shape[0], *shape)), wide(like))

    def write(self, latent: str, value: Tensor) -> None:
        """Of one tap, added to what others of the same latent have written in this backward."""
        before = self.parts.get(latent)
        self.parts[latent] = value if before is None else before + value
        self.sink.write(self.sites[latent], self, self.parts[latent])


@dataclass(eq=False)
class _Known:
    """A tapped factor: of what, once that is known; until then its tap is silent."""

    factor: Factor
    size: torch.Size
    dtype: torch.dtype
    attention: _Attention | None = None
    latent: str = ""

    def become(self, latent: str, attention: _Attention) -> None:
        """It is that latent of that attention; its tap writes from now on."""
        *outer, token = (self.size[axis] for axis in self.factor.axes[: self.factor.rows + 1])
        heads = torch.Size(outer).numel() // (attention.shape[0] * self.factor.repeats)
        self.latent, self.attention = latent, attention
        attention.expect(latent, self.dtype, token, heads)


def _write_known(known: _Known, c_x: Tensor, x: Tensor) -> None:
    """X * c by head, where it is known by now what x is."""
    if known.attention is None:
        return
    dtype, of = wide(x.dtype), known.factor.of
    relevance = (of(x).to(dtype) * of(c_x).to(dtype)).sum(-1)
    known.attention.write(known.latent, known.factor.by_token(relevance, known.attention.shape[0]))


def _write_pattern(attention: _Attention, c_weights: Tensor, weights: Tensor) -> None:
    dtype = wide(weights.dtype)
    pattern = weights.to(dtype) * c_weights.to(dtype)
    attention.write("pattern", pattern.reshape(attention.shape[0], -1, *pattern.shape[-2:]))


def _write_output(attention: _Attention, flow: Callable | None, c_output: Tensor, *saved: Tensor | None) -> None:
    """The backward of an attention's output comes before those of all that it was computed from."""
    attention.parts.clear()
    if flow is not None:
        for latent, value in flow(c_output, *saved).items():
            attention.write(latent, value)


class _Taps(Watch):
    """Puts the taps on one forward of one layer."""

    def __init__(self, sites: dict[str, Site], sink: Sink, shape: torch.Size) -> None:
        super().__init__()
        self._sites, self._sink, self._shape = sites, sink, shape
        self.attention: _Attention | None = None

    def factor(self, x: Tensor, factor: Factor) -> tuple[Tensor, _Known]:
        known = _Known(factor, x.shape, x.dtype)
        if not x.requires_grad or not {"query", "key"} & set(self._sites):
            return x, known
        return self._tapped(x, known), known

    def softmax(self, scores: Tensor, products: Sequence[Product]) -> _Attention | None:
        if scores.shape[-2] != self._shape[1]:  # between other things than the prompt's tokens
            return None
        attention = _Attention(self._sites, self._sink, self._shape)
        for product in products:
            for latent, known in (("query", product.query), ("key", product.key)):
                if latent in self._sites and self._fits(known):
                    known.become(latent, attention)
                    attention.seen.add(latent)
        return attention

    def weigh(
        self,
        attention: _Attention,
        weights: Tensor,
        value: Tensor,
        layout: Layout,
        run: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        self._begin(attention)
        for latent in {"query", "key"} & set(self._sites) - attention.seen:
            raise self._unseen(latent, "what enters the scores isn't one vector for each token and head")
        if "value" in self._sites:
            value = self._read("value", value, layout.value, attention)
        if {"pattern", "flow"} & set(self._sites):
            self._refuse_shape(weights.shape)
        flow, saved = None, ()
        if "flow" in self._sites:
            flow, saved = partial(_written_out, layout, self._shape), (weights, value)
        if "pattern" in self._sites:
            heads = weights.shape[:-2].numel() // self._shape[0]
            attention.expect("pattern", weights.dtype, heads, *weights.shape[-2:])
            if weights.requires_grad:  # they don't under CP-LRP
                weights = reading(weights, (weights,), partial(_write_pattern, attention))
        return _ended(run(weights, value), attention, flow, saved)

    def fused(self, call: Fused, repeats: tuple[int, int], run: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        if call.query.shape[-2] != self._shape[1]:
            return run(call.query, call.key, call.value)
        attention = _Attention(self._sites, self._sink, self._shape)
        self._begin(attention)
        operands = {"query": call.query, "key": call.key, "value": call.value}
        for (latent, x), repeat in zip(operands.items(), (1, *repeats), strict=True):
            if latent in self._sites:
                factor = Factor(tuple(range(x.dim())), x.dim() - 2, repeat)
                operands[latent] = self._read(latent, x, factor, attention)
        flow, saved = None, ()
        if {"pattern", "flow"} & set(self._sites):
            if call.query.dim() != 4 or len(call.query) != self._shape[0]:
                raise self._unseen("flow", f"queries have the shape {tuple(call.query.shape)}")
            self._refuse_shape(torch.Size((*call.query.shape[:3], call.key.shape[2])))
            mode = current_mode()
            of = call.query, call.key, call.value, call.mask
            share = 1.0 if mode is None else share_of_weights(mode.composite, *of)
            options = {"is_causal": call.is_causal, "scale": call.scale, "enable_gqa": call.enable_gqa}
            flow = partial(_recomputed, set(self._sites), share, options)
            saved = of
        return _ended(run(*operands.values()), attention, flow, saved)

    def _read(self, latent: str, x: Tensor, factor: Factor, attention: _Attention) -> Tensor:
        known = _Known(factor, x.shape, x.dtype)
        if not self._fits(known):
            raise self._unseen(latent, f"its shape {tuple(x.shape)} isn't one vector for each token and head")
        known.become(latent, attention)
        return self._tapped(x, known) if x.requires_grad else x

    def _begin(self, attention: _Attention) -> None:
        if self.attention is not None:
            raise ValueError(
                f"{self._name} attends more than once in a forward, as to itself and to an encoder, or in two "
                f"softmaxes, so {', '.join(map(repr, self._sites))} would have no one value; leave that latent out"
            )
        self.attention = attention

    def _fits(self, known: _Known) -> bool:
        """Whether it is [batch and heads ..., token of the prompt, ...]."""
        axes = known.factor.axes[: known.factor.rows + 1]
        *outer, token = (known.size[axis] for axis in axes)
        return token == self._shape[1] and self._by_row(torch.Size(outer), known.factor.repeats)

    def _by_row(self, outer: torch.Size, repeats: int = 1) -> bool:
        """Whether these dimensions, batch and heads, begin with the batch, alone or together with the heads."""
        batch = self._shape[0]
        return outer.numel() % (batch * repeats) == 0 and (len(outer) == 1 or batch in (1, outer[0]))

    def _refuse_shape(self, size: torch.Size) -> None:
        length = self._shape[1]
        if size[-2:] != (length, length) or not self._by_row(size[:-2]):
            latent = "pattern" if "pattern" in self._sites else "flow"
            raise self._unseen(latent, f"its weights are {list(size)}, not [batch, head, {length}, {length}]")

    def _unseen(self, latent: str, why: str) -> ValueError:
        return ValueError(f"{latent!r} can't be read in {self._name}: {why}; leave that latent out")

    @property
    def _name(self) -> str:
        site = next(iter(self._sites.values()))
        return f"layer {site.layer} ({type(site.module).__name__})"

    def _tapped(self, x: Tensor, known: _Known) -> Tensor:
        return reading(x, (x,), partial(_write_known, known))


def _ended(output: Tensor, attention: _Attention, flow: Callable | None, saved: tuple[Tensor | None, ...]) -> Tensor:
    if not output.requires_grad:
        return output
    return reading(output, saved, partial(_write_output, attention, flow))


def _written_out(
    layout: Layout, shape: torch.Size, c_output: Tensor, weights: Tensor, value: Tensor
) -> dict[str, Tensor]:
    """The flow of weights that were there."""
    dtype = wide(weights.dtype)
    along = layout.output.of(c_output).to(dtype) @ layout.value.of(value).to(dtype).transpose(-2, -1)
    return {"flow": along.mul_(weights).reshape(shape[0], -1, *weights.shape[-2:])}


def _recomputed(
    latents: set[str],
    share: float,
    options: dict[str, Any],
    c_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
) -> dict[str, Tensor]:
    """The flow and the pattern of a fused attention, head by head."""
    call = Fused(query, key, value, mask, **options)
    dtype, heads = wide(query.dtype), query.shape[1]
    flow = query.new_empty((len(query), heads, query.shape[2], key.shape[2]), dtype=dtype)
    for head in range(heads):
        along = c_output[:, head].to(dtype) @ value[:, call.group(head)].to(dtype).transpose(-2, -1)
        weights = call.scores(head).softmax(-1).nan_to_num_(0.0)  # a query at padding may see no key
        torch.mul(weights, along, out=flow[:, head])
    found = {"flow": flow} if "flow" in latents else {}
    return found | {"pattern": flow * share} if "pattern" in latents else found
