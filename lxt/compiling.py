"""torch.compile: a patched model goes into its graph as one call (lxt.onegraph), or runs eagerly inside it.

What dynamo would make of the rules' own Python is not theirs: it hides what it fuses from them, and what it calls from
the search of the graph.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

__all__ = [
    "PATCHES",
    "call",
    "call_eagerly",
    "compiled_inside",
    "eager_caller",
    "hooks_of",
    "is_compiled",
    "make_uncompiled",
    "uncompiled",
]

# A compiled graph can't hold a patch and holds its name, new for each and so in no cache of compiled code.
PATCHES: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


def call_eagerly(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """`function(*args, **kwargs)`, of which torch.compile traces nothing."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled; importing it takes a second
        return function(*args, **kwargs)
    return _untraced()(function, *args, **kwargs)


def eager_caller() -> Callable:
    """call_eagerly for code that torch.compile traces: its error under fullgraph=True then says why."""
    return _untraced() if "torch._dynamo" in sys.modules else call_eagerly


@functools.cache
def _untraced() -> Callable:
    return torch.compiler.disable(call, reason="lxt's rules run eagerly: compile without fullgraph=True")


def call(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """`function(*args, **kwargs)`."""
    return function(*args, **kwargs)


def make_uncompiled(module: nn.Module) -> Callable[[], None] | None:
    """Have a module run eagerly that `module.compile()` was called on; returns how to undo it."""
    compiled = module.__dict__.get("_compiled_call_impl")
    if compiled is None:
        return None
    module.__dict__["_compiled_call_impl"] = None
    return partial(module.__dict__.__setitem__, "_compiled_call_impl", compiled)


def hooks_of(modules: Iterable[nn.Module]) -> list[Mapping[int, Any]]:
    """The dicts in which torch keeps the hooks of the modules, and those of all modules."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [getattr(module, name) for module in modules for name in names] + [
        getattr(torch.nn.modules.module, f"_global{name}") for name in names
    ]


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile(model) returned it."""
    return type(module).__name__ == "OptimizedModule" and "_orig_mod" in module._modules


def uncompiled(module: nn.Module) -> nn.Module:
    """The model that torch.compile was given; `module` itself where it is not compiled."""
    return module._modules["_orig_mod"] or module if is_compiled(module) else module


def compiled_inside(where: str = "") -> ValueError:
    """The error for a compiled function that runs inside a patched model."""
    return ValueError(
        f"a function compiled by torch.compile runs{where} inside the patched model, where the rules can't see its "
        'operations; run both under `with torch.compiler.set_stance("force_eager"):`, or take the compiled function out'
    )
