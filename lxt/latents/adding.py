"""What attention and MLP add to the residual stream, and the stream between the two.

Attention gives a tensor that is added to the stream, behind a norm where the architecture has one there. So the reader
1. taps the output of attention, or of the MLP, and if the next norm gets that tensor, the norm's output in its place;
2. takes for the stream in between what enters the first norm behind attention's output, or the MLP where no norm comes
   first: the sum, provided that autograd has it depend on attention. Where it doesn't, both read the same stream.

That sum has no module, so its gradient comes from a hook on the tensor, which sees all that flows back to it, and its
value from the branch that was seen: autograd keeps it there, also through checkpoints, and is through with the branch
before it comes to the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lxt import rules
from lxt.latents.anatomy import norms
from lxt.latents.hooking import changed
from lxt.latents.reading import is_named, name, names, reading
from lxt.latents.sink import Sink, Site

__all__ = ["Reading", "added", "carried", "on_branches", "replaced"]


@dataclass
class Reading:
    """One reading; `live` until another takes its place."""

    live: bool = True


@dataclass
class _Branch:
    """What one layer's attention, or MLP, gave in the forward that runs; nothing is kept alive by it.

    Attributes:
        given: what the tensor is named; None before, and once it has been added.
        reading: of it.
        node: what autograd knows it by.
    """

    given: object | None = None
    reading: Reading = field(default_factory=Reading)
    node: Any = None

    def give(self, x: Tensor) -> None:
        """`x` is what it gave."""
        self.given = object()
        name(x, self.given)

    def is_given(self, x: Any) -> bool:
        """Whether `x` is that tensor, and not what it was added to in place."""
        return self.given is not None and isinstance(x, Tensor) and is_named(x, self.given)


def on_branches(sites: Sequence[Site], sink: Sink, shape: torch.Size) -> AbstractContextManager[Any]:
    """The Reader of `attn_out`, `mlp_out` and `residual_mid`.

    Each site's `of` are the layer, and for `residual_mid` the attention and the MLP too.
    """
    undo = ExitStack()
    for site in sites:
        hooks = _between(site, sink, shape) if site.latent == "residual_mid" else _added(site, sink, shape)
        for handle in hooks:
            undo.callback(handle.remove)
    return undo


def added(site: Site, tap: Callable[[Tensor, Reading], Tensor]) -> list[Any]:
    """Hooks that give to `tap` what attention, or the MLP, adds to the stream: its output, or a norm's of that.

    Args:
        site: where; its `of` begins with the layer.
        tap: (tensor, its reading) -> what goes on; of several readings of a forward the last stays live.
    """
    branch = _Branch()

    def tapped(x: Tensor) -> Tensor:
        branch.reading = Reading()
        return tap(x, branch.reading)

    def leaves(module: nn.Module, args: Any, output: Any) -> Any:
        def first(x: Tensor) -> Tensor:
            y = tapped(x)
            branch.give(y)
            return y

        return changed(output, first, module)

    def leaves_norm(module: nn.Module, args: Any, output: Any) -> Any:
        if not args or not isinstance(output, Tensor) or not branch.is_given(args[0]):
            branch.given = None
            return None
        branch.given, branch.reading.live = None, False
        return tapped(output)

    handles = (norm.register_forward_hook(leaves_norm) for norm in _outside(site))
    return [site.module.register_forward_hook(leaves), *handles]


@dataclass(frozen=True, eq=False)
class _Unchanged:
    """What a tensor was before it was changed.

    Attributes:
        x: the tensor before the changes that come behind a norm.
        node: what autograd knew it by before all changes.
        by: the marks of those that changed it.
    """

    x: Tensor
    node: Any
    by: tuple[object, ...] = ()


@contextmanager
def replaced(site: Site, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Meanwhile `change` is called with what attention, or the MLP, adds to the stream, and gives what goes on.

    A norm behind it is seen only when it gets the changed tensor: it then reads what was there before the change, and
    its own output is changed. What has to be known for that rides on the tensors, as threads may run at once.
    """
    mark = object()

    def leaves(module: nn.Module, args: Any, output: Any) -> Any:
        def first(x: Tensor) -> Tensor:
            with _writes_counted():
                x = x.clone() if x.is_inference() else x
                before, y = _unchanged(x), change(x)
                if y is x and before is None:
                    name(x, mark)
                else:
                    before = before or _Unchanged(x, x.grad_fn)
                    name(y, replace(before, by=(*before.by, mark)))
            return y

        return changed(output, first, module)

    def enters_norm(norm: nn.Module, args: tuple[Any, ...]) -> Any:
        before = _unchanged(args[0]) if args and isinstance(args[0], Tensor) else None
        if before is None or mark not in before.by:
            return None
        x = before.x.view(args[0].shape)
        for one in (*before.by, *names(args[0])):
            if not isinstance(one, _Unchanged):
                name(x, one)
        return (x, *args[1:])

    def leaves_norm(norm: nn.Module, args: Any, output: Any) -> Any:
        mine = args and isinstance(args[0], Tensor) and isinstance(output, Tensor) and is_named(args[0], mark)
        return change(output) if mine else None

    with ExitStack() as undo:
        undo.callback(site.module.register_forward_hook(leaves).remove)
        for norm in _outside(site):
            undo.callback(norm.register_forward_pre_hook(enters_norm).remove)
            undo.callback(norm.register_forward_hook(leaves_norm).remove)
        yield


