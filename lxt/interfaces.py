"""Attention implementations that aren't torch operations (flash, flex, a registered function): the rule around them.

transformers picks the implementation by name from a table that all models share, ALL_ATTENTION_FUNCTIONS. To reach it
for one model and leave the table alone, each attention module gets a copy of its own forward that sees another table,
whose functions take query, key and value under the composite's attention rule and run with the plain gradient inside.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from lxt.attention import SEEN_BY_THE_MODE, under_rule
from lxt.composites import Composite
from lxt.graph import foreign_functions
from lxt.mode import current_mode, plain_gradient

__all__ = ["rewired_forward", "uses_interface"]

_TABLE = "ALL_ATTENTION_FUNCTIONS"


def uses_interface(module: nn.Module) -> bool:
    """Whether the module's forward looks its attention up in transformers' table."""
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and _TABLE in code.co_names


def rewired_forward(module: nn.Module, composite: Composite) -> Callable:
    """The module's forward with attention functions under the rule.

    Raises:
        ValueError: the composite asks for a softmax that these implementations never show.
    """
    if composite.softmax_temperature != 1 and composite.attention != "value_only":
        raise ValueError(
            f"Composite(softmax_temperature={composite.softmax_temperature}) needs the softmax, which this attention "
            'implementation never shows; call model.set_attn_implementation("sdpa") first'
        )
    forward = type(module).forward
    table = _Table(forward.__globals__[_TABLE], composite)
    copy = FunctionType(
        forward.__code__,
        forward.__globals__ | {_TABLE: table},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


class _Table:
    """transformers' table of attention functions, each under the rule."""

    def __init__(self, table: Any, composite: Composite) -> None:
        self._table, self._composite = table, composite

    def __getitem__(self, name: str) -> Callable:
        return self._under_rule(name, self._table[name])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._table, name)

    def get_interface(self, name: str, default: Callable) -> Callable:
        return self._under_rule(name, self._table.get_interface(name, default))

    def _under_rule(self, name: str, attention: Callable) -> Callable:
        if name in SEEN_BY_THE_MODE:
            return attention

        def function(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            query, key, value = under_rule(self._composite, query, key, value)
            if "dropout" in kwargs:
                kwargs["dropout"] = 0.0
            with plain_gradient():
                result = attention(module, query, key, value, *args, **kwargs)
            mode = current_mode()
            if mode is not None:
                mode.approved.update(foreign_functions(result, (query, key, value)))
            return result

        return function
