"""The identity rule of an element-wise activation: c_x = (f(x) / x) c_y (AttnLRP, arXiv 2402.05602, eq. 9).

1. Forward: the function itself, as it is, so that the output is the model's to the last bit.
2. Backward: one pass that reads x and c_y and writes c_x; f(x) / x lives in registers, in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lxt.triton_kernels.activations import coefficient as form
from lxt.triton_kernels.launch import launch

__all__ = ["BLOCK", "identity"]

BLOCK = 1024  # 8 numbers per thread of 4 warps: one 16-byte load in 16 bits, two in 32


@triton.jit
def backward_kernel(c_x, x, c_y, size, FORM: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    value = tl.load(x + i, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(c_y + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(c_x + i, (c * form(value, FORM)).to(c_x.dtype.element_ty), mask=inside)


class _Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor], coefficient: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.coefficient = coefficient
        return function(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, c_y: Tensor) -> tuple[Tensor, None, None]:
        x = ctx.saved_tensors[0].contiguous()
        c_x = torch.empty_like(x)
        constants = {"FORM": ctx.coefficient, "BLOCK": BLOCK}
        arguments = [c_x, x, c_y.contiguous(), x.numel()]
        launch(backward_kernel, lambda meta: [triton.cdiv(x.numel(), meta["BLOCK"])], arguments, constants)
        return c_x, None, None


def identity(x: Tensor, function: Callable[[Tensor], Tensor], coefficient: str) -> Tensor:
    """The twin of lxt.rules.identity.

    Args:
        x: any shape.
        function: the forward, run as it is.
        coefficient: one of lxt.triton_kernels.activations.FORMS.
    """
    return _Identity.apply(x, function, coefficient)
