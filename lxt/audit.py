"""The auditor: relevance by a second mechanism, to check the first one.

1. The plain model runs forward, with parameters as constants and dropout inactive.
2. The autograd graph behind the explained scalar is walked, and each node's rule is decided from the graph alone
   (`lxt.auditgraph` reads it, `lxt.auditrules` decides).
3. Hooks on the nodes rescale, stop or replace gradients; one backward gives the coefficients at the inputs.

Nothing of the model is patched and no code is shared with the main path but the composites, so the two can only
agree where both apply the rules that were meant. The auditor sees operations after torch has decomposed them, not
Python: what it can't see, an in-place product on a view (`CopySlices`) for instance, it takes as linear, and what it
doesn't know it reports in `Audit.unknown` and differentiates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from lxt.auditdeclared import watching
from lxt.auditgraph import Graph, Observer
from lxt.auditrecurrences import observed
from lxt.auditrules import Treatment, treatments
from lxt.composites import Composite, Epsilon, resolve

__all__ = ["Audit", "audit", "conservation"]


@dataclass(frozen=True)
class Audit:
    """What the auditor found.

    Attributes:
        relevance: for each explained input, value times coefficient, in the input's shape.
        value: the explained scalar.
        rules: the composite.
        nodes: how many nodes of the graph got which rule.
        unknown: names of nodes with no known rule; their plain gradient was taken.
    """

    relevance: dict[str, Tensor]
    value: Tensor
    rules: Composite
    nodes: Counter[str]
    unknown: tuple[str, ...]

    @property
    def total(self) -> Tensor:
        """The sum of all relevance; equals `value` where the composite conserves and biases are zero."""
        return torch.stack([relevance.sum() for relevance in self.relevance.values()]).sum()


def conservation(total: Tensor | float, value: Tensor | float) -> float:
    """How far a sum of relevance is from the explained value, relative to the value (absolute where that is 0)."""
    difference = abs(float(total) - float(value))
    return difference / abs(float(value)) if float(value) else difference


def audit(
    model: nn.Module,
    inputs: Mapping[str, Any],
    target: Callable[[Any], Tensor],
    rules: str | Composite = "attnlrp",
    wrt: str | Sequence[str] = "inputs_embeds",
    operations: Mapping[str, str] | None = None,
) -> Audit:
    """Relevance of a model's inputs, computed from the autograd graph of the unpatched model.

    >>> found = audit(model, {"inputs_embeds": embeds}, lambda output: output.logits[0, -1].max())
    >>> found.relevance["inputs_embeds"].sum(-1)  # [batch, token]

    Args:
        model: not patched; its parameters and training flags are the same afterwards, also after an exception.
        inputs: keyword arguments of the forward.
        target: the scalar to explain, from the forward's output; its own operations are differentiated plainly.
        rules: a preset's name or a composite.
        wrt: the inputs to explain.
        operations: names of operations -> their rule, as a patch map declares them.

    Raises:
        ValueError: an input isn't there, the target isn't one number or doesn't depend on the inputs, or the
            composite asks for what the auditor doesn't cover: linear rules other than Epsilon(0), a softmax
            temperature where the softmax is hidden in a fused kernel.
        TypeError: an input to explain isn't a floating point tensor.
    """
    composite = resolve(rules)
    for rule in (composite.linear, composite.convolution or composite.linear):
        if rule != Epsilon(0):
            raise ValueError(
                f"the auditor covers linear=Epsilon(0) only, got {rule}; use "
                "composite.but(linear=Epsilon(0), convolution=None)"
            )
    arguments, leaves = _prepare(inputs, (wrt,) if isinstance(wrt, str) else tuple(wrt))
    with _as_constant(model), torch.inference_mode(False), torch.enable_grad():
        with watching(model, operations or {}) as calls, observed() as recurrences, Observer() as observer:
            output = model(**arguments)
        value = target(output)
        if not isinstance(value, Tensor) or value.numel() != 1 or value.grad_fn is None:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"the target must be one number that depends on {', '.join(leaves)}, got {got}"
                f"{', a constant' if isinstance(value, Tensor) and value.grad_fn is None else ''}; "
                "select one logit of the output and don't detach it"
            )
        outputs = _nodes_of(output)
        if not outputs:  # or everything would be taken for the target's own, and differentiated
            raise ValueError(
                f"no tensor that depends on {', '.join(leaves)} found in the output, a {type(output).__name__}; "
                "return a tensor, a tuple, a mapping or a dataclass"
            )
        graph = Graph(
            value.grad_fn, outputs, observer, calls, lambda node, edge: recurrences.steers(node, edge, composite)
        )
        treated = treatments(graph, composite)
        with _hooked(treated):
            # saved values are read by the hooks, after the node itself has run: the graph must be kept until then
            gradients = torch.autograd.grad(
                value.reshape(()), list(leaves.values()), retain_graph=True, allow_unused=True, materialize_grads=True
            )
    return Audit(
        relevance={
            name: leaf.detach() * gradient for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
        },
        value=value.detach().reshape(()),
        rules=composite,
        nodes=Counter(treatment.rule for treatment in treated.values()),
        unknown=tuple(sorted({node.name() for node, treatment in treated.items() if not treatment.known})),
    )


def _prepare(inputs: Mapping[str, Any], names: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    missing = [name for name in names if name not in inputs]
    if missing or not names:
        raise ValueError(f"wrt={', '.join(missing) or '()'} is not among the inputs; they are: {', '.join(inputs)}")
    arguments = {name: given.detach() if isinstance(given, Tensor) else given for name, given in inputs.items()}
    leaves: dict[str, Tensor] = {}
    for name in names:
        if not isinstance(arguments[name], Tensor) or not arguments[name].is_floating_point():
            got = arguments[name].dtype if isinstance(arguments[name], Tensor) else type(arguments[name]).__name__
            raise TypeError(
                f"{name} must be a floating point tensor to be explained, got {got}; pass embeddings, not ids"
            )
        arguments[name] = leaves[name] = arguments[name].clone().requires_grad_()
    return arguments, leaves


@contextmanager
def _as_constant(model: nn.Module) -> Iterator[None]:
    """Parameters without gradients and modules in evaluation mode, each restored to what it was."""
    training = [(module, module.training) for module in model.modules()]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.is_leaf]
    try:
        # the flags one by one: train() and eval() are overridden in some models and can't be undone
        for module, _ in training:
            module.training = False
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, flag in training:
            module.training = flag
        for parameter in trained:
            parameter.requires_grad_(True)


def _nodes_of(output: Any) -> list[Node]:
    """The nodes that made a forward's output; what lies behind them is the model, what doesn't is the target."""
    if isinstance(output, Tensor):
        return [] if output.grad_fn is None else [output.grad_fn]
    if isinstance(output, Mapping):
        members = list(output.values())
    elif isinstance(output, (list, tuple)):
        members = list(output)
    else:
        members = [getattr(output, field.name) for field in fields(output)] if is_dataclass(output) else []
    return [node for member in members for node in _nodes_of(member)]


@contextmanager
def _hooked(treated: Mapping[Node, Treatment]) -> Iterator[None]:
    """The treatments as hooks; removed afterwards, since a hook that knows its node keeps the graph alive."""
    handles = []
    try:
        for node, treatment in treated.items():
            if treatment.stopped_output is not None:
                handles.append(node.register_prehook(_drop(treatment.stopped_output)))
            if treatment.replace is not None or any(factor != 1 for factor in (treatment.factors or {}).values()):
                handles.append(node.register_hook(_hook(treatment)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _drop(output: int) -> Callable:
    return lambda gradients: tuple(None if index == output else given for index, given in enumerate(gradients))


def _hook(treatment: Treatment) -> Callable:
    factors = treatment.factors or {}

    def hook(grad_inputs: tuple[Tensor | None, ...], grad_outputs: tuple[Tensor | None, ...]) -> tuple:
        if treatment.replace is not None:
            if grad_outputs[0] is None:
                return grad_inputs
            grad_inputs = (treatment.replace(grad_outputs[0]), *grad_inputs[1:])
        # a stopped gradient is left out, not zero: zero times an infinite derivative further back would be NaN
        return tuple(
            gradient
            if gradient is None or factors.get(edge, 1) == 1
            else gradient * factors[edge]
            if factors[edge]
            else None
            for edge, gradient in enumerate(grad_inputs)
        )

    return hook
