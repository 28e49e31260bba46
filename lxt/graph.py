"""Autograd functions that the operator mode can't see: torch tells it nothing of Function.apply."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction

from lxt.compiling import compiled_inside
from lxt.composites import Epsilon, Gamma
from lxt.declarations import declaration_of
from lxt.linear_rules import unreachable
from lxt.unknown import unknown_function

__all__ = ["foreign_functions", "refuse_foreign_functions"]

# The plain gradient is the rule: linear layers of quantisation libraries, the identity that torch puts around a module
# with a full backward hook, and transformers' experts on a torch without grouped_mm.
LINEAR_FUNCTIONS = frozenset(
    {
        "BackwardHookFunction",
        "GeneratedBackwardFor_transformers_grouped_mm_fallback_default",
        "MatMul4Bit",
        "MatMul8bitFp",
        "MatMul8bitLt",
        "QuantizedLinearFunction",
        "WeightQBytesLinearFunction",
    }
)


_PLAIN = Epsilon()


def refuse_foreign_functions(
    output: Any,
    inputs: Any,
    declared: Mapping[str, str],
    approved: Collection[BackwardCFunction] = (),
    linear: Epsilon | Gamma = _PLAIN,
) -> None:
    """Search the graph of `output` back to `inputs` for custom autograd functions without a rule.

    Args:
        output: tensors, in nested tuples, lists and dicts.
        inputs: where the search ends, likewise.
        declared: names of functions -> "linear" for those whose plain gradient is right.
        approved: nodes that stand under a rule already.
        linear: the composite's rule for linear layers, which those of quantisation libraries can't have.

    Raises:
        ValueError: reentrant gradient checkpointing; a compiled function; a linear layer out of its rule's reach.
        UnknownOperation: any other autograd function.
    """
    for node in foreign_functions(output, inputs):
        function = type(node)._forward_cls  # type: ignore[attr-defined]
        name = function.__name__
        if node in approved or declared.get(name) == "linear":
            continue
        if name in LINEAR_FUNCTIONS:
            if linear != _PLAIN and name != "BackwardHookFunction":
                raise unreachable(linear, name)
            continue
        if name == "CheckpointFunction":
            raise ValueError(
                "reentrant gradient checkpointing recomputes outside the rules and is silently wrong; "
                "use use_reentrant=False"
            )
        if function.__module__.startswith(("torch._dynamo", "torch._functorch")):
            raise compiled_inside()
        raise unknown_function(function, declaration_of(function) is not None)


def foreign_functions(output: Any, inputs: Any) -> Iterator[BackwardCFunction]:
    """The nodes of autograd functions that aren't ours, from `output` back to `inputs`."""
    seen = {None, *(tensor.grad_fn for tensor in _tensors(inputs))}
    todo: list[Any] = [tensor.grad_fn for tensor in _tensors(output)]
    foreign: dict[type, bool] = {}
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        kind = type(node)
        if kind not in foreign:
            foreign[kind] = _is_foreign(kind)
        if foreign[kind]:
            yield node
        for parent, _ in node.next_functions:
            if parent not in seen:
                todo.append(parent)


def _is_foreign(kind: type) -> bool:
    return issubclass(kind, BackwardCFunction) and kind._forward_cls.__module__.split(".")[0] != "lxt"  # type: ignore[attr-defined]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif is_dataclass(value):
        yield from _tensors(tuple(vars(value).values()))
