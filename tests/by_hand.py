"""Compares a function under the operator mode with the same function whose constants are detached by hand."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from lxt.composites import ATTN_LRP, Composite
from lxt.mode import RuleMode

Function = Callable[..., Tensor]
ROWS, COLUMNS = 3, 4
CONSTANT = torch.linspace(-1, 2, ROWS * COLUMNS, dtype=torch.float64).view(ROWS, COLUMNS)


def leaves(count: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (count, ROWS, COLUMNS)
    return [x.requires_grad_() for x in torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)]


def share(x: Tensor, factor: float) -> Tensor:
    """`x`, whose gradient arrives multiplied by `factor`."""
    return x * factor + (x * (1 - factor)).detach()


def gradients(y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    c_y = torch.linspace(0.5, 2, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    zero = [torch.zeros_like(x) for x in inputs]
    if not y.requires_grad:
        return zero
    once = torch.autograd.grad(y, inputs, c_y, retain_graph=True, allow_unused=True)
    twice = torch.autograd.grad(y, inputs, c_y, allow_unused=True)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(once, twice, strict=True))
    return [z if g is None else g for g, z in zip(once, zero, strict=True)]


def agree(function: Function, by_hand: Function, composite: Composite = ATTN_LRP, inputs: list[Tensor] | None = None):
    """The forward is that of the plain function, the gradients under the mode are those of `by_hand` without it."""
    inputs = leaves(by_hand.__code__.co_argcount) if inputs is None else inputs
    with RuleMode(composite):
        y = function(*inputs)
    assert torch.equal(y, function(*inputs))
    for actual, expected in zip(gradients(y, inputs), gradients(by_hand(*inputs), inputs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-13)


def share_product(a: Tensor, b: Tensor) -> Tensor:
    return share(a, 0.5) * share(b, 0.5)


def share_matmul(a: Tensor, b: Tensor) -> Tensor:
    return share(a, 0.5) @ share(b, 0.5).T


def ratio_silu(a: Tensor) -> Tensor:
    return a * torch.sigmoid(a).detach()


def ratio_tanh(a: Tensor) -> Tensor:
    return a * (torch.tanh(a) / a).detach()


def ratio_relu(a: Tensor) -> Tensor:
    return a * (F.relu(a) / a).detach()


def eager_attention_without_dropout(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.T).softmax(-1) @ v
