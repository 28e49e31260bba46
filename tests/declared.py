"""Things to declare, each with a twin in torch's own operations, and a layer that holds them."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

import lxt
from lxt.declarations import declared_operations


def kernel(function):
    """`function` as an autograd function whose insides nobody sees, with the right derivative."""
    count = function.__code__.co_argcount

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            ctx.save_for_backward(*inputs)
            return function(*inputs)

        @staticmethod
        def backward(ctx, gradient):
            with torch.enable_grad():
                inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
                return torch.autograd.grad(function(*inputs), inputs, gradient)

    arguments = ", ".join(function.__code__.co_varnames[:count])
    names = {"Kernel": Kernel}
    exec(f"def call({arguments}):\n    return Kernel.apply({arguments})", names)
    return names["call"]


def attention(query, key, value):
    return (query @ key.mT).softmax(-1) @ value


def swiglu(gate, up):
    return F.silu(gate) * up


def rms(x):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * torch.arange(1.0, 5.0, dtype=x.dtype)


def some(*shapes, dtype=torch.float64):
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def assert_same(found, expected):
    # products of a few float64 numbers
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


class Mixer(nn.Module):
    """A layer around whatever there is to declare; the same, in torch's operations, is its twin."""

    def __init__(self, attend, activate=F.silu, norm=rms):
        super().__init__()
        torch.manual_seed(1)
        self.q, self.k, self.v, self.up, self.out = (nn.Linear(4, 4, bias=False) for _ in range(5))
        self.attend, self.activate, self.norm = attend, activate, norm
        self.double()

    def forward(self, x):
        x = x + self.attend(self.q(x), self.k(x), value=self.v(x))
        return x + self.out(self.activate(self.up(x)) * self.norm(x))


class Attend(nn.Module):
    """A module of which one may declare the class or the instance."""

    def __init__(self):
        super().__init__()
        self.inner = ACT2FN["silu"]  # has a rule of its own, which must not hold in here
        self.call = kernel(attention)

    def forward(self, query, key, value):
        return self.call(self.inner(query), key, value)

    @staticmethod
    def written(query, key, value):
        return attention(F.silu(query), key, value)


class FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value):
        ctx.save_for_backward(query, key, value)
        return attention(query, key, value)

    @staticmethod
    def backward(ctx, gradient):
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            return torch.autograd.grad(attention(*inputs), inputs, gradient)


def fused(query, key, value):
    return FusedAttention.apply(query, key, value)


@torch.library.custom_op("lxt_tests::attention", mutates_args=())
def operation(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return attention(query, key, value)


def _backward(ctx, gradient):
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        return torch.autograd.grad(attention(*inputs), inputs, gradient)


operation.register_autograd(_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def of_the_patched(model, rules, x):
    with lxt.monkey_patch(model, rules):
        y = model(x)
    return y, torch.autograd.grad(y[-1].sum(), x)[0]


def masked(query, key, value, mask):
    return (query @ key.mT + mask).softmax(-1) @ value


@contextmanager
def undoing():
    """Declares in place, and takes everything off again."""
    things = []

    def declare(thing, rule):
        things.append(thing)
        return lxt.declare(thing, rule)

    yield declare
    for thing in things:
        lxt.declare(thing, None)
    assert not declared_operations()
    assert "apply" not in vars(FusedAttention)
