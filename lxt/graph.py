"""Autograd functions that the operator mode can't see: torch tells it nothing of Function.apply."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction

from lxt.declarations import declaration_of
from lxt.unknown import unknown_function

__all__ = ["foreign_functions", "refuse_foreign_functions"]

# The plain gradient is the rule: linear layers of quantisation libraries, and the identity that torch puts around a
# module with a full backward hook.
LINEAR_FUNCTIONS = frozenset({"BackwardHookFunction", "MatMul4Bit", "MatMul8bitFp", "MatMul8bitLt"})


def refuse_foreign_functions(
    output: Any, inputs: Any, declared: Mapping[str, str], approved: Collection[BackwardCFunction] = ()
) -> None:
    """Search the graph of `output` back to `inputs` for custom autograd functions without a rule.

    Args:
        output: tensors, in nested tuples, lists and dicts.
        inputs: where the search ends, likewise.
        declared: names of functions -> "linear" for those whose plain gradient is right.
        approved: nodes that stand under a rule already.

    Raises:
        ValueError: reentrant gradient checkpointing.
        UnknownOperation: any other autograd function.
    """
    for node in foreign_functions(output, inputs):
        function = type(node)._forward_cls  # type: ignore[attr-defined]
        name = function.__name__
        if node in approved or name in LINEAR_FUNCTIONS or declared.get(name) == "linear":
            continue
        if name == "CheckpointFunction":
            raise ValueError(
                "reentrant gradient checkpointing recomputes outside the rules and is silently wrong; "
                "use use_reentrant=False"
            )
        raise unknown_function(function, declaration_of(function) is not None)


def foreign_functions(output: Any, inputs: Any) -> Iterator[BackwardCFunction]:
    """The nodes of autograd functions that aren't ours, from `output` back to `inputs`."""
    seen = {tensor.grad_fn for tensor in _tensors(inputs) if tensor.grad_fn is not None}
    todo = [tensor.grad_fn for tensor in _tensors(output) if tensor.grad_fn is not None]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if isinstance(node, BackwardCFunction) and type(node)._forward_cls.__module__.split(".")[0] != "lxt":  # type: ignore[attr-defined]
            yield node
        todo += [parent for parent, _ in node.next_functions if parent is not None]


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
