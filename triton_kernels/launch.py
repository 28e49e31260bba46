"""How a kernel is started: on its tensors' device, over rows of adjacent numbers, and with an error that names it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

__all__ = ["launch", "rows"]


def launch(
    kernel: Any, grid: Sequence[int], arguments: Sequence[Any], constants: dict[str, Any], warps: int = 4
) -> None:
    """Run `kernel` once for each point of `grid`; a grid without points runs nothing.

    Args:
        kernel: made by triton.jit.
        grid: programs along up to three axes.
        arguments: tensors, the first of them on the device that everything runs on, and numbers.
        constants: those known when it is compiled.
        warps: of 32 threads each, per program.

    Raises:
        RuntimeError: the kernel can't be compiled or started.
    """
    if 0 in grid:
        return
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    with torch.cuda.device_of(tensors[0]):  # triton takes the current device, which need not be theirs
        try:
            kernel[tuple(grid)](*arguments, **constants, num_warps=warps)
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
