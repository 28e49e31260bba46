"""RuleMode: gives every torch operation that touches an activation its rule, whatever the architecture.

A model's forward runs inside the mode. For each operation:
 1. with gradients off, or no activation among the operands, it runs as it is;
 2. an operation with a rule (lxt.operations) runs under it;
 3. a linear map or a selection runs as it is, since the plain gradient is its rule; marks survive it;
 4. a function that torch implements in Python is entered, and its parts get their rules;
 5. anything else that returns something differentiable raises UnknownOperation.

An activation is a tensor that requires grad: parameters don't while a patched model runs. Two marks ride on tensors:
`gate`, the output of an activation function, and `weights`, the output of a softmax.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.overrides import TorchFunctionMode

from lxt.composites import Composite
from lxt.operations import Handler, activations, copy_mark, handlers, without_dropout
from lxt.opnames import KNOWN, MARK_KEEPING, operation_name

__all__ = ["RuleMode", "UnknownOperation", "current_mode", "plain_gradient"]


class UnknownOperation(RuntimeError):
    """An operation without a rule met an activation: relevance through it would be silently wrong."""

    def __init__(self, operation: str, where: str = "") -> None:
        self.operation = operation
        super().__init__(
            f"no rule for {operation!r}{where}, which received an activation that requires grad. "
            f"If its plain gradient is right (linear, or a selection), declare it: "
            f'monkey_patch(model, patch_map=replace(patch_map_for(model), operations={{"{operation}": "linear"}})); '
            'other kinds are "identity" (element-wise with f(0) = 0), "product" and "constant".'
        )


class RuleMode(TorchFunctionMode):
    """The rules of one composite, over all torch operations of this thread while the mode is entered."""

    def __init__(self, composite: Composite, operations: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.composite = composite
        self._named = handlers(composite, operations or {})
        self._plain = KNOWN | {name for name, kind in (operations or {}).items() if kind == "linear"}
        self._resolved: dict[Any, Handler] = {}
        self.suspended = False
        self.approved: set[Any] = set()  # autograd functions that stand under a rule though the mode can't see them

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.suspended:
            return func(*args, **kwargs)
        if not torch.is_grad_enabled():
            return without_dropout(func, args, kwargs)
        if _functorch.peek_interpreter_stack() is not None and _hidden_activation((args, kwargs)):
            raise UnknownOperation("vmap", _where())  # a batched tensor hides that it requires grad
        handler = self._resolved.get(func)
        if handler is None:
            handler = self._resolved[func] = self._resolve(func)
        return handler(func, args, kwargs)

    def _resolve(self, func: Callable) -> Handler:
        name = operation_name(func)
        if name in self._named:
            return self._named[name]
        if name in MARK_KEEPING:
            return _keep_mark
        if name in self._plain:
            return _run
        if getattr(func, "__code__", None) is not None:
            return self._enter_function
        return self._unknown

    def _enter_function(self, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self:
            return torch._C._skip_one_hop_torch_function(func, (), args, kwargs)

    def _unknown(self, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        if activations((args, kwargs)) and activations(result):
            raise UnknownOperation(operation_name(func), _where())
        return result


def current_mode() -> RuleMode | None:
    """The mode that is entered in this thread; patched models enter one at a time."""
    modes = torch.overrides._get_current_function_mode_stack()
    return next((mode for mode in reversed(modes) if isinstance(mode, RuleMode)), None)


def _hidden_activation(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(map(_hidden_activation, value))
    if isinstance(value, dict):
        return _hidden_activation(tuple(value.values()))
    while isinstance(value, torch.Tensor) and _functorch.is_functorch_wrapped_tensor(value):
        value = _functorch.get_unwrapped(value)
    return isinstance(value, torch.Tensor) and value.requires_grad


@contextmanager
def plain_gradient() -> Iterator[None]:
    """Meanwhile operations run as they are: what a composite's field "gradient" means for a whole module."""
    modes = [
        m for m in torch.overrides._get_current_function_mode_stack() if isinstance(m, RuleMode) and not m.suspended
    ]
    for mode in modes:
        mode.suspended = True
    try:
        yield
    finally:
        for mode in modes:
            mode.suspended = False


def _run(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(*args, **kwargs)


def _keep_mark(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return copy_mark(args[0] if args else None, func(*args, **kwargs))


def _where() -> str:
    """' in LlamaMLP (modeling_llama.py:164)': the innermost module on the Python stack."""
    frame = sys._getframe(2)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            file = frame.f_code.co_filename.rsplit("/", 1)[-1]
            return f" in {type(owner).__name__} ({file}:{frame.f_lineno})"
        frame = frame.f_back
    return ""
