"""Float64: keeps a model of transformers in float64 where its code casts to float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Float64"]


class Float64(TorchFunctionMode):
    """Casts of a float64 tensor to float32 are left out: norms, rotary embeddings, softmaxes and scans make them.

    Enter it around the forward, outside of any patch. Without it a float64 model has float32 statistics, and no two
    computations of its relevance agree better than 1e-7.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        wide = bool(args) and isinstance(args[0], Tensor) and args[0].dtype == torch.float64
        if wide and func is Tensor.float:
            return args[0]
        if wide:
            args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
            kwargs = {name: torch.float64 if arg is torch.float32 else arg for name, arg in kwargs.items()}
        if func in _PRODUCTS and len({arg.dtype for arg in args if isinstance(arg, Tensor)}) > 1:
            # frequencies, or a table, and positions: these were integers and became float32
            args = tuple(arg.to(torch.float64) if isinstance(arg, Tensor) else arg for arg in args)
        if func is Tensor.mul and _overflows(args[1]):
            args = (args[0].to(torch.float64), args[1])  # float32 would make infinity of a mask's number, and NaN of 0
        if func is torch.full and "dtype" not in kwargs and any(map(_overflows, args[1:2])):
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


def _overflows(number: Any) -> bool:
    return isinstance(number, float) and torch.finfo(torch.float32).max < abs(number) < float("inf")


_PRODUCTS = (
    Tensor.matmul, Tensor.__matmul__, torch.matmul, torch.bmm, Tensor.bmm, torch.nn.functional.grid_sample,
    torch.grid_sampler,
)  # fmt: skip
