"""Hooks that change what a module reads or gives, or watch what it does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lxt.latents.sink import Site
from lxt.mode import leave

__all__ = ["changed", "hooked", "watched"]


@contextmanager
def hooked(site: Site, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Meanwhile `change` is called with the module's output or input, and gives what goes on in its place."""

    def on_output(module: nn.Module, args: Any, output: Any) -> Any:
        return changed(output, change, module)

    def on_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        name = next(name for name, value in kwargs.items() if isinstance(value, Tensor))  # hidden_states comes first
        return args, kwargs | {name: change(kwargs[name])}

    if site.end == "input":
        handle = site.module.register_forward_pre_hook(on_input, with_kwargs=True)
    else:
        handle = site.module.register_forward_hook(on_output)
    try:
        yield
    finally:
        handle.remove()


def changed(output: Any, change: Callable[[Tensor], Tensor], module: nn.Module) -> Any:
    """A module's output with its tensor, or its first one, changed.

    Raises:
        ValueError: it gives something else.
    """
    if isinstance(output, Tensor):
        return change(output)
    if type(output) in (tuple, list) and output and isinstance(output[0], Tensor):
        return (change(output[0]), *output[1:])
    raise ValueError(
        f"{type(module).__name__} gives {type(output).__name__}, and neither a tensor nor a tuple that begins with "
        "one, so that nothing is known at its output"
    )


@contextmanager
def watched(
    module: nn.Module,
    make: Callable[[], TorchFunctionMode],
    finished: Callable[[Any], None] = lambda mode: None,
) -> Iterator[None]:
    """Meanwhile each forward of the module runs in a mode of its own, and recomputations of its parts do.

    Checkpoints may lie between a layer's call and its code, so its parts (attention among them) enter one too.

    Args:
        module: the module; without gradients it runs unwatched.
        make: makes the mode of one forward.
        finished: gets it when the module has its output.
    """
    parts = [part for part in module.children() if next(part.children(), None) is not None]
    state = threading.local()  # on a GPU the backward, which runs parts again, has a thread of its own

    def before(part: nn.Module, args: Any) -> None:
        entered = state.__dict__.setdefault("entered", [])
        if not entered:
            if not torch.is_grad_enabled():
                return
            state.mode = make()
            state.mode.__enter__()
        entered.append(part)

    def after(part: nn.Module, args: Any, output: Any) -> None:
        entered = state.__dict__.get("entered")
        if not entered or entered[-1] is not part:
            return
        entered.pop()
        if not entered:
            mode = state.__dict__.pop("mode")
            mode.__exit__(None, None, None)
            if part is module and output is not None:  # None where an exception passes through
                finished(mode)

    with ExitStack() as undo:
        for part in (module, *parts):
            undo.callback(part.register_forward_pre_hook(before).remove)
            undo.callback(part.register_forward_hook(after, always_call=True).remove)
        try:
            yield
        finally:
            if "mode" in state.__dict__:  # an interrupt has passed through, for which torch calls no hooks
                leave(state.mode)
