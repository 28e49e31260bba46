"""The auditor's reading of declarations: where a declared call lies in the graph, and what its edges carry.

The auditor sees no Python, so while the plain model runs
 1. a declared function, module or operation gets its activations through a node of their own, and so do its results;
 2. what autograd records between the two is the inside, known by its sequence numbers, and keeps its own derivative;
 3. the nodes at the entrance rescale what comes out of it, by the declared rule.
A reference that was declared in a function's place runs in its place, and is judged as any other code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode

from lxt.composites import Composite
from lxt.declarations import WATCHER, Declaration, declaration_of, declared_operations

__all__ = ["Call", "Calls", "watching"]


@dataclass(eq=False)
class Call:
    """One declared call.

    Attributes:
        declaration: its rule.
        entrances: node -> (name of the slot, or "", and the activation).
        results: the values that came out.
        coefficient: c_y, filled in by the backward.
    """

    declaration: Declaration
    entrances: dict[Node, tuple[str, Tensor]] = field(default_factory=dict)
    results: list[Tensor] = field(default_factory=list)
    coefficient: Tensor | None = None

    @property
    def makes_gates(self) -> bool:
        """Whether what comes out is the output of an activation function."""
        return self.declaration.rule == "identity"

    def keep(self, gradient: Tensor) -> Tensor:
        """Take note of c_y on its way in."""
        self.coefficient = gradient
        return gradient

    def quotient(self, x: Tensor, share: float, gradient: Tensor) -> Tensor:
        """The identity rule: share (y / x) c_y, and share times the inside's own gradient where x is 0."""
        if self.coefficient is None:
            return gradient
        wide = torch.promote_types(x.dtype, torch.float32)
        y, c = self.results[0].to(wide), self.coefficient.to(wide)
        return (share * torch.where(x == 0, gradient.to(wide), c * y / torch.where(x == 0, 1, x.to(wide)))).to(x.dtype)


