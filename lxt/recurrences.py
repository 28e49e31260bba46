"""Recurrences: what passes through a state-space layer or a linear attention, and what only steers it.

Such a layer writes values into a state and reads from it,

    S_t = decay_t S_{t-1} + write_t v_t^T,   o_t = read_t S_t,

with decay, write and read computed from the input: step size, A, B and C in Mamba; decay, beta, key and query in a
delta rule. `Composite.recurrence` says which of them are constants:

    value_only   all but the values (MambaLRP, arXiv 2406.07592, section 4.2): o is linear in v
    uniform      all but the values and what reads, which share equally: o is bilinear in them
    gradient     none

Under the first two the chunked form of a recurrence has the relevance of the step by step one. transformers computes a
recurrence in a function of its own, and takes a fused kernel in its place where one is installed. A kernel shows no
operations, so each module that calls such functions gets a copy of its own forward that sees, in their place, the
same functions written in torch, with the constants detached.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import CellType, FunctionType
from typing import Any

from torch import Tensor, nn

from lxt.composites import Composite
from lxt.rules import stop

__all__ = ["recurrent_forward"]


@dataclass(frozen=True)
class _Recurrence:
    """The parameters of a function that aren't always constants."""

    reads: str
    passes: tuple[str, ...]


_SCAN = _Recurrence("C", ("hidden_states", "z", "state", "initial_states"))
_DELTA = _Recurrence("query", ("value", "initial_state"))
# Functions of transformers' modeling files.
_FUNCTIONS = {
    "mamba_selective_scan": _SCAN,
    "mamba_selective_state_update": _SCAN,
    "mamba2_chunk_scan": _SCAN,
    "mamba2_selective_state_update": _SCAN,
    "torch_chunk_gated_delta_rule": _DELTA,
    "torch_recurrent_gated_delta_rule": _DELTA,
    "chunk_kimi_delta_attention": _DELTA,
    "recurrent_kimi_delta_attention": _DELTA,
}
# Modules whose forward is the recurrence: by the names of its first parameters.
_MATRIX_MEMORY = ("self", "query", "key", "value", "igate", "fgate")
_WRAPPERS = "hub_kernels.py"  # where transformers wraps a function that a kernel may stand in for


def recurrent_forward(module: nn.Module, composite: Composite) -> Callable | None:
    """The module's forward with recurrences under the rule and without fused kernels; None where it has neither.

    Raises:
        ValueError: the recurrence is written as older versions of transformers have it, where it can't be reached.
    """
    if composite.recurrence != "gradient" and _is_of_old(module):
        raise ValueError(
            f"{type(module).__name__} writes its recurrence as older versions of transformers do, where "
            f"Composite(recurrence={composite.recurrence!r}) can't reach it; use transformers 5.23 or newer, or "
            'composite.but(recurrence="gradient")'
        )
    forward = type(module).forward
    if tuple(inspect.signature(forward).parameters)[:6] == _MATRIX_MEMORY:
        memory = _Recurrence("query", ("value", "c_initial", "n_initial", "m_initial"))
        return _under_rule(forward, memory, composite)
    return _seeing(forward, composite)


def _is_of_old(module: nn.Module) -> bool:
    """Whether the scan is a method, or the delta rule an attribute, and not a function of the modeling file."""
    methods = any(hasattr(type(module), name) for name in ("slow_forward", "torch_forward"))
    return hasattr(module, "A_log") and (methods or "chunk_gated_delta_rule" in vars(module))


def _seeing(forward: Callable, composite: Composite) -> Callable | None:
    """A copy of `forward`, decorators included, with the functions that it calls replaced; None if there are none."""
    if not isinstance(forward, FunctionType):
        return None
    inner = getattr(forward, "__wrapped__", None)
    if inner is not None:
        seeing = _seeing(inner, composite)
        return None if seeing is None else _copy(forward, forward.__globals__, {id(inner): seeing})
    names = set(forward.__code__.co_names) & forward.__globals__.keys()
    replaced = {name: _replacement(name, forward.__globals__[name], composite) for name in names}
    replaced = {name: function for name, function in replaced.items() if function is not None}
    return _copy(forward, forward.__globals__ | replaced, {}) if replaced else None


def _replacement(name: str, function: Any, composite: Composite) -> Callable | None:
    written = _without_kernel(function)
    recurrence = _FUNCTIONS.get(name)
    if recurrence is not None and isinstance(written, FunctionType):
        return _under_rule(written, recurrence, composite)
    return written if written is not function else None


def _without_kernel(function: Any) -> Any:
    """The function in torch that transformers falls back to, where it may take a kernel; else the function itself."""
    while isinstance(function, FunctionType) and function.__code__.co_filename.endswith(_WRAPPERS):
        inner = getattr(function, "__wrapped__", None)
        if inner is None:
            break
        function = inner
    return function


def _under_rule(function: Callable, recurrence: _Recurrence, composite: Composite) -> Callable:
    if composite.recurrence == "gradient":
        return function
    kept = {*recurrence.passes, *((recurrence.reads,) if composite.recurrence == "uniform" else ())}
    names = tuple(inspect.signature(function).parameters)

    @functools.wraps(function)
    def under_rule(*args: Any, **kwargs: Any) -> Any:
        args = tuple(_passed(name, value, kept) for name, value in zip(names, args, strict=False)) + args[len(names) :]
        return function(*args, **{name: _passed(name, value, kept) for name, value in kwargs.items()})

    return under_rule


def _passed(name: str, value: Any, kept: set[str]) -> Any:
    return stop(value) if isinstance(value, Tensor) and value.requires_grad and name not in kept else value


def _copy(function: FunctionType, names: dict[str, Any], inner: dict[int, Callable]) -> FunctionType:
    """`function` with other global names, and with the functions in its closure replaced, by their id."""
    cells = [
        CellType(inner.get(id(cell.cell_contents), cell.cell_contents)) if _is_filled(cell) else cell
        for cell in function.__closure__ or ()
    ]
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, tuple(cells) or None)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _is_filled(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
