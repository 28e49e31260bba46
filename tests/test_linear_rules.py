"""Epsilon and gamma rules against loops over single contributions, in relevances and not in coefficients."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lxt.composites import ATTN_LRP, Epsilon, Gamma
from lxt.linear_rules import linear
from lxt.mode import RuleMode

RULES = (Epsilon(0.1), Gamma(0.25))


def sign(z: float) -> float:
    return (z > 0) - (z < 0)


def shares(contributions: list[float], bias: float, rule: Epsilon | Gamma) -> list[float]:
    """What of one output's relevance each contribution x_j w_j gets; the bias keeps its own.

    Epsilon: x w / (z + eps sign z). Gamma: contributions with the output's sign weigh 1 + gamma, the others 1.
    """
    z = sum(contributions) + bias
    if isinstance(rule, Epsilon):
        return [c / (z + rule.epsilon * sign(z)) if z else 0.0 for c in contributions]
    weighed = [c * (1 + rule.gamma * (c * z > 0)) for c in contributions]
    total = sum(weighed) + bias * (1 + rule.gamma * (bias * z > 0))
    return [c / total if z else 0.0 for c in weighed]


def linear_relevance(x: Tensor, weight: Tensor, bias: Tensor | None, r: Tensor, rule: Epsilon | Gamma) -> Tensor:
    x, result = x.detach(), torch.zeros_like(x)
    for n, i in itertools.product(range(x.shape[0]), range(weight.shape[0])):
        parts = [float(x[n, j] * weight[i, j]) for j in range(x.shape[1])]
        for j, share in enumerate(shares(parts, 0.0 if bias is None else float(bias[i]), rule)):
            result[n, j] += share * r[n, i]
    return result


def check(y: Tensor, plain: Tensor, x: Tensor, relevance, rtol: float = 1e-12) -> None:
    """The forward is untouched and x * c is the relevance that `relevance` makes of y * c_y, twice."""
    assert torch.equal(y, plain)
    c_y = torch.randn(y.shape, dtype=y.dtype)
    (c,) = torch.autograd.grad(y, x, c_y, retain_graph=True)
    assert torch.equal(torch.autograd.grad(y, x, c_y)[0], c)
    with torch.no_grad():
        torch.testing.assert_close(x * c, relevance(y * c_y), rtol=rtol, atol=rtol)


def every_sign() -> tuple[Tensor, Tensor, Tensor]:
    """All combinations of the signs of two inputs, two weights and a bias, with zeros among them, of unequal sizes."""
    x = torch.tensor([[a * 1.3, b * 0.7] for a in (-1, 0, 1) for b in (-1, 0, 1)], dtype=torch.float64)
    signs = list(itertools.product((-1, 0, 1), repeat=3))
    weight = torch.tensor([[a * 0.4, b * 1.9] for a, b, _ in signs], dtype=torch.float64)
    return x.requires_grad_(), weight, torch.tensor([c * 0.35 for *_, c in signs], dtype=torch.float64)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_every_combination_of_signs(rule, with_bias):
    x, weight, bias = every_sign()
    bias = bias if with_bias else None
    y = linear(x, weight, bias, F.linear, rule)
    check(y, F.linear(x, weight, bias), x, lambda r: linear_relevance(x, weight, bias, r, rule))


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("call", ["positional", "by name", "all by name"])
def test_linear_layers_through_the_mode(rule, with_bias, call):
    x, weight, bias = every_sign()
    bias = bias if with_bias else None
    with RuleMode(ATTN_LRP.but(linear=rule)):
        if call == "positional":
            y = F.linear(x, weight, bias)
        elif call == "by name":
            y = F.linear(x, weight, bias=bias)
        else:
            y = F.linear(input=x, weight=weight, bias=bias)
    check(y, F.linear(x, weight, bias), x, lambda r: linear_relevance(x, weight, bias, r, rule))


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_gpt2_conv1d_through_the_mode(rule):
    torch.manual_seed(0)
    layer = Conv1D(5, 4).double().requires_grad_(False)
    layer.weight.normal_()
    layer.bias.normal_()
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    with RuleMode(ATTN_LRP.but(linear=rule)):
        y = layer(x)

    def relevance(r: Tensor) -> Tensor:
        return linear_relevance(x.view(6, 4), layer.weight.T, layer.bias, r.view(6, 5), rule).view(2, 3, 4)

    check(y, layer(x), x, relevance)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_addmm_with_factors_is_not_left_to_another_rule(rule):
    # torch.addmm(b, x, w, beta=..., alpha=...) is a linear layer too: the rule applies, or there is an error
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 4).double().requires_grad_(), torch.randn(4, 5).double(), torch.randn(5).double()
    with RuleMode(ATTN_LRP.but(linear=rule)):
        try:
            y = torch.addmm(bias, x, weight, beta=0.5, alpha=2.0)
        except ValueError:
            return
    plain = torch.addmm(bias, x, weight, beta=0.5, alpha=2.0)
    check(y, plain, x, lambda r: linear_relevance(x, 2 * weight.T, 0.5 * bias, r, rule))


def convolution_relevance(
    x: Tensor, weight: Tensor, bias: Tensor | None, r: Tensor, rule: Epsilon | Gamma, stride: int, padding: int
) -> Tensor:
    result = torch.zeros_like(x)
    out_channels, channels, height, width = weight.shape
    for n, o, top, left in itertools.product(*map(range, (x.shape[0], out_channels, *r.shape[-2:]))):
        where, parts = [], []
        for c, i, j in itertools.product(range(channels), range(height), range(width)):
            row, column = top * stride - padding + i, left * stride - padding + j
            if 0 <= row < x.shape[-2] and 0 <= column < x.shape[-1]:
                where.append((n, c, row, column))
                parts.append(float(x[n, c, row, column] * weight[o, c, i, j]))
        for index, share in zip(where, shares(parts, 0.0 if bias is None else float(bias[o]), rule), strict=True):
            result[index] += share * r[n, o, top, left]
    return result


@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (2, 1)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_convolution_through_the_mode(rule, with_bias, stride, padding):
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 3, stride=stride, padding=padding, bias=with_bias).double().requires_grad_(False)
    x = torch.randn(2, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    with RuleMode(ATTN_LRP.but(linear=rule)):
        y = layer(x)
    check(
        y,
        layer(x),
        x,
        lambda r: convolution_relevance(x, layer.weight, layer.bias, r, rule, stride, padding),
    )


def test_epsilon_zero_is_the_plain_gradient():
    x, weight, bias = every_sign()
    y = linear(x, weight, bias, F.linear, Epsilon(0))
    (c,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(c, torch.autograd.grad(F.linear(x, weight, bias).sum(), x)[0])
    # in the mode too, where z = 0 has a gradient and no relevance
    with RuleMode(ATTN_LRP):
        y = F.linear(x, weight, bias)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], c)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_relevance_is_kept_without_a_bias(rule):
    torch.manual_seed(0)
    x, weight = torch.randn(4, 6).double().requires_grad_(), torch.randn(5, 6).double()
    y = linear(x, weight, None, F.linear, rule)
    c_y = torch.rand(4, 5, dtype=torch.float64)
    (c,) = torch.autograd.grad(y, x, c_y)
    with torch.no_grad():
        kept = y * c_y if isinstance(rule, Gamma) else y.abs() / (y.abs() + rule.epsilon) * y * c_y
        torch.testing.assert_close((x * c).sum(1), kept.sum(1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", [Epsilon(1e-9), Epsilon(0.1), Gamma(0.25)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_16_bits_at_the_edges(rule, dtype):
    # z = 0, where an epsilon below the dtype's smallest number must not make 0 / 0, and z c_z beyond float16's largest
    weight = torch.eye(4, dtype=dtype) + torch.eye(4, dtype=dtype).roll(1, 0) / 8
    x = torch.tensor([[0.0, 0.0, 0.0, 0.0], [3e4, -2e4, 1e4, 1e3], [1e-4, -2e-4, 1e-4, 3e-4]], dtype=dtype)
    x.requires_grad_()
    y = linear(x, weight, None, F.linear, rule)
    c_y = torch.tensor([1.0, 4.0, 1e-4], dtype=dtype)[:, None].expand_as(y)
    (c,) = torch.autograd.grad(y, x, c_y)
    assert c.dtype == dtype
    assert c.isfinite().all()
    expected = linear_relevance(x.double(), weight.double(), None, (y * c_y.double()).detach(), rule)
    scale = expected.abs().amax(1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
    # z, its parts and the sum are each rounded to the dtype, and c of the last row is a subnormal of float16
    error = (x.detach().double() * c.double() - expected).abs() / scale
    assert (error < (0.02 if dtype != torch.float32 else 1e-5)).all()


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_forward_in_every_dtype_and_strided(rule, dtype):
    torch.manual_seed(0)
    x = torch.randn(6, 5, dtype=dtype).t()[:, ::2].requires_grad_()
    weight, bias = torch.randn(4, 3, dtype=dtype), torch.randn(4, dtype=dtype)
    assert torch.equal(linear(x, weight, bias, F.linear, rule), F.linear(x, weight, bias))
    y = linear(x[:0], weight, bias, F.linear, rule)
    assert torch.autograd.grad(y.sum(), x)[0].eq(0).all()


@pytest.mark.parametrize(("convolution", "rule"), [(None, Gamma(0.25)), (Gamma(1.0), Gamma(1.0)), (Epsilon(), None)])
def test_convolutions_may_have_a_rule_of_their_own(convolution, rule):
    torch.manual_seed(0)
    layer, x = nn.Conv2d(2, 3, 2).double().requires_grad_(False), torch.randn(1, 2, 3, 3).double().requires_grad_()
    head = torch.randn(2, 3, dtype=torch.float64)
    with RuleMode(ATTN_LRP.but(linear=Gamma(0.25), convolution=convolution)):
        y = layer(x)
        z = F.linear(y.detach().mean((2, 3)).requires_grad_(), head)
    if rule is None:
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(layer(x).sum(), x)[0])
    else:
        check(y, layer(x), x, lambda r: convolution_relevance(x, layer.weight, layer.bias, r, rule, 1, 0))
    assert "Gamma" in type(z.grad_fn).__name__  # linear layers keep theirs


# -- linear layers that are written as products of matrices

# weight: [4, 5], a parameter. Each gives x @ weight: [..., 5], from x: [3, 4].
WRITTEN = {
    "x @ W": lambda x, weight: x @ weight,
    "matmul by hand of a transpose": lambda x, weight: torch.matmul(weight.T, x.T).T,
    "mm": lambda x, weight: torch.mm(x, weight),
    "bmm": lambda x, weight: torch.bmm(x[None], weight.expand(1, -1, -1))[0],
    "einsum": lambda x, weight: torch.einsum("ni,io->no", x, weight),
    "einsum of a list": lambda x, weight: torch.einsum("io,ni->no", [weight, x]),
    "tensordot": lambda x, weight: torch.tensordot(x, weight, dims=1),
    "inner": lambda x, weight: torch.inner(x, weight.T),
    "mv": lambda x, weight: torch.stack([torch.mv(weight.T, row) for row in x]),
    "addmm": lambda x, weight: torch.addmm(torch.zeros(5, dtype=x.dtype), x, weight),
    "addmm, the weight first": lambda x, weight: torch.addmm(torch.zeros(3, dtype=x.dtype), weight.T, x.T).T,
    "addmv": lambda x, weight: torch.stack([torch.addmv(torch.zeros(5).to(x), weight.T, row) for row in x]),
    "baddbmm": lambda x, weight: torch.baddbmm(torch.zeros(1, 1, 5).to(x), x[None], weight[None])[0],
}


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("attention", ["uniform", "value_only", "gradient"])
@pytest.mark.parametrize("name", WRITTEN)
def test_a_product_with_a_parameter_is_a_linear_layer(name, attention, rule):
    torch.manual_seed(0)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weight = nn.Parameter(torch.randn(4, 5, dtype=torch.float64), requires_grad=False)
    with RuleMode(ATTN_LRP.but(linear=rule, attention=attention)):
        y = WRITTEN[name](x, weight)
    check(y, WRITTEN[name](x, weight), x, lambda r: linear_relevance(x, weight.T, None, r, rule))


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_summand_that_is_an_activation_is_a_term_of_the_sum(rule):
    torch.manual_seed(0)
    x, residual = torch.randn(3, 4).double().requires_grad_(), torch.randn(3, 5).double().requires_grad_()
    weight = torch.randn(4, 5, dtype=torch.float64)
    with RuleMode(ATTN_LRP.but(linear=rule)):
        y = torch.addmm(residual, x, weight, beta=2.0)
    torch.testing.assert_close(y, torch.addmm(residual, x, weight, beta=2.0), rtol=1e-14, atol=1e-14)
    c_y = torch.randn(3, 5, dtype=torch.float64)
    c_x, c_residual = torch.autograd.grad(y, (x, residual), c_y)
    assert torch.equal(c_residual, 2 * c_y)
    with torch.no_grad():
        expected = linear_relevance(x, weight.T, None, (x @ weight) * c_y, rule)
        torch.testing.assert_close(x * c_x, expected, rtol=1e-12, atol=1e-12)


def test_a_product_with_another_constant_is_refused():
    x, constant = torch.randn(3, 4, requires_grad=True), torch.randn(4, 5)
    for product in (
        lambda: x @ constant,
        lambda: torch.einsum("ni,io,o->n", x, constant, constant[0]),
        lambda: torch.baddbmm(torch.zeros(1), x[None], constant[None]),
    ):
        with RuleMode(ATTN_LRP.but(linear=Gamma())), pytest.raises(ValueError, match="factor that is no parameter"):
            product()
    with RuleMode(ATTN_LRP):
        torch.testing.assert_close(torch.autograd.grad((x @ constant).sum(), x)[0], constant.sum(1).expand(3, 4))


def test_attention_weights_are_no_linear_layer():
    torch.manual_seed(0)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    with RuleMode(ATTN_LRP.but(linear=Gamma(), attention="value_only")):
        weights = torch.softmax(x @ x.T, -1)
        assert not weights.requires_grad
        zeros = torch.zeros(4, dtype=x.dtype)
        products = weights @ x, torch.einsum("qk,kd->qd", [weights, x]), torch.addmm(zeros, weights, x)
        for y in products:
            torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], weights.sum(0)[:, None].expand(3, 4))


@pytest.mark.parametrize("masked", [True, False])
def test_a_learned_query_of_torchs_attention_is_no_linear_layer(masked):
    """As SigLIP pools its patches: scores are linear in the key then, but by attention's rule and not by Gamma."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64).requires_grad_(False)
    x, probe = torch.randn(2, 5, 4).double().requires_grad_(), torch.randn(2, 1, 4, dtype=torch.float64)
    mask = torch.randn(1, 5, dtype=torch.float64) if masked else None
    coefficients = []
    for need_weights in (True, False):
        with RuleMode(ATTN_LRP.but(linear=Gamma())):
            y = attention(probe, x, x, need_weights=need_weights, attn_mask=mask)[0]
        coefficients.append(torch.autograd.grad(y.square().sum(), x)[0])
    torch.testing.assert_close(*coefficients, rtol=1e-12, atol=1e-13)


def test_under_autocast_the_backward_runs_in_the_inputs_dtype():
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 5).requires_grad_(False), torch.randn(4, 6, requires_grad=True)
    with RuleMode(ATTN_LRP.but(linear=Gamma(0.25))):
        with torch.autocast("cpu", torch.bfloat16):
            low = layer(x)
        full = layer(x)
    c_y = torch.randn(4, 5)
    (got,), (expected,) = torch.autograd.grad(low, x, c_y.to(low.dtype)), torch.autograd.grad(full, x, c_y)
    assert (low.dtype, got.dtype) == (torch.bfloat16, torch.float32)
    assert (got - expected).norm() < 2**-6 * expected.norm()  # z, in bfloat16, has 8 bits
