"""Relevance of experts and of their routers.

What an expert e adds to the output y of a mixture is its routing weight times what it gives, w_e f_e(x), and its
relevance is that times the coefficient of y. Experts are run as a whole, in several implementations, and their single
outputs are never there. But y is linear in the weights: ∂(c_y · y) / ∂w_e = c_y · f_e(x). So the backward runs the
experts once more, on what they got, and differentiates by the weights alone:

    R_e = w_e ∂(c_y · y) / ∂w_e

which are plain derivatives, whatever rule the composite has for weights. A router's logits are what its last linear
map gives; their relevance is activation × gradient like that of any other activation.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from lxt.coefficients import wide
from lxt.holds import Holds, make_still, parts_of
from lxt.latents.hooking import watched
from lxt.latents.names import Keep
from lxt.latents.reading import reading
from lxt.latents.sink import Sink, Site
from lxt.opnames import operation_name

__all__ = ["on_experts", "on_routers", "routing_sites"]

_LINEAR = {"linear", "matmul", "__matmul__", "mm", "addmm", "einsum", "bmm"}
_LOST = 0.05  # of all relevance: far above what a sum in bfloat16 loses, far below what another formula would


def routing_sites(keep: Keep, layers: Sequence[nn.Module], numbers: Sequence[int]) -> list[Site]:
    """Where `expert` or `router` is, in those of the layers that have experts.

    Raises:
        ValueError: none has; or one that was asked for by its number hasn't; or they are of another form.
    """
    mixtures = {number: _mixtures(layers[number], number) for number in numbers}
    without = [number for number, found in mixtures.items() if not found]
    if len(without) == len(mixtures) or (without and keep.layers is not None):
        there = [number for number, layer in enumerate(layers) if _mixtures(layer, number)]
        raise ValueError(
            f"{keep.name!r} is wanted of layers without experts: {', '.join(map(str, without))}; "
            + (f"those with experts are {', '.join(map(str, there))}" if there else f"leave {keep.name!r} out")
        )
    several = [(number, *mixture) for number, found in mixtures.items() for mixture in found]
    if keep.name == "expert":
        return [Site(keep.name, number, experts, "experts") for number, _, experts in several]
    return [
        Site(keep.name, number, _router(block, experts, number), "router", _count(experts))
        for number, block, experts in several
    ]


def on_experts(sites: Sequence[Site], sink: Sink, shape: torch.Size) -> AbstractContextManager[Any]:
    """The Reader of `expert`."""
    undo = ExitStack()
    for site in sites:
        names = list(inspect.signature(type(site.module).forward).parameters)[1:]
        hook = partial(_before_output, site, sink, shape, names)
        undo.callback(site.module.register_forward_hook(hook, with_kwargs=True).remove)
    return undo


def on_routers(sites: Sequence[Site], sink: Sink, shape: torch.Size) -> AbstractContextManager[Any]:
    """The Reader of `router`: it watches the router's linear maps for the one that gives the logits."""
    undo = ExitStack()
    for site in sites:
        width = _width(site.module, site.heads)
        undo.enter_context(watched(site.module, partial(_Watch, site, sink, shape, width)))
    return undo


def _mixtures(layer: nn.Module, number: int) -> list[tuple[nn.Module, nn.Module]]:
    """The layer's blocks of experts, with the experts themselves; of several each has kinds of tokens of its own."""
    found = [(name, part) for name, part in layer.named_modules() if _takes_weights(part) or _takes_all(part)]
    others = sorted({type(part).__name__ for part in layer.modules() if 1 < _stacked(part) == _named_count(part)})
    if others and not found:
        raise ValueError(
            f"layer {number} has experts that are not called with the hidden states, the chosen experts and their "
            f"weights: {', '.join(others)}; their relevance is not known, leave it out"
        )
    return [(layer.get_submodule(name.rpartition(".")[0]), experts) for name, experts in found]


def _takes_weights(module: nn.Module) -> bool:
    """forward(hidden states, chosen experts, their weights), as transformers' experts are called."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return (
        len(names) == 3
        and names[0] == "hidden_states"
        and names[1].endswith(("_index", "_indices", "_experts", "_mask"))
        and names[2].endswith(("_weights", "_probs"))
    )


def _takes_all(module: nn.Module) -> bool:
    """forward(hidden states of every expert, one after the other), already weighted, as Llama 4 has it."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return names == ["hidden_states"] and 1 < _stacked(module) == _named_count(module)


def _stacked(module: nn.Module) -> int:
    """How many matrices its weights are stacks of; 0 where they aren't."""
    return max((len(weight) for weight in module.parameters(recurse=False) if weight.dim() == 3), default=0)


def _count(experts: nn.Module) -> int:
    """How many experts there are, those without weights included."""
    return max(_stacked(experts), _named_count(experts))


def _named_count(module: nn.Module) -> int:
    known = getattr(module, "num_experts", None)
    return known if isinstance(known, int) else 0