class Calls:
    """All declared calls of one forward.

    Attributes:
        entrances: the nodes through which activations go in -> the call.
        exits: the nodes through which results come out -> the call.
        linear: names of autograd functions' nodes that a patch map declares linear.
    """

    def __init__(self, linear: Iterable[str] = ()) -> None:
        self.linear = frozenset(f"{name}Backward" for name in linear)
        self.entrances: dict[Node, Call] = {}
        self.exits: dict[Node, Call] = {}
        self._insides: list[tuple[int, int]] = []

    def inside(self, node: Node) -> bool:
        """Whether a node belongs to what a declared call did."""
        number = node._sequence_nr()
        return any(start <= number < end for start, end in self._insides)

    def run(self, declaration: Declaration, function: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call itself, with nodes at its entrance and exit."""
        if callable(declaration.rule):
            return declaration.rule(*args, **kwargs)
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        call = Call(declaration)
        slots = dict(zip(declaration.places(len(args)), declaration.slots, strict=True))
        inner = [self._enter(call, slots.get(place, ""), value) for place, value in enumerate(args)]
        named = {place: self._enter(call, slots.get(place, ""), value) for place, value in kwargs.items()}
        if not call.entrances:
            return function(*args, **kwargs)
        token, start = WATCHER.set(None), _number()
        try:
            result = function(*inner, **named)
        finally:
            WATCHER.reset(token)
        self._insides.append((start, _number()))
        return self._leave(call, result)

    def _enter(self, call: Call, slot: str, value: Any) -> Any:
        return _mapped(partial(self._entrance, call, slot), value)

    def _entrance(self, call: Call, slot: str, value: Tensor) -> Tensor:
        inner = value.clone()
        call.entrances[inner.grad_fn] = slot, value.detach()  # type: ignore[index]
        self.entrances[inner.grad_fn] = call  # type: ignore[index]
        return inner

    def _leave(self, call: Call, value: Any) -> Any:
        return _mapped(partial(self._exit, call), value)

    def _exit(self, call: Call, value: Tensor) -> Tensor:
        outer = value.clone()
        call.results.append(value.detach())
        self.exits[outer.grad_fn] = call  # type: ignore[index]
        return outer

    def stops(self, node: Node, composite: Composite) -> bool:
        """Whether an entrance passes nothing on, whatever the other inputs are."""
        call = self.entrances[node]
        rule, slot = call.declaration.rule, call.entrances[node][0]
        if rule == "attention":
            value = call.declaration.slots[2]
            if composite.attention == "value_only":
                return slot != value
            return not slot and composite.attention != "gradient"
        gate_stops = rule == "gated" and composite.product == "stop_gate" and len(call.entrances) > 1
        return rule == "constant" or (gate_stops and slot == call.declaration.slots[0])

    def shares(self, call: Call, composite: Composite, live: set[Node]) -> dict[Node, float | Callable]:
        """Entrance -> a factor on its gradient, or a function of it; `live` are those that aren't constants."""
        rule = call.declaration.rule
        if rule in ("identity", "norm"):
            field = composite.activation if rule == "identity" else composite.norm
            return {node: partial(call.quotient, call.entrances[node][1], 1.0) for node in live if field == "identity"}
        if rule == "product":
            return dict.fromkeys(live, 1.0 if composite.product == "gradient" else 1 / max(len(live), 1))
        if rule == "gated":
            share = 0.5 if composite.product == "uniform" and len(live) == 2 else 1.0
            gates = {node for node in live if call.entrances[node][0] == call.declaration.slots[0]}
            quotients = gates if composite.activation == "identity" else set()
            return {
                node: partial(call.quotient, call.entrances[node][1], share) if node in quotients else share
                for node in live
            }
        if rule == "attention" and composite.attention == "uniform":
            return self._attention(call, composite, live)
        return {}

    @staticmethod
    def _attention(call: Call, composite: Composite, live: set[Node]) -> dict[Node, float | Callable]:
        """The shares of query, key and value; a constant's goes to its partner."""
        by_slot = {call.entrances[node][0]: node for node in live}
        query, key, value = (by_slot.get(slot) for slot in call.declaration.slots)
        q, k, v = composite.qkv
        weights = (q + k if value else 1.0) if q + k else 0.0
        found: dict[Node, float | Callable] = {}
        if value:
            found[value] = v if query or key else 1.0
        if query:
            found[query] = weights * (q / (q + k) if key and q + k else 1.0)
        if key:
            found[key] = weights * (k / (q + k) if query and q + k else 1.0)
        return found


@contextmanager
def watching(model: nn.Module, operations: Mapping[str, str]) -> Iterator[Calls]:
    """Meanwhile what is declared runs through `Calls`: functions, the model's modules, and operations by name.

    Args:
        model: its declared modules get another forward for as long as this lasts.
        operations: names -> rules that a patch map declares, before what is declared for all models.
    """
    calls = Calls(name for name, rule in operations.items() if rule == "linear")
    by_map = {name: Declaration(rule, name) for name, rule in operations.items()}
    token, undo = WATCHER.set(calls.run), []
    try:
        for module in model.modules():
            declaration = declaration_of(module)
            if declaration is not None:
                undo.append((module, module.__dict__.get("forward")))
                module.__dict__["forward"] = _watched(calls, declaration, module)
        with _Operations(calls, {**declared_operations(), **by_map}):
            yield calls
    finally:
        WATCHER.reset(token)
        for module, former in undo:
            if former is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = former


def _watched(calls: Calls, declaration: Declaration, module: nn.Module) -> Callable:
    former, rule = module.forward, declaration.rule
    if callable(rule):
        return partial(rule, module)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return calls.run(declaration, former, args, kwargs) if WATCHER.get() else former(*args, **kwargs)

    return forward


class _Operations(TorchFunctionMode):
    def __init__(self, calls: Calls, declared: Mapping[str, Declaration]) -> None:
        super().__init__()
        self._calls, self._declared = calls, declared

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        declaration = self._declared.get(getattr(func, "__name__", "").split(".")[0])
        if declaration is None or WATCHER.get() is None:
            return func(*args, **kwargs or {})
        return self._calls.run(declaration, func, args, kwargs or {})


def _mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with every differentiable tensor in it changed."""
    if isinstance(value, Tensor):
        return change(value) if value.requires_grad else value
    if type(value) in (tuple, list):
        return type(value)(_mapped(change, item) for item in value)
    return {key: _mapped(change, item) for key, item in value.items()} if type(value) is dict else value


def _number() -> int:
    return torch.autograd._get_sequence_nr()  # pyright: ignore[reportPrivateImportUsage]
