"""RuleMode: gives every torch operation that touches an activation its rule, whatever the architecture.

A model's forward runs inside the mode. For each operation:
 1. with gradients off, or no activation among the operands, it runs as it is, but for dropout;
 2. an operation with a rule (lxt.operations) runs under it;
 3. a linear map or a selection runs as it is, since the plain gradient is its rule; marks survive it;
 4. a function that torch implements in Python is entered, and its parts get their rules;
 5. anything else that returns something differentiable raises UnknownOperation.

An activation is a tensor that requires grad: parameters don't while a patched model runs. Two marks ride on tensors:
`gate`, the output of an activation function, and `weights`, the output of a softmax.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._C import _autograd, _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.overrides import TorchFunctionMode

from lxt.composites import Composite
from lxt.operations import Handler, activations, copy_mark, handlers, without_dropout
from lxt.opnames import KNOWN, MARK_KEEPING, operation_name

__all__ = ["RuleMode", "UnknownOperation", "checkpoint_hook", "current_mode", "plain_gradient", "recomputable"]


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


@functools.lru_cache(maxsize=32)  # the table takes milliseconds, and a mode is made for each forward
def _table(composite: Composite, operations: tuple[tuple[str, str], ...]) -> dict[str, Handler]:
    return handlers(composite, dict(operations))


class RuleMode(TorchFunctionMode):
    """The rules of one composite, over all torch operations of this thread while the mode is entered."""

    def __init__(self, composite: Composite, operations: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.composite = composite
        self._named = _table(composite, tuple(sorted((operations or {}).items())))
        self._plain = KNOWN | {name for name, kind in (operations or {}).items() if kind == "linear"}
        self._resolved: dict[Any, Handler] = {}
        self.suspended = False
        self.recomputable: Callable | None = None  # the checkpoint whose recomputation enters the mode again
        self.explained: frozenset[int] = frozenset()  # ids of parameters that are inputs and so activations after all
        self.approved: set[Any] = set()  # autograd functions that stand under a rule though the mode can't see them

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.suspended:
            return func(*args, **kwargs)
        if not torch.is_grad_enabled():
            return without_dropout(func, args, kwargs)
        hook = checkpoint_hook()
        if hook is not None and hook is not self.recomputable:
            raise ValueError(
                f"{operation_name(func)!r}{_where()} runs in a function of its own that is checkpointed, which would "
                "be recomputed without the rules; checkpoint a module instead, or use "
                "model.gradient_checkpointing_enable()"
            )
        if _functorch.peek_interpreter_stack() is not None and _hidden_activation((args, kwargs)):
            raise UnknownOperation("vmap", _where())  # a batched tensor hides that it requires grad
        handler = self._resolved.get(func)
        if handler is None:
            handler = self._resolved[func] = self._resolve(func)
        if handler is not _run:
            for value in args:
                if type(value) is nn.Parameter and value.requires_grad and id(value) not in self.explained:
                    raise ValueError(_outside(operation_name(func), value))
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


def _entered_modes() -> list[RuleMode]:
    modes = torch.overrides._get_current_function_mode_stack()
    return [mode for mode in modes if isinstance(mode, RuleMode)]


def current_mode() -> RuleMode | None:
    """The mode that is entered in this thread; patched models enter one at a time."""
    return next(reversed(_entered_modes()), None)


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
    modes = [mode for mode in _entered_modes() if not mode.suspended]
    for mode in modes:
        mode.suspended = True
    try:
        yield
    finally:
        for mode in modes:
            mode.suspended = False


def checkpoint_hook() -> Callable | None:
    """What torch's non-reentrant checkpoint has put on saved tensors, if the innermost hook is one."""
    hooks = _autograd._top_saved_tensors_default_hooks(True)
    return hooks[0] if hooks is not None and hooks[0].__qualname__.startswith("_checkpoint_hook") else None


@contextmanager
def recomputable() -> Iterator[None]:
    """Around a function that enters the mode by itself when the innermost checkpoint recomputes it."""
    mode = current_mode()
    if mode is None:
        yield
        return
    before, mode.recomputable = mode.recomputable, checkpoint_hook()
    try:
        yield
    finally:
        mode.recomputable = before


def _outside(operation: str, parameter: nn.Parameter) -> str:
    return (
        f"{operation!r}{_where()} met a trainable parameter of shape {tuple(parameter.shape)} that is not the patched "
        "model's, as of a module in a hook, an adapter or another model: the rules would take it for an activation; "
        "freeze it with requires_grad_(False), or patch a module that holds it too"
    )


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
