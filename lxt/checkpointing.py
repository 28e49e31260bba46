"""Gradient checkpointing of a model's layers, whatever its architecture, training flag and transformers' own settings.

"layer"     keeps the input of every layer. The backward runs each layer a second time.
"nested"    keeps the input of every √N-th layer. When the backward enters such a segment, the inputs of its other
            layers are computed from the kept one, and then each layer runs again as above: √N + √N of them instead
            of N, for one more forward in all.

The last layer is left alone: its backward comes first, so what it saves is gone before another layer runs again. So
are, for the same reason, the inputs within the last segment. The layers' own forwards are exchanged, and checkpointed
by torch without re-entry; what torch would keep of the hidden states is replaced by how to get them (`Segment.read`).
A state that something changed between two layers starts a segment of its own, which costs memory and no more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, get_device_states, set_device_states

from lxt.swapping import swap_forward

__all__ = ["CHECKPOINTS", "Checkpoint", "Reader", "carry", "checkpointed", "saved_as", "segment_length"]

Checkpoint = Literal["off", "layer", "nested"]
CHECKPOINTS: tuple[Checkpoint, ...] = ("off", "layer", "nested")

Reader = Callable[[], Tensor]
"""Gives a hidden state again, detached."""

_STATE = "_lxt_state"


@contextmanager
def checkpointed(streams: Sequence[Sequence[nn.Module]], how: Checkpoint, offload: bool = True) -> Iterator[None]:
    """Meanwhile the layers are checkpointed, in eval mode too; results are equal to the last bit.

    To be entered after `monkey_patch`, so that what is recomputed is the patched forward.

    Args:
        streams: the layers of each residual stream, in order: one for a decoder, two for an encoder-decoder.
        how: one of CHECKPOINTS.
        offload: keep the states of a GPU in the CPU's memory.
    """
    with ExitStack() as undo:
        if how != "off":
            for layers in streams:
                stream = _Stream(layers, how, offload)
                for layer in dict.fromkeys(layers):
                    undo.callback(swap_forward(layer, stream.wrap))
        yield


def segment_length(layers: int) -> int:
    """How many layers "nested" computes from one kept state: √N, rounded up."""
    return math.isqrt(max(layers - 1, 0)) + 1


def saved_as(x: Tensor) -> saved_tensors_hooks | None:
    """Around a function that saves the state `x` for its backward: it is read anew there instead of kept."""
    state = _state_of(x)
    return None if state is None else _instead_of(x, state.read)


def carry(x: Tensor, y: Tensor) -> Tensor:
    """`y`, known as the state that `x` is; for functions that return their input as another tensor."""
    state = _state_of(x)
    if state is not None:
        _remember(y, state)
    return y


class _State:
    """The input of a layer: the `index`-th of its segment."""

    def __init__(self, segment: Segment, position: int, index: int) -> None:
        self.segment, self.position, self.index = segment, position, index

    def read(self) -> Tensor:
        return self.segment.read(self.index)


class Segment:
    """Some layers in a row: the input of the first is kept, those of the others are computed from it when read."""

    def __init__(self, start: Tensor, offload: bool) -> None:
        self.device, self.version = start.device, start._version
        self.start = _on_cpu(start.detach()) if offload and start.is_cuda else start.detach()
        self.calls: list[Callable[[Tensor], Any]] = []
        self._found: dict[int, Tensor] = {}

    def read(self, index: int) -> Tensor:
        """The input of the segment's layer `index`.

        The backward comes from above, so those above it have been read.

        Raises:
            RuntimeError: the kept one was changed in place meanwhile.
        """
        for above in [place for place in self._found if place > index]:
            del self._found[above]
        if index == 0:
            if self.start.device == self.device and self.start._version != self.version:
                raise RuntimeError(
                    "the input of a checkpointed layer was changed in place after the layer ran, so the layer can't "
                    "run again; use checkpoint='off', or take the hook out that changes it"
                )
            return self.start.to(self.device, non_blocking=True)
        if index not in self._found:
            state = self.read(0)
            for place, call in enumerate(self.calls[:index], start=1):
                state = self._found[place] = _again(call, state)
        return self._found[index]


class _Stream:
    """The layers that hand on one hidden state."""

    def __init__(self, layers: Sequence[nn.Module], how: Checkpoint, offload: bool) -> None:
        self._places = {layer: place for place, layer in reversed(list(enumerate(layers)))}
        self._last, self._offload = len(layers) - 1, offload
        self._length = 1 if how == "layer" else segment_length(len(layers))

    def wrap(self, previous: Callable) -> Callable:
        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            hidden, rest, named = _split(args, kwargs)
            if hidden is None or not torch.is_grad_enabled() or not hidden.requires_grad:
                return previous(module, *args, **kwargs)

            def call(hidden: Tensor) -> Any:
                return previous(module, hidden, *rest, **named)

            state = self._entered(module, hidden)
            again = None if self._is_kept(state.position + 1, hidden) else _repeatable(call, hidden)
            if state.position == self._last:
                output = call(hidden)
            else:
                with _instead_of(hidden, state.read):
                    output = checkpoint(call, hidden, use_reentrant=False)
            self._left(state, again, output)
            return output

        return forward

    def _entered(self, module: nn.Module, hidden: Tensor) -> _State:
        state = _state_of(hidden)
        if state is None:
            return _State(Segment(hidden, self._offload), self._places[module], 0)
        return state

    def _left(self, state: _State, again: Callable[[Tensor], Any] | None, output: Any) -> None:
        first = output if isinstance(output, Tensor) else output[0]
        position = state.position + 1
        if not isinstance(first, Tensor) or not first.requires_grad:
            return
        if again is None:
            _remember(first, _State(Segment(first, self._offload), position, 0))
        else:
            state.segment.calls.append(again)
            _remember(first, _State(state.segment, position, state.index + 1))

    def _is_kept(self, position: int, hidden: Tensor) -> bool:
        """Whether the state at this position is kept, and not computed from one before it."""
        if torch.is_autocast_enabled(hidden.device.type):  # a replay would run without it
            return True
        return position % self._length == 0 or position >= self._last // self._length * self._length


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor | None, tuple[Any, ...], dict[str, Any]]:
    """The hidden state that a layer is called with, and its other arguments."""
    if args:
        return (args[0] if isinstance(args[0], Tensor) else None), args[1:], kwargs
    named = dict(kwargs)
    hidden = named.pop("hidden_states", None)
    return (hidden if isinstance(hidden, Tensor) else None), (), named


def _repeatable(call: Callable[[Tensor], Any], hidden: Tensor) -> Callable[[Tensor], Any]:
    """`call` with the random numbers that come next now, which a user's hook may draw in it."""
    devices, states = get_device_states(hidden)
    state = torch.get_rng_state()

    def replay(hidden: Tensor) -> Any:
        with torch.random.fork_rng(devices):
            torch.set_rng_state(state)
            set_device_states(devices, states)
            return call(hidden)

    return replay


