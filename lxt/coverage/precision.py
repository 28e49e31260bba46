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
            # frequencies times positions: these were integers and became float32
            args = tuple(arg.to(torch.float64) if isinstance(arg, Tensor) else arg for arg in args)
        if func is Tensor.mul and isinstance(args[1], float) and abs(args[1]) > torch.finfo(torch.float32).max:
            args = (args[0].to(torch.float64), args[1])  # float32 would make infinity of a mask's number, and NaN of 0
        return func(*args, **kwargs)


_PRODUCTS = (Tensor.matmul, Tensor.__matmul__, torch.matmul, torch.bmm, Tensor.bmm)
