"""UnknownOperation: what is said, and what to do next, where an operation has no rule."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["UnknownOperation", "unknown_function", "unknown_operation", "unknown_vmap", "where"]

_NOT_THE_USERS = tuple(str(Path(file).parent) for file in (__file__, torch.__file__) if file)
_KINDS = """\
    "linear"      linear in its input, or a selection of its entries
    "identity"    element-wise with f(0) = 0: an activation function
    "norm"        its input times a weight and 1/sigma: RMSNorm
    "product"     a product of activations
    "gated"       act(gate) * up, called with (gate, up)
    "attention"   takes query, key and value
    "constant"    its output isn't there because of its input: a mask, a gate, a denominator
    a function    of yours that computes the same with torch operations: their rules are used"""


class UnknownOperation(RuntimeError):
    """An operation without a rule met an activation: relevance through it would be silently wrong.

    Attributes:
        operation: its name.
    """

    def __init__(self, operation: str, message: str = "") -> None:
        self.operation = operation
        super().__init__(message or f"no rule for {operation!r}")

    def __reduce__(self) -> tuple[type[UnknownOperation], tuple[str, str]]:
        return type(self), (self.operation, str(self))


def unknown_operation(name: str, place: str, operands: Iterable[Any]) -> UnknownOperation:
    """Of one of torch's operations, or one registered with torch.library."""
    return UnknownOperation(
        name,
        f"no rule for {name!r}{place}, which got an activation{_described(operands)}: relevance through it would be "
        f"silently wrong.\nSay what it is to relevance, before patching or attributing:\n\n"
        f'    lxt.declare("{name}", "linear")\n\n{_choices()}',
    )


def unknown_function(function: type, is_declared: bool) -> UnknownOperation:
    """Of a torch.autograd.Function."""
    name, home = function.__name__, function.__module__
    code = function.forward.__code__  # type: ignore[attr-defined]
    parameters = code.co_varnames[: code.co_argcount]
    taken = [name for name in parameters if name != "ctx"]
    place = f" (a torch.autograd.Function in {home}, {Path(code.co_filename).name}:{code.co_firstlineno})"
    head = f"no rule for {name!r}{place}, which got an activation and hides what it does to it: relevance through it "
    head += "would be silently wrong.\n"
    if is_declared:
        return UnknownOperation(
            name,
            f"{head}It is declared, but was called past the declaration: through a reference to its `apply` that was "
            f"taken before, as in `f = {name}.apply` at the top of a file. Declare it before that file is imported, "
            "or declare the function that calls it.",
        )
    public = "<locals>" not in function.__qualname__ and home != "__main__"
    path = f"{home}.{function.__qualname__}" if public else name
    rule = "attention" if len({"query", "key", "value", "q", "k", "v"} & set(taken)) == 3 else "linear"
    return UnknownOperation(
        name,
        f"{head}Say what it is to relevance, before patching or attributing; it takes ({', '.join(taken)}):\n\n"
        f'{f"    import {home}{chr(10)}" if public else ""}    lxt.declare({path}, "{rule}")\n\n{_choices()}',
    )


def unknown_vmap(place: str) -> UnknownOperation:
    """Of an activation inside torch.vmap, where a tensor doesn't show whether it is one."""
    return UnknownOperation(
        "vmap",
        f"no rule for 'vmap'{place}: inside torch.vmap a tensor doesn't show whether it is an activation. Write the "
        "function for the whole batch instead, or, if one of the rules holds for it as a whole, declare the Python "
        "function that calls vmap, and call what comes back:\n\n"
        f'    module.function = lxt.declare(module.function, "linear")\n\n{_choices()}',
    )


def _choices() -> str:
    return (
        f"Rules:\n{_KINDS}\nInstead, the Python function or the nn.Module around it may be declared; "
        "docs/adding-an-architecture.md has examples. out.check() then compares with a second mechanism."
    )


def _described(operands: Iterable[Any]) -> str:
    shapes = [
        f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
        for x in operands
        if isinstance(x, Tensor) and x.requires_grad
    ]
    return f" ({', '.join(shapes)})" if shapes else ""


def where() -> str:
    """' in LlamaMLP (modeling_llama.py:164)': the innermost module that runs, and the line that called torch."""
    frame, line = _caller(), ""
    while frame is not None:
        file = frame.f_code.co_filename
        if not line and not file.startswith(_NOT_THE_USERS) and not file.startswith("<"):
            line = f" ({Path(file).name}:{frame.f_lineno})"
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            return f" in {type(owner).__name__}{line}"
        frame = frame.f_back
    return line


def _caller() -> FrameType | None:
    return sys._getframe(2)