def _router(block: nn.Module, experts: nn.Module, number: int) -> nn.Module:
    for name in ("gate", "router"):
        router = getattr(block, name, None)
        if isinstance(router, nn.Module) and _width(router, _count(experts)):
            return router
    raise ValueError(
        f"layer {number} has experts, but {type(block).__name__} has no gate or router with a row of weights for each "
        "of them; leave 'router' out"
    )


def _width(router: nn.Module, experts: int) -> int:
    """How many logits it gives: at least one for each expert, and for what else it may choose; 0 where it is none."""
    rows = [len(weight) for weight in router.parameters() if weight.dim() == 2 and len(weight) >= experts]
    return min(rows, default=0)


def _before_output(
    site: Site,
    sink: Sink,
    shape: torch.Size,
    names: Sequence[str],
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
) -> Any:
    if not (isinstance(output, Tensor) and torch.is_grad_enabled() and output.requires_grad):
        return None
    owner = object()
    if len(names) == 1:

        def read_all(c_y: Tensor, y: Tensor) -> None:
            products = y.to(wide(y.dtype)) * c_y.to(wide(y.dtype))
            by_expert = products.reshape(_count(module), -1, y.shape[-1]).sum(-1).T
            sink.write(site, owner, _by_token(by_expert, shape, site))

        return reading(output, (output,), read_all)  # E times the layer's output: no copy, and Llama 4 leaves it alone
    given = dict(zip(names, args, strict=False)) | kwargs

    def read(c_y: Tensor, hidden: Tensor, chosen: Tensor, weights: Tensor) -> None:
        by_slot = _by_slot(site, c_y, hidden, chosen, weights)
        sink.write(site, owner, _by_token(_by_expert(by_slot, chosen, _count(module)), shape, site))

    return reading(output, tuple(given[name] for name in names), read)


def _by_slot(site: Site, c_y: Tensor, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """[token, slot], the relevance of each chosen expert.

    Raises:
        ValueError: the output is no sum of experts times their weights.
    """
    weights = weights.clone().requires_grad_()
    with Holds().hold(parts_of(site.module)[0], make_still), torch.enable_grad():
        y = site.module.forward(hidden, chosen, weights)
        (by_weight,) = torch.autograd.grad(y, weights, c_y.reshape(y.shape).to(y.dtype))
    dtype = wide(weights.dtype)
    relevance = weights.detach().to(dtype) * by_weight.to(dtype)
    whole = (y.detach().to(wide(y.dtype)) * c_y.reshape(y.shape).to(wide(y.dtype))).reshape(len(relevance), -1).sum(-1)
    lost, most = (relevance.sum(-1) - whole).abs().sum(), torch.maximum(relevance.abs().sum(), whole.abs().sum())
    if not isinstance(lost, FakeTensor) and lost > _LOST * most:  # a forecast has no numbers
        raise ValueError(
            f"the output of {type(site.module).__name__} in layer {site.layer} is not the sum of its experts times "
            "their weights, so it has no relevance of single experts; leave 'expert' out"
        )
    return relevance


def _by_expert(by_slot: Tensor, chosen: Tensor, count: int) -> Tensor:
    """[token, expert], 0 where it was not chosen.

    Args:
        by_slot: [token, slot].
        chosen: [token, slot], which expert each slot is of; or [token, slot, expert], 1 where it is of it.
        count: how many experts there are; a number beyond is what transformers writes where there is none.
    """
    if chosen.dim() == by_slot.dim() + 1:
        return (by_slot.unsqueeze(-1) * chosen.to(by_slot.dtype)).sum(-2)
    experts = by_slot.new_zeros((*by_slot.shape[:-1], count + 1))
    return experts.scatter_add_(-1, chosen.long().clamp(max=count), by_slot)[..., :count]


def _by_token(values: Tensor, shape: torch.Size, site: Site) -> Tensor:
    """[batch, token, part] of those tokens in a row."""
    site.refuse_other_tokens(values, shape)
    return values.reshape(*shape, values.shape[-1])


class _Watch(TorchFunctionMode):
    """Reads the result of the first linear map that has as many columns as there are logits."""

    def __init__(self, site: Site, sink: Sink, shape: torch.Size, width: int) -> None:
        super().__init__()
        self._site, self._sink, self._shape, self._width = site, sink, shape, width
        self._owner = object()
        self._found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._found or operation_name(func) not in _LINEAR or result.shape[-1] != self._width:
            return result
        self._found = True
        shape = torch.Size((*self._shape, self._width))
        self._sink.expect(self._site, shape, wide(result.dtype))  # rules that stop the router send nothing back
        if not (torch.is_grad_enabled() and result.requires_grad):
            return result
        return reading(result, (result,), self._read, written_into=True)

    def _read(self, c_x: Tensor, x: Tensor) -> None:
        dtype = wide(x.dtype)
        self._sink.write(self._site, self._owner, _by_token(x.to(dtype) * c_x.to(dtype), self._shape, self._site))