def _again(call: Callable[[Tensor], Any], state: Tensor) -> Tensor:
    """What a layer gives, as in the forward: with gradients on, since kernels may differ, but nothing saved."""
    with torch.enable_grad(), saved_tensors_hooks(_drop, _dropped):
        output = call(state.detach().requires_grad_())
    return (output if isinstance(output, Tensor) else output[0]).detach()


def _drop(tensor: Tensor) -> None:
    return None


def _dropped(nothing: None) -> Tensor:
    raise RuntimeError("a backward through a layer that ran only for its output")


def _instead_of(x: Tensor, read: Reader) -> saved_tensors_hooks:
    """Has autograd save how to read `x` in place of `x`; other tensors are saved as they are."""
    key = _identity(x)  # x is alive inside, so no other tensor is at its address

    def pack(tensor: Tensor) -> Any:
        return read if _identity(tensor) == key else tensor

    def unpack(packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed()

    return saved_tensors_hooks(pack, unpack)


def _identity(x: Tensor) -> tuple[Any, ...]:
    return x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride(), x.dtype


def _remember(x: Tensor, state: _State) -> None:
    setattr(x, _STATE, (state, x._version))


def _state_of(x: Tensor) -> _State | None:
    state, version = getattr(x, _STATE, (None, 0))
    return state if version == x._version else None


def _on_cpu(x: Tensor) -> Tensor:
    kept = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=True)
    return kept.copy_(x, non_blocking=True)
