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


# linear attention, as in "Transformers are RNNs" (arXiv 2006.16236): the values take all, the rest is a constant
Q, K, V, X = (numbers(2, 5, 3, seed=seed) for seed in range(3, 7))
CAUSAL = torch.ones(5, 5).tril().bool()


def phi(x: Tensor) -> Tensor:
    return F.elu(x) + 1


def scores(q: Tensor, k: Tensor) -> Tensor:
    return phi(q) @ phi(k).mT


def by_sum(a: Tensor) -> Tensor:
    return a / a.sum(-1, keepdim=True)


def recurrent(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state = torch.einsum("bnd,bne->bnde", phi(k), v).cumsum(1)
    return torch.einsum("bnd,bnde->bne", phi(q), state) / (phi(q) * phi(k).cumsum(1)).sum(-1, keepdim=True)


LINEAR_ATTENTION: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "plain": lambda q, k, v: scores(q, k) @ v,
    "the values first": lambda q, k, v: phi(q) @ (phi(k).mT @ v),
    "einsum": lambda q, k, v: torch.einsum("bnd,bmd,bme->bne", phi(q), phi(k), v),
    "einsum in two": lambda q, k, v: torch.einsum("bnm,bme->bne", torch.einsum("bnd,bmd->bnm", phi(q), phi(k)), v),
    "baddbmm": lambda q, k, v: torch.baddbmm(torch.zeros(2, 5, 5).double(), phi(q), phi(k).mT, beta=0) @ v,
    "masked_fill": lambda q, k, v: scores(q, k).masked_fill(~CAUSAL, 0.0) @ v,
    "masked_fill_": lambda q, k, v: scores(q, k).masked_fill_(~CAUSAL, 0.0) @ v,
    "tril": lambda q, k, v: scores(q, k).tril() @ v,
    "tril_": lambda q, k, v: scores(q, k).tril_() @ v,
    "where": lambda q, k, v: torch.where(CAUSAL, scores(q, k), 0.0) @ v,
    "times a mask": lambda q, k, v: (scores(q, k) * CAUSAL) @ v,
    "times a mask in place": lambda q, k, v: scores(q, k).mul_(CAUSAL) @ v,
    "scaled": lambda q, k, v: (-scores(q, k) / 3 * 0.5) @ v,
    "in parts": lambda q, k, v: torch.cat(scores(q, k).split(2, -1), -1) @ v,
    "padded": lambda q, k, v: F.pad(scores(q, k), (0, 1)) @ F.pad(v, (0, 0, 0, 1)),
    "normalised": lambda q, k, v: by_sum(scores(q, k).tril()) @ v,
    "normalised in place": lambda q, k, v: (a := scores(q, k)).div_(a.sum(-1, keepdim=True)) @ v,
    "keys summed up": lambda q, k, v: phi(q) * phi(k).cumsum(1) * v,
    "the sum of keys": lambda q, k, v: phi(k).sum(1, keepdim=True) * v + phi(q).mean() * v,
    "recurrent": recurrent,
    "three factors": lambda q, k, v: (phi(q) * phi(k) * (torch.tanh(q) - 0.5)) * v,
}


