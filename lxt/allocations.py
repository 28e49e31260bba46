"""What a run would allocate and compute, by running it on tensors without numbers.

torch's fake tensors have a shape, a dtype and a device; operations on them take microseconds and no memory, and go
through autograd, rules, hooks and checkpointing like any others. `Allocations` sees each of these operations: it adds
up what is alive on every device, as long as it is alive, and counts the floating point operations and the bytes moved.
Experts get their tokens in turn: which ones a router would choose can't be known without numbers.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from lxt.accelerate_hooks import computing_device, loading_hooks

__all__ = ["Allocations", "fakes", "standing_in"]

aten = torch.ops.aten


def fakes() -> FakeTensorMode:
    """Makes fake tensors: `with fakes: torch.empty(...)`. Operations that meet one give fake ones outside of it too."""
    return FakeTensorMode(allow_non_fake_inputs=True)


class Allocations(TorchDispatchMode):
    """Meanwhile everything that operations allocate is accounted for.

    Attributes:
        live: bytes alive by device.
        peak: the most that were alive at once, by device.
        flops: floating point operations of matrix products, convolutions and attention.
        moved: bytes that all other operations read and wrote.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[torch.device, int] = defaultdict(int)
        self.peak: dict[torch.device, int] = defaultdict(int)
        self.flops = self.moved = 0
        self._known: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

    def add(self, tensor: Tensor) -> None:
        """Count what holds the tensor's numbers, until it is freed; once, however many tensors share it."""
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        device, count = tensor.device, storage.nbytes()
        self._known[storage] = weakref.finalize(storage, self._free, device, count)
        self.live[device] += count
        self.peak[device] = max(self.peak[device], self.live[device])

    def _free(self, device: torch.device, count: int) -> None:
        self.live[device] -= count

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        out = _grouped_product(*args, **kwargs) if _is_grouped(func, args) else func(*args, **kwargs)
        if func is aten.topk.default and isinstance(out[1], FakeTensor):
            out = _in_turn(out[0], out[1], args[0], args[2] if len(args) > 2 else -1)
        theirs = {tensor.untyped_storage()._cdata for tensor in given}
        made = [value for value in tree_leaves(out) if isinstance(value, Tensor)]
        own = [tensor for tensor in made if tensor.untyped_storage()._cdata not in theirs]
        for tensor in own:
            self.add(tensor)
        packet = func._overloadpacket
        if packet in _FLOPS:
            self.flops += _FLOPS[packet](*args, **kwargs, out_val=out)
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=out)
        elif own or func._schema.is_mutable:
            self.moved += sum(tensor.numel() * tensor.element_size() for tensor in (*given, *own))
        return out


@contextmanager
def standing_in(model: nn.Module, mode: FakeTensorMode) -> Iterator[None]:
    """Meanwhile weights that are on the meta device are fake ones where they would compute, and no file is read.

    Afterwards the modules have the attributes that they had: some keep a state of their last forward.
    """
    with ExitStack() as undo:
        for module in model.modules():
            weights: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for held in (vars(module), *weights):
                undo.callback(_put_back, held, dict(held))
            device = computing_device(module)
            if loading_hooks(module):
                module._hf_hook = _Passive()  # type: ignore[assignment]
            for held in weights:
                for name, tensor in held.items():
                    if tensor is not None and tensor.is_meta:
                        with mode:
                            held[name] = torch.empty(  # pyright: ignore[reportArgumentType]
                                tensor.shape, dtype=tensor.dtype, device=device
                            )
        yield


def _put_back(held: dict[str, Any], before: dict[str, Any]) -> None:
    for name in held.keys() - before.keys():
        del held[name]
    for name, value in before.items():
        if name not in held or held[name] is not value:
            held[name] = value


class _Passive:
    """In the place of accelerate's hook: loads nothing and moves nothing."""

    no_grad = False

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return output


def _in_turn(values: Tensor, indices: Tensor, x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """What a top-k gives, with indices that are numbers: models decide by a router's which experts run."""
    turns = torch.arange(indices.numel(), device=indices.device) % x.shape[dim]
    return values, turns.view(indices.shape)


def _is_grouped(func: Any, args: tuple[Any, ...]) -> bool:
    return func is aten._grouped_mm.default and isinstance(args[0], FakeTensor)


def _grouped_product(a: Tensor, b: Tensor, offs: Tensor | None = None, *rest: Any, **options: Any) -> Tensor:
    """Its shape: torch's own function for that refuses what the CPU computes."""
    return a.new_empty(_grouped_shape(a.shape, b.shape, 0 if offs is None else len(offs)))


def _grouped_shape(a: torch.Size, b: torch.Size, groups: int) -> tuple[int, ...]:
    if len(a) == len(b):
        return (groups, a[0], b[1]) if len(a) == 2 else (a[0], a[1], b[2])
    return a[-2], b[-1]


def _grouped_flops(a: Tensor, b: Tensor, *rest: Any, **options: Any) -> int:
    if a.dim() == b.dim() == 2:
        return 2 * a.shape[0] * a.shape[1] * b.shape[1]
    return 2 * prod(a.shape) * b.shape[-1] if a.dim() == 2 else 2 * a.shape[-2] * prod(b.shape)


def _attention_flops(products: int, start: int) -> Callable[..., int]:
    """Of so many matrix products with the scores; the kernels leave out the future, half of it, where they may."""

    def count(*args: Any, out_val: Any = None, **options: Any) -> int:
        query, key = args[start], args[start + 1]
        causal = options.get("is_causal", any(value is True for value in args[start + 3 :]))
        return products * 2 * query.numel() * key.shape[-2] // (2 if causal else 1)

    return count


# The CPU's, which torch's own counter doesn't know; its other formulas stay.
_FLOPS: dict[Any, Callable[..., int]] = {
    aten._grouped_mm: _grouped_flops,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops(2, 0),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_flops(5, 1),
}
