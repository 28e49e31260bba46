"""How a kernel is started: on its tensors' device, over rows of adjacent numbers, and with an error that names it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import triton
from torch import Tensor

__all__ = ["configured", "launch", "rows"]

_CHANGED: dict[Any, dict[str, int | bool]] = {}  # of every thread: the backward runs in threads of autograd's own


@contextmanager
def configured(kernel: Any, **changes: int | bool) -> Iterator[None]:
    """Meanwhile `kernel` runs with other constants, num_warps or num_stages; for measuring, never in a rule.

    Args:
        kernel: made by triton.jit, as `lxt.triton_kernels.value_attention.value_kernel`.
        changes: of its constants in capitals, num_warps, num_stages.
    """
    before = _CHANGED.get(kernel)
    _CHANGED[kernel] = {**(before or {}), **changes}
    try:
        yield
    finally:
        if before is None:
            del _CHANGED[kernel]
        else:
            _CHANGED[kernel] = before


def launch(
    kernel: Any,
    grid: Callable[[dict[str, Any]], Sequence[Any]],
    arguments: Sequence[Any],
    constants: dict[str, Any],
    warps: int = 4,
) -> None:
    """Run `kernel` once for each point of the grid; a grid without points runs nothing.

    Args:
        kernel: made by triton.jit.
        grid: constants -> programs along up to three axes, of which only the first may pass 65,535.
        arguments: tensors, the first of them on the device that everything runs on, and numbers.
        constants: those known when it is compiled, and the compiler's options.
        warps: of 32 threads each, per program.

    Raises:
        RuntimeError: the kernel can't be compiled or started.
        ValueError: `configured` changes what the kernel doesn't have.
    """
    changes = _CHANGED.get(kernel, {})
    options = {**constants, "num_warps": warps}
    if unknown := changes.keys() - options.keys() - {"num_stages"}:
        raise ValueError(
            f"{kernel.__name__} has no {', '.join(sorted(unknown))}; there are {', '.join(options)}, num_stages"
        )
    options |= changes
    sizes = tuple(grid(options))
    if 0 in sizes:
        return
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    with torch.cuda.device_of(tensors[0]):  # triton takes the current device, which need not be theirs
        try:
            kernel[sizes](*arguments, **options)
        except Exception as error:
            got = ", ".join(f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" for x in tensors)
            raise RuntimeError(
                f"the kernel {kernel.__name__} failed on {tensors[0].device} with {got} (triton {triton.__version__}): "
                f"{error}; LXT_KERNELS=off in the environment runs the rules without kernels"
            ) from error


def rows(x: Tensor) -> Tensor:
    """The same numbers as [row, hidden] with adjacent columns: a view where the strides allow it, else a copy."""
    x = x.reshape(-1, x.shape[-1]) if x.numel() else x.reshape(0, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()