class Attention(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (self.function(q, k, v) * X).sum()


@pytest.mark.parametrize(
    "rules", [CP_LRP, ATTN_LRP, ATTN_LRP.but(attention="value_only")], ids=["cp", "attnlrp", "value_only"]
)
@pytest.mark.parametrize("name", LINEAR_ATTENTION)
def test_the_values_of_a_linear_attention_take_all(name: str, rules: Composite) -> None:
    function = LINEAR_ATTENTION[name]
    v = V.clone().requires_grad_()
    value = Attention(function)(Q, K, v)  # linear in the values, whose relevance is the plain gradient times them
    expected = {"q": torch.zeros_like(Q), "k": torch.zeros_like(K), "v": V * torch.autograd.grad(value, v)[0]}
    inputs = {name: x.clone().requires_grad_() for name, x in zip("qkv", (Q, K, V), strict=True)}
    with RuleMode(rules):
        result = Attention(function)(**inputs)
    gradients = torch.autograd.grad(result, tuple(inputs.values()), materialize_grads=True, allow_unused=True)
    found = {name: (x * g).detach() for (name, x), g in zip(inputs.items(), gradients, strict=True)}
    audited = audit(Attention(function), {"q": Q, "k": K, "v": V}, lambda y: y, rules, wrt=("q", "k", "v"))
    for relevance in (found, audited.relevance):
        torch.testing.assert_close(dict(relevance), expected, rtol=1e-10, atol=1e-12)
        assert sum(r.sum().item() for r in relevance.values()) == pytest.approx(value.item(), rel=1e-10)


def test_a_product_of_shifted_factors_with_another_is_none() -> None:
    # the sum of a shifted product and an activation is not shifted: it shares with b
    function: Function = lambda a, b: ((a + 1) * (a + 2) + b) * b  # noqa: E731
    halves = b_half = B / 2
    first = A * (2 * A + 3) / 2 * halves * C  # the product's own halves: (a+1)/2 and (a+2)/2 of the gradient
    second = (B * b_half + ((A + 1) * (A + 2) + B) * b_half) * C
    audited = audit(Written(function), {"a": A, "b": B}, torch.sum, ATTN_LRP, wrt=("a", "b"))
    for found in (by_engine(function, ATTN_LRP), tuple(audited.relevance.values())):
        torch.testing.assert_close(found[0], first, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(found[1], second, rtol=1e-12, atol=1e-14)


AGREED: dict[str, Function] = {
    "a gate behind a shifted factor": lambda a, b: ((a.flip(0) + 1) * F.silu(a)) * b,
    "a gate behind a divisor": lambda a, b: F.silu(a) / (a.sum(-1, keepdim=True) + 5) * b,
    "shifted queries": lambda a, b: torch.softmax((a + 1) @ b.mT, -1) @ b,
    "shifted values": lambda a, b: torch.softmax(a @ a.mT, -1) @ (b + 1),
    "a router's weights": lambda a, b: (a + 1) * torch.softmax(b, -1),
    "a function of a shifted product": lambda a, b: F.silu((a + 1) * (b + 1)) + b,
    "a linear map of a shifted product": lambda a, b: F.linear((a + 1) @ (b + 1).mT, C) * b,
    "a convolution with a shifted kernel": lambda a, b: F.conv1d(a[None], (b + 1)[:, :, None])[0],
}


@pytest.mark.parametrize("rules", [ATTN_LRP, CP_LRP, ATTN_LRP.but(router="stop")], ids=["attnlrp", "cp", "router"])
@pytest.mark.parametrize("name", AGREED)
def test_the_auditor_agrees_on_where_a_mark_rides(name: str, rules: Composite) -> None:
    audited = audit(Written(AGREED[name]), {"a": A, "b": B}, torch.sum, rules, wrt=("a", "b"))
    for found, other in zip(by_engine(AGREED[name], rules), audited.relevance.values(), strict=True):
        torch.testing.assert_close(found, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("change", [torch.exp_, torch.sigmoid_, lambda v: v.cos_()])
def test_a_part_made_a_constant_in_place_is_one_as_a_factor(change: Callable[[Tensor], Tensor]) -> None:
    def function(a: Tensor, b: Tensor) -> Tensor:
        copy = a * 1.0
        part = copy[:2]
        change(part)
        return torch.cat([part * b[:2], copy[2:] + b[2:]])

    a, b = by_engine(function, ATTN_LRP)
    constant = change(A[:2].clone())
    torch.testing.assert_close(a, torch.cat([torch.zeros_like(A[:2]), A[2:] * C[2:]]), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(b, torch.cat([constant * B[:2], B[2:]]) * C, rtol=1e-12, atol=1e-14)