def carried(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`change` for a module's output that may be read as a branch, or be `replaced`, before it: a norm behind goes on.

    What was replaced is changed in both forms, as nothing tells here whether there is a norm.
    """

    def both(x: Tensor) -> Tensor:
        own, before = names(x), _unchanged(x)
        if not own:
            return change(x)
        with _writes_counted():
            read = [] if before is None else [replace(before, x=change(before.x))]
            y = change(x)
            if y is not x:
                for one in (*(one for one in own if not isinstance(one, _Unchanged)), *read):
                    name(y, one)
        return y

    return both


@contextmanager
def _writes_counted() -> Iterator[None]:
    """Names rest on how often a tensor was written into, which tensors made in inference mode don't count."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            yield
    else:
        yield


def _unchanged(x: Tensor) -> _Unchanged | None:
    return next((one for one in reversed(names(x)) if isinstance(one, _Unchanged)), None)


def _outside(site: Site) -> list[nn.Module]:
    """The layer's norms that lie outside of attention, or of the MLP."""
    inside = set(site.module.modules())
    return [norm for norm in norms(site.of[0].module) if norm not in inside]


def _added(site: Site, sink: Sink, shape: torch.Size) -> list[Any]:
    def tap(x: Tensor, current: Reading) -> Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            return x
        site.refuse_other_tokens(x, shape)
        return reading(x, (x,), partial(_write, site, sink, current, shape), written_into=True)  # in some, sums are

    return added(site, tap)


def _between(site: Site, sink: Sink, shape: torch.Size) -> list[Any]:
    layer, attention, mlp = site.of
    branch = _Branch()

    def leaves(module: nn.Module, args: Any, output: Any) -> None:
        first = output if isinstance(output, Tensor) else output[0]
        branch.give(first)
        before = _unchanged(first)  # a norm behind it goes on from there
        branch.node = first.grad_fn if before is None else before.node

    def enters(module: nn.Module, args: tuple[Any, ...]) -> Any:
        if branch.node is None or not args or not isinstance(args[0], Tensor) or branch.is_given(args[0]):
            return None
        x, node, branch.node = args[0], branch.node, None
        if not torch.is_grad_enabled() or not _depends(x, node):
            return None
        site.refuse_other_tokens(x, shape)
        return (_read_whole(x, partial(_write, site, sink, Reading(), shape)), *args[1:])

    inside = {*attention.module.modules(), *mlp.module.modules()}
    outside = [norm for norm in norms(layer.module) if norm not in inside]
    # a pre-hook has a norm called as a module where a fused layer would run it together with the sum before it
    return [
        attention.module.register_forward_hook(leaves),
        *(part.register_forward_pre_hook(enters) for part in (*outside, mlp.module)),
    ]


def _read_whole(x: Tensor, write: Callable[[Tensor, Tensor], None]) -> Tensor:
    """`x` for one of those that read it, such that `write` gets the gradient from all of them, and `x`."""
    kept: list[Tensor] = []

    def keep(gradient: Tensor, x: Tensor) -> None:
        kept.append(x)

    def all_of_it(gradient: Tensor) -> None:
        if kept:  # empty where nothing came back through the branch
            write(gradient.detach(), kept.pop())

    branch = reading(x, (x,), keep)
    x.register_hook(all_of_it)
    return branch


def _write(site: Site, sink: Sink, owner: Reading, shape: torch.Size, c_x: Tensor, x: Tensor) -> None:
    if owner.live:
        sink.write(site, owner, rules.relevance(x.reshape(*shape, -1), c_x.reshape(*shape, -1)))


def _depends(x: Tensor, node: Any) -> bool:
    """Whether autograd has `x` come from a node."""
    first, todo, seen = node._sequence_nr(), [x.grad_fn], set()
    while todo:
        one = todo.pop()
        if one is None or one in seen or one._sequence_nr() < first:  # made before it
            continue
        if one == node:
            return True
        seen.add(one)
        todo += [parent for parent, _ in one.next_functions]
    return False
