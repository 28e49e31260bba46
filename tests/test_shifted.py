"""A number added to an activation: a constant as a factor and under functions, a bias in linear maps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lxt.audit import audit
from lxt.composites import ATTN_LRP, CP_LRP, GRADIENT, Composite
from lxt.mode import RuleMode


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


A, B, C = numbers(3, 3, seed=0), numbers(3, 3, seed=1), numbers(3, 3, seed=2)
Function = Callable[[Tensor, Tensor], Tensor]


class Written(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.function(a, b) * C


def by_engine(function: Function, rules: Composite) -> tuple[Tensor, Tensor]:
    """The relevance of a and b."""
    a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
    with RuleMode(rules):
        y = Written(function)(a, b)
    gradients = torch.autograd.grad(y.sum(), (a, b), materialize_grads=True, allow_unused=True)
    return A * gradients[0], B * gradients[1]


def written_in_place(a: Tensor, b: Tensor) -> Tensor:
    factor = a * 1.0
    factor += 1
    return factor.mul_(b)


NOTHING = torch.zeros_like(A)
AS_FACTOR: dict[str, tuple[Function, Tensor, Tensor]] = {  # function, relevance of a and of b
    "(a + 1) b": (lambda a, b: (a + 1) * b, NOTHING, (A + 1) * B * C),
    "b (2 - a)": (lambda a, b: b * (2 - a), NOTHING, (2 - A) * B * C),
    "behind views and constant factors": (lambda a, b: ((a + 1) / 2).mT * b, NOTHING, (A.mT + 1) / 2 * B * C),
    "in place": (written_in_place, NOTHING, (A + 1) * B * C),
    "a matrix product": (lambda a, b: (a + 1) @ b, NOTHING, B * ((A + 1).mT @ C)),
    "einsum": (lambda a, b: torch.einsum("ij,jk->ik", a + 1, b), NOTHING, B * ((A + 1).mT @ C)),
    "the factors of addmm": (
        lambda a, b: torch.addmm(a + 1, a + 1, b),  # its summand is none
        A * C,
        B * ((A + 1).mT @ C),
    ),
    "under a function": (lambda a, b: F.silu(a + 1) + b, NOTHING, B * C),
    "under a power": (lambda a, b: (a + 1) ** 2 + b, NOTHING, B * C),
}
AS_BIAS: dict[str, tuple[Function, Tensor, Tensor]] = {
    "a linear layer": (lambda a, b: F.linear(2 * (a - 0.5), C) + b, A * 2 * (C @ C), B * C),
    "a sum": (lambda a, b: a + 1 + b, A * C, B * C),
    "a mean": (lambda a, b: (a + 1).mean(0, keepdim=True) + b, A * C.mean(0), B * C),
}


@pytest.mark.parametrize("rules", [ATTN_LRP, CP_LRP], ids=lambda rules: rules.name)
@pytest.mark.parametrize("name", [*AS_FACTOR, *AS_BIAS])
def test_shifted_activations(name: str, rules: Composite) -> None:
    function, *expected = (AS_FACTOR | AS_BIAS)[name]
    audited = audit(Written(function), {"a": A, "b": B}, torch.sum, rules, wrt=("a", "b"))
    for found, other, wanted in zip(by_engine(function, rules), audited.relevance.values(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(other, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", [*AS_FACTOR, *AS_BIAS])
def test_the_gradient_stays_the_gradient(name: str) -> None:
    function = (AS_FACTOR | AS_BIAS)[name][0]
    a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
    plain = torch.autograd.grad(Written(function)(a, b).sum(), (a, b))
    for found, value, gradient in zip(by_engine(function, GRADIENT), (A, B), plain, strict=True):
        torch.testing.assert_close(found, value * gradient, rtol=1e-12, atol=1e-14)


def test_two_shifted_factors_share() -> None:
    # neither is more of a gate than the other
    found = by_engine(lambda a, b: (a + 1) * (b + 1), ATTN_LRP)
    torch.testing.assert_close(found[0], A * (B + 1) * C / 2, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found[1], B * (A + 1) * C / 2, rtol=1e-12, atol=1e-14)
