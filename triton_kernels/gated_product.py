"""activation(gate) * up with the uniform rule on the product (AttnLRP, arXiv 2402.05602, eq. 7) and identity on f.

 1. Forward: the activation and the product as the model has them. With `exact=False` both are one kernel, which may
    differ from the model's in the last bit, as its exp does from the GPU library's.
 2. Backward: one pass reads gate, up and c_y and writes c_gate = f(gate)/gate * up * c_y / 2 and
    c_up = f(gate) * c_y / 2; the eager twin takes eleven for SiLU.
 3. With `stop_gate` (CP-LRP, arXiv 2202.07304) the backward is one product with the saved f(gate): torch's own.
f(gate) is rounded to the gate's dtype before it meets another factor, as the model rounds it.
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
from lxt.triton_kernels.launch import launch, rows

__all__ = ["BLOCK", "gated_product"]

BLOCK = 1024  # 8 numbers per thread of 4 warps, as in identity.py


@triton.jit
def forward_kernel(
    y, f, gate, up, gate_stride, up_stride, hidden, FORM: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < hidden
    g = tl.load(gate + row * gate_stride + i, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + i, mask=inside, other=0.0).to(tl.float32)
    activated = (g * form(g, FORM)).to(gate.dtype.element_ty)
    if KEEP:
        tl.store(f + row * hidden + i, activated, mask=inside)
    tl.store(y + row * hidden + i, (activated.to(tl.float32) * u).to(y.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    c_gate, c_up, gate, up, c_y, gate_stride, up_stride, c_stride, hidden, FORM: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < hidden
    g = tl.load(gate + row * gate_stride + i, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + i, mask=inside, other=0.0).to(tl.float32)
    half = 0.5 * tl.load(c_y + row * c_stride + i, mask=inside, other=0.0).to(tl.float32)
    ratio = form(g, FORM)
    activated = (g * ratio).to(gate.dtype.element_ty).to(tl.float32)
    out = row * hidden + i
    tl.store(c_gate + out, (half * (ratio * u)).to(c_gate.dtype.element_ty), mask=inside)
    tl.store(c_up + out, (half * activated).to(c_up.dtype.element_ty), mask=inside)


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        activation: Callable[[Tensor], Tensor],
        coefficient: str,
        stop_gate: bool,
        exact: bool,
    ) -> Tensor:
        if exact:
            activated = activation(gate)
            y = activated * up
        else:
            y, activated = _forward(gate, up, coefficient, stop_gate)
        ctx.stop_gate, ctx.coefficient = stop_gate, coefficient
        ctx.save_for_backward(*((activated,) if stop_gate else (gate, up)))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, c_y: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.stop_gate:
            (activated,) = ctx.saved_tensors
            return None, c_y * activated, None, None, None, None
        gate, up = ctx.saved_tensors
        c_gate, c_up = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (gate, up))
        g, u, c = rows(gate), rows(up), rows(c_y)
        arguments = [c_gate, c_up, g, u, c, g.stride(0), u.stride(0), c.stride(0), g.shape[1]]
        constants = {"FORM": ctx.coefficient, "BLOCK": BLOCK}
        launch(backward_kernel, lambda meta: [len(g), triton.cdiv(g.shape[1], meta["BLOCK"])], arguments, constants)
        return c_gate, c_up, None, None, None, None


def _forward(gate: Tensor, up: Tensor, coefficient: str, keep: bool) -> tuple[Tensor, Tensor]:
    """The product, and f(gate) if it is to be kept."""
    y = torch.empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype), device=gate.device)
    activated = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) if keep else y
    g, u = rows(gate), rows(up)
    constants = {"FORM": coefficient, "KEEP": keep, "BLOCK": BLOCK}
    arguments = [y, activated, g, u, g.stride(0), u.stride(0), g.shape[1]]
    launch(forward_kernel, lambda meta: [len(g), triton.cdiv(g.shape[1], meta["BLOCK"])], arguments, constants)
    return y, activated


def gated_product(
    gate: Tensor,
    up: Tensor,
    activation: Callable[[Tensor], Tensor],
    coefficient: str,
    stop_gate: bool = False,
    exact: bool = True,
) -> Tensor:
    """The twin of lxt.rules.gated_product, for gate and up of one shape.

    Args:
        gate: [..., d_mlp], before the activation.
        up: [..., d_mlp]
        activation: the forward, run as it is if `exact`.
        coefficient: one of lxt.triton_kernels.activations.FORMS.
        stop_gate: CP-LRP: the gate is a constant.
        exact: whether the output must be the model's to the last bit.
    """
    return _GatedProduct.apply(gate, up, activation, coefficient, stop_gate, exact)
