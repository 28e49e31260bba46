"""RuleMode: gives every torch operation that touches an activation its rule, whatever the architecture.

A model's forward runs inside the mode. For each operation:
 1. with gradients off, or no activation among the operands, it runs as it is, but for dropout;
 2. an operation with a rule (lxt.operations) runs under it;
 3. a linear map or a selection runs as it is, since the plain gradient is its rule; marks survive it;
 4. a function that torch implements in Python is entered, and its parts get their rules;
 5. anything else that returns something differentiable raises UnknownOperation.

An activation is a tensor that requires grad: parameters don't while a patched model runs. Marks ride on tensors:
`gate`, `weights` and `shifted` (lxt.marks).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._C import _autograd, _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch._C import _get_function_stack_at as _function_stack_at
from torch._C import _len_torch_function_stack as _function_stack_size
from torch._C import _pop_torch_function_stack as _pop_function_stack
from torch._C import _push_on_torch_function_stack as _push_function_stack
from torch.overrides import TorchFunctionMode

from lxt.compiling import compiled_inside
from lxt.composites import Composite
from lxt.declarations import Declaration, declared_operations
from lxt.declared_rules import apply, stand_in
from lxt.entering import enter
from lxt.marks import activations, mark, mark_of
from lxt.operands import Handler, run
from lxt.operations import handlers, without_dropout
from lxt.opnames import DROPOUTS, KNOWN, MARK_KEEPING, operation_name
from lxt.unknown import UnknownOperation, unknown_operation, unknown_vmap, where

__all__ = [
    "RuleMode",
    "UnknownOperation",
    "checkpoint_hook",
    "current_mode",
    "leave",
    "plain_gradient",
    "recomputable",
    "same_stack",
    "suspended",
    "unwatched",
]


@functools.lru_cache(maxsize=32)  # the table takes milliseconds, and a mode is made for each forward
def _table(composite: Composite, operations: tuple[tuple[str, str], ...]) -> dict[str, Handler]:
    return handlers(composite, dict(operations))


class RuleMode(TorchFunctionMode):
    """The rules of one composite, over all torch operations of this thread while the mode is entered."""

    def __init__(self, composite: Composite, operations: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.composite = composite
        self._named = _table(composite, tuple(sorted((operations or {}).items())))
        self._by_map = frozenset(operations or ())
        self._declared = {name: rule for name, rule in declared_operations().items() if name not in self._by_map}
        self._resolved: dict[Any, tuple[Handler, bool]] = {}  # with whether it is for activations only
        self._random: set[Any] = set()
        self.suspended = False
        self.recomputable: Callable | None = None  # the checkpoint whose recomputation enters the mode again
        self.explained: frozenset[int] = frozenset()  # ids of parameters that are inputs and so activations after all
        self.approved: set[Any] = set()  # autograd functions that stand under a rule though the mode can't see them

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # This runs some hundred times a layer, so that its order is that of what it costs.
        kwargs = kwargs or {}
        handler, needs_activation = self._resolved.get(func) or self._resolve(func)
        if handler is run or self.suspended:
            return func(*args, **kwargs)
        if not torch.is_grad_enabled():
            return without_dropout(func, args, kwargs) if func in self._random else func(*args, **kwargs)
        if (hook := checkpoint_hook()) is not None and hook is not self.recomputable:
            raise _checkpointed(operation_name(func))
        if _functorch.peek_interpreter_stack() is not None and _hidden_activation((args, kwargs)):
            raise (
                compiled_inside(where()) if torch.compiler.is_compiling() else unknown_vmap(where())
            )  # a batched tensor hides that it requires grad
        active = nested = False
        for value in args:
            if isinstance(value, torch.Tensor):
                if value.requires_grad:
                    active = True
                    if type(value) is nn.Parameter and id(value) not in self.explained:
                        raise ValueError(_outside(operation_name(func), value))
            elif isinstance(value, (tuple, list)):
                nested = True
        if needs_activation and not active and not ((nested or kwargs) and activations((args, kwargs))):
            return func(*args, **kwargs)
        return handler(func, args, kwargs)

    def declared(
        self, declaration: Declaration, function: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A function that the user declared, under its rule; the mode is entered."""
        if (hook := checkpoint_hook()) is not None and hook is not self.recomputable:
            raise _checkpointed(declaration.name)
        if not activations((args, kwargs)):
            return function(*args, **kwargs)
        if callable(declaration.rule):
            return stand_in(declaration, function, declaration.rule, args, kwargs)

        def plain(*args: Any, **kwargs: Any) -> Any:
            with self._approving() as approve, plain_gradient():
                return approve(function(*args, **kwargs))

        return apply(self.composite, declaration, plain, args, kwargs)

    @contextmanager
    def _approving(self) -> Iterator[Callable[[Any], Any]]:
        """Meanwhile autograd functions behind what is handed to `approve` stand under a rule."""
        start = torch.autograd._get_sequence_nr()  # pyright: ignore[reportPrivateImportUsage]

        def approve(result: Any) -> Any:
            todo = {tensor.grad_fn for tensor in activations(result)}
            while todo:
                node = todo.pop()
                if node is not None and node._sequence_nr() >= start and node not in self.approved:
                    self.approved.add(node)
                    todo.update(parent for parent, _ in node.next_functions)
            return result

        yield approve

    def _resolve(self, func: Callable) -> tuple[Handler, bool]:
        name = operation_name(func)
        if name in DROPOUTS or name == "scaled_dot_product_attention":
            self._random.add(func)
        handler = self._handler(func, name)
        self._resolved[func] = handler, handler is self._named.get(name) and func not in self._random
        return self._resolved[func]

    def _handler(self, func: Callable, name: str) -> Handler:
        if name in self._declared:
            return self._run_declared
        if name in self._by_map:  # one registered with torch.library has an autograd function behind it
            return functools.partial(self._run_by_map, self._named.get(name, run))
        if name in self._named:
            return self._named[name]
        if name in MARK_KEEPING:
            return _keep_mark
        if name in KNOWN:
            return run
        if getattr(func, "__code__", None) is not None:
            return self._enter_function
        return self._unknown

    def _run_by_map(self, handler: Handler, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self._approving() as approve:
            return approve((handler if activations((args, kwargs)) else run)(func, args, kwargs))

    def _run_declared(self, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self:
            return self.declared(self._declared[operation_name(func)], func, args, kwargs)

    def _enter_function(self, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self:
            return enter(func, args, kwargs)

    def _unknown(self, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        if activations((args, kwargs)) and activations(result):
            raise unknown_operation(operation_name(func), where(), (*args, *kwargs.values()))
        return result


def _entered_modes() -> list[RuleMode]:
    modes = map(_function_stack_at, range(_function_stack_size()))
    return [mode for mode in modes if isinstance(mode, RuleMode)]


@contextmanager
def same_stack() -> Iterator[None]:
    """Afterwards the modes of before are entered: an interrupt skips the hooks that leave those entered meanwhile."""
    before = _function_stack_size()
    try:
        yield
    finally:
        while _function_stack_size() > before:
            _pop_function_stack()


def leave(mode: TorchFunctionMode) -> None:
    """Leaves a mode that a hook has entered, with all that was entered in it, where it is still entered."""
    places = [place for place in range(_function_stack_size()) if _function_stack_at(place) is mode]
    while places and _function_stack_size() > places[0]:
        _pop_function_stack()


def current_mode() -> RuleMode | None:
    """The mode that is entered in this thread; patched models enter one at a time."""
    for place in reversed(range(_function_stack_size())):
        mode = _function_stack_at(place)
        if isinstance(mode, RuleMode):
            return mode
    return None


def suspended() -> bool:
    """Whether operations run as they are, as inside something that has a rule as a whole."""
    mode = current_mode()
    return mode is not None and mode.suspended


def unwatched(rule: Callable, *args: Any) -> Any:
    """`rule(*args)` with the mode out of the way, where it is the innermost: what it sees in a rule costs time only.

    For autograd functions, which run their forwards with gradients off, and for what leads to them.
    """
    if not _function_stack_size() or not isinstance(_function_stack_at(_function_stack_size() - 1), RuleMode):
        return rule(*args)
    mode = _pop_function_stack()
    try:
        return rule(*args)
    finally:
        _push_function_stack(mode)


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


def _checkpointed(operation: str) -> ValueError:
    return ValueError(
        f"{operation!r}{where()} runs in a function of its own that is checkpointed, which would be recomputed without "
        "the rules; checkpoint a module instead, or use model.gradient_checkpointing_enable()"
    )


def _outside(operation: str, parameter: nn.Parameter) -> str:
    return (
        f"{operation!r}{where()} met a trainable parameter of shape {tuple(parameter.shape)} that is not the patched "
        "model's, as of a module in a hook, an adapter or another model: the rules would take it for an activation; "
        "freeze it with requires_grad_(False), or patch a module that holds it too"
    )


def _keep_mark(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    result = func(*args, **kwargs)
    name = mark_of(args[0] if args else kwargs.get("input"))
    return result if name is None else mark(result, name)
