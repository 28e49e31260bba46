"""The ledger: where a sum of relevance parts from the explained value, operation by operation.

Only operations that can absorb or create relevance are watched. For each, the relevance of its outputs minus that of
its inputs is what it kept: a bias its own contribution, a softmax what its backward takes away, a constant summand
(learned positions, a mask) its share. What is left over after all entries is rounding, or an operation that should
have been watched.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lxt.composites import Composite, Epsilon
from lxt.declarations import Declaration
from lxt.marks import copy_mark
from lxt.mode import RuleMode
from lxt.opnames import LINEAR_LAYERS, SOFTMAX, operation_name

__all__ = ["Ledger"]

_LEAKS = (
    dict.fromkeys([*LINEAR_LAYERS, "addmm"], "bias")
    | dict.fromkeys(["layer_norm", "group_norm", "batch_norm"], "bias")
    | dict.fromkeys([*SOFTMAX, "scaled_dot_product_attention"], "softmax")
    | dict.fromkeys(["add", "__add__", "__radd__", "sub", "__sub__", "__rsub__", "where", "lerp"], "constant")
    | dict.fromkeys(["cat", "concat", "concatenate", "stack", "hstack", "vstack"], "constant")
)
_IN_PLACE = {"add_": "add", "__iadd__": "add", "sub_": "sub", "__isub__": "sub"}


@dataclass
class Ledger:
    """What the watched operations kept in one backward, in the unit of the explained value.

    Attributes:
        entries: (kind, path of the module it ran in) -> amount; kinds are bias, softmax, constant.
    """

    modules: Mapping[nn.Module, str]
    entries: dict[tuple[str, str], float] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> Ledger:
        """An empty ledger that knows the model's modules by their paths."""
        return cls({module: name for name, module in model.named_modules()})

    def mode(self, composite: Composite, operations: Mapping[str, str]) -> RuleMode:
        """A RuleMode that writes into this ledger: the `mode` of lxt.patching.patch_model."""
        return _LedgerMode(self, composite, operations)

    def add(self, key: tuple[str, str], amount: float) -> None:
        """Book an amount."""
        self.entries[key] = self.entries.get(key, 0.0) + amount

    def where(self) -> str:
        """The path of the innermost of the model's modules on the Python stack."""
        frame = sys._getframe(1)
        while frame is not None:
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module) and owner in self.modules:
                return self.modules[owner]
            frame = frame.f_back
        return ""


class _Tap(torch.autograd.Function):
    """Identity that books sign * sum(x * c_x) when the backward passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, book: Callable[[float], None], sign: int) -> Tensor:
        ctx.book, ctx.sign = book, sign
        ctx.save_for_backward(x)
        return torch.ops.aten._unsafe_view(x, x.shape)  # no view: models write into it

    @staticmethod
    def backward(ctx: Any, c_x: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        ctx.book(ctx.sign * float((x.detach().double() * c_x.double()).sum()))
        return c_x, None, None


class _LedgerMode(RuleMode):
    def __init__(self, ledger: Ledger, composite: Composite, operations: Mapping[str, str]) -> None:
        super().__init__(composite, operations)
        self._ledger = ledger

    def declared(
        self, declaration: Declaration, function: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A declared function is booked as a whole; a reference in its place, operation by operation."""
        if callable(declaration.rule):
            return super().declared(declaration, function, args, kwargs)
        book = partial(self._ledger.add, (declaration.name, self._ledger.where()))
        args, kwargs = _tapped(args, book, -1), _tapped(kwargs, book, -1)
        return _tapped(super().declared(declaration, function, args, kwargs), book, 1)

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = operation_name(func)
        kind = _LEAKS.get(_IN_PLACE.get(name, name))
        if kind is None or self.suspended or not torch.is_grad_enabled():
            return super().__torch_function__(func, types, args, kwargs)
        if name in _IN_PLACE:  # out of place, since what was there before is part of the balance
            target = args[0].clone(), *args[1:]
            return args[0].copy_(self.__torch_function__(getattr(torch.Tensor, _IN_PLACE[name]), types, target, kwargs))
        rule = self.composite.convolution if name.startswith("conv") else None
        rule = rule or self.composite.linear
        if kind == "bias" and isinstance(rule, Epsilon) and rule.epsilon:
            kind = "bias and epsilon"
        book = partial(self._ledger.add, (kind, self._ledger.where()))
        result = super().__torch_function__(func, types, _tapped(args, book, -1), _tapped(kwargs or {}, book, -1))
        return _tapped(result, book, 1)


def _tapped(value: Any, book: Callable[[float], None], sign: int) -> Any:
    if isinstance(value, Tensor):
        return copy_mark(value, _Tap.apply(value, book, sign)) if value.requires_grad else value
    if isinstance(value, (tuple, list)):
        return type(value)([_tapped(item, book, sign) for item in value])
    if isinstance(value, dict):
        return {key: _tapped(item, book, sign) for key, item in value.items()}
    return value
