"""Each kind of operation under its rule, in every spelling that torch has for it, and the gate of CP."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from by_hand import (
    COLUMNS,
    CONSTANT,
    ROWS,
    Function,
    agree,
    leaves,
    ratio_relu,
    ratio_silu,
    ratio_tanh,
    share,
    share_matmul,
    share_product,
)
from torch import Tensor, nn

from lxt.composites import ATTN_LRP, CP_LRP
from lxt.mode import RuleMode

aten = torch.ops.aten
ONES = torch.ones(ROWS, ROWS, dtype=torch.float64)


def cases(*groups: tuple[Function, dict[str, Function]]):
    """(by hand, its spellings) ... as parameters; a spelling is called what it is called."""
    return pytest.mark.parametrize(
        ("function", "by_hand"),
        [pytest.param(f, by_hand, id=name) for by_hand, spellings in groups for name, f in spellings.items()],
    )


def in_place(change: Callable[..., object], operand: int = 0) -> Function:
    """`change` on a copy of one operand, which it writes into; the result is that copy."""

    def function(*inputs: Tensor) -> Tensor:
        copies = [x * 1.0 if i == operand else x for i, x in enumerate(inputs)]
        change(*copies)
        return copies[operand]

    return function


# -- each kind of operation, in each of its spellings


@cases(
    (
        share_product,
        {
            "a * b": operator.mul,
            "torch.mul": torch.mul,
            "torch.multiply": torch.multiply,
            "method": lambda a, b: a.mul(b),
            "aten": aten.mul.Tensor,
            "aten packet": aten.mul,
            "names": lambda a, b: torch.mul(input=a, other=b),
            "swapped names": lambda a, b: torch.mul(other=b, input=a),
            "mul_": in_place(lambda a, b: a.mul_(b)),
            "multiply_": in_place(lambda a, b: a.multiply_(b)),
            "*=": in_place(lambda a, b: operator.imul(a, b)),
            "aten.mul_": in_place(aten.mul_.Tensor),
            "einsum": lambda a, b: torch.einsum("ij,ij->ij", a, b),
            "addcmul": lambda a, b: torch.addcmul(torch.zeros_like(a), a, b),
            "addcmul by name": lambda a, b: torch.addcmul(input=torch.zeros_like(a), tensor1=a, tensor2=b),
            "addcmul_": lambda a, b: torch.zeros_like(a).addcmul_(a, b),
        },
    ),
    (
        lambda a, b: a / b.detach(),
        {
            "a / b": operator.truediv,
            "torch.div": torch.div,
            "div by name": lambda a, b: torch.div(input=a, other=b),
            "div_": in_place(lambda a, b: a.div_(b)),
            "/=": in_place(lambda a, b: operator.itruediv(a, b)),
            "aten.div": aten.div.Tensor,
            "reciprocal": lambda a, b: a * b.reciprocal(),
            "1 / b": lambda a, b: a * (1 / b),
        },
    ),
    (
        lambda a: a * a.detach(),
        {
            "**": lambda a: a**2,
            "pow": lambda a: torch.pow(a, 2),
            "pow by name": lambda a: a.pow(exponent=2),
            "pow of a tensor": lambda a: a ** torch.tensor(2.0),
            "square": torch.square,
            "pow_": in_place(lambda a: a.pow_(2)),
            "**=": in_place(lambda a: operator.ipow(a, 2)),
            "square_": in_place(lambda a: a.square_()),
            "a * a": lambda a: a * a,
        },
    ),
    (
        lambda a: a * a.detach() ** 2,
        {"** 3": lambda a: a**3, "a * a * a": lambda a: torch.einsum("ij,ij,ij->ij", a, a, a)},
    ),
    (
        share_matmul,
        {
            "@": lambda a, b: a @ b.T,
            "matmul by name": lambda a, b: torch.matmul(input=a, other=b.T),
            "mm": lambda a, b: torch.mm(a, b.t()),
            "bmm": lambda a, b: torch.bmm(a[None], b.T[None])[0],
            "einsum": lambda a, b: torch.einsum("ik,jk->ij", a, b),
            "einsum of a list": lambda a, b: torch.einsum("ik,jk->ij", [a, b]),
            "linear": F.linear,
            "baddbmm": lambda a, b: torch.baddbmm(ONES[None], a[None], b.T[None])[0],
            "addmm": lambda a, b: torch.addmm(ONES, a, b.T),
        },
    ),
    (
        lambda a, b: 2 * share(a, 0.5) @ share(b, 0.5).T,
        {
            "addmm by name": lambda a, b: torch.addmm(input=ONES, mat1=a, mat2=b.T, alpha=2),
            "bloom's baddbmm": lambda a, b: ONES[None].baddbmm(batch1=a[None], batch2=b.T[None], beta=0.0, alpha=2)[0],
            "addmm_": lambda a, b: torch.zeros_like(ONES).addmm_(a, b.T, alpha=2),
        },
    ),
    (
        lambda a, b, c: share(a, 0.5) @ share(b, 0.5).T + c[:, :3],
        {
            "summand of addmm": lambda a, b, c: torch.addmm(c[:, :3], a, b.T),
            "summand of baddbmm": lambda a, b, c: torch.baddbmm(c[None, :, :3], a[None], b.T[None])[0],
        },
    ),
    (
        lambda a, b, c: share(a, 0.5) @ share(b, 0.5).T + c[0, :3],
        {"bias of linear": lambda a, b, c: F.linear(a, b, c[0, :3])},
    ),
    (
        lambda a, b: a + 2 * b,
        {
            "alpha": lambda a, b: torch.add(a, b, alpha=2),
            "add_ alpha": in_place(lambda a, b: a.add_(b, alpha=2)),
            "sub alpha": lambda a, b: torch.sub(a, b, alpha=-2),
            "names": lambda a, b: torch.add(input=a, other=2 * b),
        },
    ),
    (
        ratio_silu,
        {
            "F.silu": F.silu,
            "inplace": lambda a: F.silu(a * 1.0, True),
            "aten.silu": aten.silu,
            "aten.silu_": in_place(aten.silu_),
            "by name": lambda a: F.silu(input=a),
            "module": nn.SiLU(),
            "written out": lambda a: a * torch.sigmoid(a),
        },
    ),
    (
        ratio_tanh,
        {
            "torch": torch.tanh,
            "method": lambda a: a.tanh(),
            "tanh_": in_place(torch.tanh_),
            "name": lambda a: torch.tanh(input=a),
        },
    ),
    (
        ratio_relu,
        {
            "F.relu": F.relu,
            "inplace": lambda a: F.relu(a * 1.0, True),
            "relu_": in_place(torch.relu_),
            "clamp": lambda a: torch.clamp(a, min=0),
            "clamp by name": lambda a: torch.clamp(input=a, min=0),
            "clamp_": in_place(lambda a: a.clamp_(min=0)),
        },
    ),
    (
        lambda a: a * (F.elu(a) / a).detach(),
        {
            "F.elu": F.elu,
            "inplace": lambda a: F.elu(a * 1.0, inplace=True),
            "elu_": in_place(F.elu_),
            "selu": lambda a: F.selu(a / 1) * 0 + F.elu(a),
        },
    ),
    (lambda a: a * (F.leaky_relu(a, 0.1) / a).detach(), {"leaky_relu_": in_place(lambda a: F.leaky_relu_(a, 0.1))}),
    (lambda a: a * (F.hardtanh(a) / a).detach(), {"hardtanh": F.hardtanh, "hardtanh_": in_place(F.hardtanh_)}),
    (lambda a: a * (F.gelu(a) / a).detach(), {"gelu": F.gelu, "aten.gelu_": in_place(aten.gelu_)}),
)
def test_spellings(function, by_hand):
    agree(function, by_hand)


@cases(
    (
        lambda a, b: b * torch.sigmoid(a).detach(),
        {
            "sigmoid": lambda a, b: b * torch.sigmoid(a),
            "sigmoid_": lambda a, b: b * in_place(torch.sigmoid_)(a),
            "F.sigmoid": lambda a, b: F.sigmoid(a) * b,
        },
    ),
    (
        lambda a, b: b * a.exp().detach(),
        {
            "exp": lambda a, b: a.exp() * b,
            "exp_": lambda a, b: in_place(torch.exp_)(a) * b,
            "e ** a": lambda a, b: math.e**a * b,
        },
    ),
    (
        lambda a, b: b * (1 + torch.tanh(a)).detach(),
        {
            "1 + tanh": lambda a, b: b * (1 + torch.tanh(a)),
            "tanh + 1": lambda a, b: b * (torch.tanh(a) + 1.0),
            "+= 1": lambda a, b: b * in_place(lambda t: operator.iadd(t, 1))(torch.tanh(a)),
            "add_(1)": lambda a, b: b * torch.tanh(a).add_(1),
            "- -1": lambda a, b: b * (torch.tanh(a) - -1),
        },
    ),
    (
        lambda a, b: b * torch.rsqrt(a.square().mean(-1, keepdim=True) + 1e-6).detach(),
        {
            "rsqrt": lambda a, b: b * torch.rsqrt(a.pow(2).mean(-1, keepdim=True) + 1e-6),
            "rsqrt_": lambda a, b: b * a.square().mean(-1, keepdim=True).add_(1e-6).rsqrt_(),
            "** -0.5": lambda a, b: b * (a * a).mean(-1, keepdim=True).add(1e-6) ** -0.5,
            "/ sqrt": lambda a, b: b / ((a**2).mean(-1, keepdim=True) + 1e-6).sqrt(),
        },
    ),
    (lambda a, b: b * F.softplus(a).detach(), {"softplus": lambda a, b: b * F.softplus(a)}),
    (lambda a, b: b * a.cos().detach(), {"cos": lambda a, b: b * a.cos()}),
    (
        lambda a: a[:, :2] * a[:, 2:].sigmoid().detach(),
        {
            "glu": F.glu,
            "glu by name": lambda a: F.glu(input=a, dim=-1),
            "chunks": lambda a: a.chunk(2, -1)[0] * a.chunk(2, -1)[1].sigmoid(),
        },
    ),
    (lambda a: a / a.norm(dim=-1, keepdim=True).detach(), {"normalize": lambda a: F.normalize(a, dim=-1)}),
    (lambda a: a - a.mean(-1, keepdim=True), {"mean": lambda a: a - a.mean(-1, keepdim=True)}),
    (lambda a, b: (a * b).detach().cumprod(0) + a, {"cumprod": lambda a, b: (a * b).cumprod(0) + a}),
    (
        lambda a, b: a * CONSTANT + b / 3,
        {"constants": lambda a, b: a * CONSTANT + b / 3, "bool": lambda a, b: a * CONSTANT + b / 3.0 * True},
    ),
    (lambda a, b: torch.where(CONSTANT > 0, a, b), {"where": lambda a, b: torch.where(CONSTANT > 0, a, b)}),
    (
        lambda a: a.max(-1).values,
        {"max": lambda a: a.max(-1).values, "topk": lambda a: a.topk(1, -1)[0][:, 0], "amax": lambda a: a.amax(-1)},
    ),
    (
        lambda a, b: a.softmax(-1) + b.log_softmax(-1),
        {"softmax": lambda a, b: torch.softmax(input=a, dim=-1) + F.log_softmax(b, -1)},
    ),
)
def test_constants_and_linear_maps(function, by_hand):
    agree(function, by_hand)


@pytest.mark.parametrize(
    "function",
    [
        lambda a: F.interpolate(a[None], scale_factor=2, mode="linear"),
        lambda a: F.interpolate(a[None], scale_factor=2, mode="nearest-exact"),
        lambda a: F.interpolate(a[None, None, None], scale_factor=2, mode="trilinear"),
        lambda a: F.interpolate(a[None, None, None], scale_factor=2),
        lambda a: torch.fft.irfft2(torch.fft.rfft2(a), a.shape),
        lambda a: torch.fft.ifftn(torch.fft.fftshift(torch.fft.fftn(a))).real,
        lambda a: torch.fft.hfft(a),
        lambda a: torch.complex(a, 2 * a).imag,
        lambda a: torch.cummax(a, 0)[0] + torch.msort(a),
    ],
)
def test_interpolations_transforms_and_selections_are_linear(function):
    agree(function, lambda a: function(a))


def test_products_of_three():
    agree(
        lambda a, b, c: torch.einsum("ij,kj,lj->ikl", a, b, c),
        lambda a, b, c: torch.einsum("ij,kj,lj->ikl", share(a, 1 / 3), share(b, 1 / 3), share(c, 1 / 3)),
    )
    agree(
        lambda a, b: torch.einsum("ij,kj,lj->ikl", a, CONSTANT, b),
        lambda a, b: torch.einsum("ij,kj,lj->ikl", share(a, 0.5), CONSTANT, share(b, 0.5)),
    )
    agree(lambda a: torch.einsum("ij,kj->ik", a, CONSTANT), lambda a: a @ CONSTANT.T)
    # two products, one after the other: a quarter, a quarter, a half
    agree(lambda a, b, c: a * b * c, lambda a, b, c: share(a, 0.25) * share(b, 0.25) * share(c, 0.5))


@pytest.mark.parametrize("shapes", [((3, 4), (4,)), ((3, 1), (1, 4)), ((), (3, 4)), ((), ()), ((0, 4), (4,))], ids=str)
def test_a_broadcast_product_shares_equally_and_keeps_relevance(shapes):
    a, b = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    with RuleMode(ATTN_LRP):
        y = a * b
    c_a, c_b = torch.autograd.grad(y.sum(), (a, b))
    for x, c in ((a, c_a), (b, c_b)):
        torch.testing.assert_close((x * c).sum(), y.sum() / 2, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "change",
    [
        lambda y, b: y.add_(b),
        lambda y, b: y.mul_(2.0),
        lambda y, b: y.masked_fill_(CONSTANT > 0, 0.0),
        lambda y, b: operator.setitem(y, 0, 0.0),
        lambda y, b: y.div_(3.0),
        lambda y, b: operator.setitem(y, (..., 0), b[:, 0]),
    ],
    ids=["add_", "mul_", "masked_fill_", "y[0] = 0", "div_", "y[..., 0] = b"],
)
@pytest.mark.parametrize(
    "product", [lambda a, b: a * b, lambda a, b: a @ b.T @ CONSTANT, lambda a, b: (a + b) ** 2, F.silu]
)
def test_what_a_rule_returns_can_be_written_into(product, change):
    def function(a: Tensor, b: Tensor) -> Tensor:
        y = product(a, b) if product is not F.silu else product(a)
        change(y, b)
        return y

    def by_hand(a: Tensor, b: Tensor) -> Tensor:
        a_half, b_half = share(a, 0.5), share(b, 0.5)
        y = ratio_silu(a) if product is F.silu else product(a_half, b_half)
        change(y, b)
        return y

    agree(function, by_hand)


def test_in_place_operations_leave_saved_tensors_alone():
    # x is saved by the first product; a plain mul_ on it would be an error in the backward, here it is one too
    a, b = leaves(2)
    with RuleMode(ATTN_LRP):
        x = a + 0
        y = x * b
        x *= b
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize(
    "name", ["leaky_relu", "elu", "selu", "celu", "hardtanh", "softshrink", "hardshrink", "tanhshrink", "relu6"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ratios_over_every_finite_number(name, dtype):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[x.isfinite()].requires_grad_()
    function = getattr(F, name)
    with RuleMode(ATTN_LRP):
        y = function(x)
    (c,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(y, function(x))
    assert c[y.isfinite()].isfinite().all()  # 1.05 times the largest number isn't
    # x c = y: y was rounded to the dtype (torch's forward), c again
    normal = (c.abs() > torch.finfo(dtype).tiny) & y.isfinite()
    error = (x.double() * c.double() - y.double()).abs()
    assert (error[normal] <= torch.finfo(dtype).eps * y.double().abs()[normal]).all()


# -- the gate of CP

RIDES = {
    "as it is": lambda g: g,
    "cast": lambda g: g.to(torch.float32).double(),
    "view": lambda g: g.view(-1).reshape(ROWS, COLUMNS),
    "transposed": lambda g: g.transpose(0, 1).t(),
    ".T": lambda g: g.T.mT,
    "indexed": lambda g: g[None][0],
    "split": lambda g: g.view(1, ROWS, COLUMNS).chunk(1)[0].squeeze(0),
    "unbound": lambda g: g[None].unbind(0)[0],
    "clone": lambda g: g.clone().contiguous(),
    "dropout": lambda g: F.dropout(g, 0.0, training=True),
    "times a constant": lambda g: 0.5 * g * CONSTANT.sign(),
    "over a constant": lambda g: g / 2,
    "bounded": lambda g: g.clamp(max=0.7),
    "in place": lambda g: g.mul_(2.0),
    "over a constant in place": lambda g: g.div_(2.0),
    "masked": lambda g: g.masked_fill(CONSTANT > 1, 0.0),
    "masked in place": lambda g: g.masked_fill_(CONSTANT > 1, 0.0),
    "expanded": lambda g: g.unsqueeze(0).expand(1, ROWS, COLUMNS)[0],
    "a triangle": lambda g: g.tril(1),
    "with the other sign": lambda g: -g,
}
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "tanh": torch.tanh,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@pytest.mark.parametrize("ride", RIDES)
@pytest.mark.parametrize("name", ["silu", "relu"])
def test_cp_stops_the_gate_wherever_its_mark_rides(ride, name):
    act = ACTIVATIONS[name]
    agree(lambda a, b: RIDES[ride](act(a)) * b, lambda a, b: RIDES[ride](act(a)).detach() * b, CP_LRP)
    agree(lambda a, b: b * RIDES[ride](act(a)), lambda a, b: RIDES[ride](act(a)).detach() * b, CP_LRP)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_cp_stops_every_activation_and_in_place_products(name):
    act, by_hand = ACTIVATIONS[name], lambda a, b: ACTIVATIONS[name](a).detach() * b
    agree(lambda a, b: act(a) * b, by_hand, CP_LRP)
    agree(lambda a, b: act(a).mul_(b), by_hand, CP_LRP)
    agree(lambda a, b: operator.imul(act(a), b), by_hand, CP_LRP)
    agree(lambda a, b: (b * 1.0).mul_(act(a)), by_hand, CP_LRP)


def test_cp_stops_the_gate_where_both_branches_are_bounded():
    # DeepSeek-V4, MiniMax-M3, Step 3.7: a bound is not an activation
    agree(
        lambda a, b: F.silu(a.clamp(max=1.0)) * b.clamp(min=-0.9, max=0.9),
        lambda a, b: F.silu(a.clamp(max=1.0)).detach() * b * (b.clamp(-0.9, 0.9) / b).detach(),
        CP_LRP,
    )


def test_a_gate_given_by_name_or_asked_for_its_type_is_one_still():
    def function(a, b):
        gate = torch.squeeze(input=F.silu(a))
        assert gate.type() == "torch.DoubleTensor"
        return gate * b

    agree(function, lambda a, b: F.silu(a).detach() * b, CP_LRP)


def test_what_is_copied_over_a_gate_is_none():
    agree(
        lambda a, b, c: (F.silu(a) * 1.0).copy_(b) * F.silu(c),
        lambda a, b, c: b * F.silu(c).detach(),
        CP_LRP,
    )
    agree(
        lambda a, b, c: b * 1.0 * torch.empty_like(b).copy_(F.silu(c)) + 0 * a,
        lambda a, b, c: b * F.silu(c).detach() + 0 * a,
        CP_LRP,
    )


def _written_into(weights: Tensor) -> Tensor:
    routing = torch.zeros_like(weights)
    routing[...] = weights
    return routing


@pytest.mark.parametrize(
    "combine",
    [_written_into, in_place(lambda w: w.add_(torch.softmax(2 * w, -1)))],
    ids=["written into zeros", "+= others"],
)
def test_a_stopped_router_is_stopped_wherever_its_weights_are_put(combine):
    rules = CP_LRP.but(attention="uniform")
    agree(
        lambda a, b: combine(torch.softmax(a, -1)) * b,
        lambda a, b: combine(torch.softmax(a, -1)).detach() * b,
        rules,
    )


def test_cp_halves_a_product_of_two_gates_or_of_none():
    agree(
        lambda a, b: F.silu(a) * torch.tanh(b),
        lambda a, b: share(ratio_silu(a), 0.5) * share(ratio_tanh(b), 0.5),
        CP_LRP,
    )
    agree(lambda a, b: a * b, share_product, CP_LRP)


@pytest.mark.parametrize("add", [torch.add, in_place(lambda h, b: operator.iadd(h, b))], ids=["+", "+="])
def test_a_sum_is_no_gate(add):
    agree(
        lambda a, b, c: add(F.relu(a), b) * c,
        lambda a, b, c: share(ratio_relu(a) + b, 0.5) * share(c, 0.5),
        CP_LRP,
    )


def test_uniform_does_not_stop_the_gate():
    agree(lambda a, b: F.silu(a) * b, lambda a, b: share(ratio_silu(a), 0.5) * share(b, 0.5))
