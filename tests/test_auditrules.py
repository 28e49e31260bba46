"""The auditor's rules one by one, on numbers small enough to follow by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lxt.audit import Audit, audit
from lxt.composites import ATTN_LRP, CP_LRP, GRADIENT, Composite

TEMPERATURE_2 = ATTN_LRP.but(softmax_temperature=2.0)


class Formula(nn.Module):
    def __init__(self, formula: Callable[..., Tensor]) -> None:
        super().__init__()
        self.formula = formula

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.formula(**inputs)


def run(formula: Callable[..., Tensor], rules: str | Composite = "attnlrp", **inputs: Any) -> Audit:
    tensors = {name: torch.as_tensor(value, dtype=torch.float64) for name, value in inputs.items()}
    return audit(Formula(formula), tensors, torch.sum, rules, wrt=tuple(tensors))


def relevance(formula: Callable[..., Tensor], rules: str | Composite = "attnlrp", **inputs: Any) -> list[Any]:
    return [found.tolist() for found in run(formula, rules, **inputs).relevance.values()]


def test_matrix_products_are_differentiated_where_attention_is() -> None:
    """Whether or not a softmax is found behind them: the field is about products of two activations."""
    rules = ATTN_LRP.but(attention="gradient")
    # d/da of (a b) is b, so a's relevance is all of the product, and b's too
    assert relevance(lambda a, b: a @ b, rules, a=[[2.0]], b=[[3.0]]) == [[[6.0]], [[6.0]]]
    assert relevance(lambda a, b: a @ b, ATTN_LRP, a=[[2.0]], b=[[3.0]]) == [[[3.0]], [[3.0]]]


def test_a_squared_relu_is_differentiated_where_activations_are() -> None:
    rules = ATTN_LRP.but(activation="gradient")
    assert relevance(lambda x: torch.relu(x).pow(2), rules, x=3.0) == [18.0]
    assert relevance(lambda x: torch.relu(x).pow(2), ATTN_LRP, x=3.0) == [9.0]
    assert relevance(lambda x: x.pow(2), rules, x=3.0) == [9.0]


@pytest.mark.parametrize("largest", [lambda w: w.amax(-1), lambda w: torch.max(w, -1).values])
def test_the_largest_of_softmax_weights_is_a_router(largest: Callable[[Tensor], Tensor]) -> None:
    """Switch Transformers weigh their one expert with it."""

    def formula(x: Tensor, expert: Tensor) -> Tensor:
        return largest(torch.softmax(x, -1)) * expert

    (of_x, of_expert) = relevance(formula, ATTN_LRP.but(router="stop"), x=[1.0, 2.0], expert=5.0)
    assert of_x == [0.0, 0.0]
    assert of_expert == pytest.approx(5 * sigmoid(1.0))


def test_a_sum_of_softmax_weights_is_a_router_and_a_sum_with_something_else_is_not() -> None:
    rules = ATTN_LRP.but(router="stop")

    def two(x: Tensor, expert: Tensor) -> Tensor:
        weights = torch.softmax(x, -1)
        return (weights[0] + weights[1]) * expert

    def mixed(x: Tensor, expert: Tensor) -> Tensor:
        return (torch.softmax(x, -1)[0] + x[1]) * expert

    assert relevance(two, rules, x=[1.0, 2.0, 3.0], expert=5.0)[0] == [0.0, 0.0, 0.0]
    assert relevance(mixed, rules, x=[1.0, 2.0, 3.0], expert=5.0)[0][1] != 0.0


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_a_gated_mlp_by_hand() -> None:
    gate, up = torch.tensor([[1.0, -1.0]]).double(), torch.tensor([[2.0, 0.5]]).double()
    x = [3.0, 1.0]
    # gate: 3 - 1 = 2, silu(2) = 2 s with s = sigmoid(2); up: 6 + 0.5 = 6.5; output 13 s
    s = sigmoid(2.0)

    def mlp(x: Tensor) -> Tensor:
        return F.silu(x @ gate.T) * (x @ up.T)

    (cp,) = relevance(mlp, CP_LRP, x=x)
    assert cp == pytest.approx([2 * s * 6, 2 * s * 0.5], rel=1e-14)  # up's summands, times the gate
    (attnlrp,) = relevance(mlp, ATTN_LRP, x=x)
    half = 13 * s / 2  # gate's half by its summands 3 and -1 of 2, up's by 6 and 0.5 of 6.5
    assert attnlrp == pytest.approx([half * 3 / 2 + half * 6 / 6.5, -half / 2 + half * 0.5 / 6.5], rel=1e-14)


@pytest.mark.parametrize(
    "carry",
    [
        lambda gate: gate.unsqueeze(0).view(-1),
        lambda gate: gate.to(torch.float32).to(torch.float64),
        lambda gate: F.dropout(gate.clone(), 0.0, training=True),
        lambda gate: 3 * gate,
        lambda gate: -gate.chunk(1)[0] / 4,
    ],
)
@pytest.mark.parametrize("activation", [F.silu, F.gelu, F.relu, torch.tanh, F.mish, F.elu, F.hardswish])
def test_the_gate_is_found_behind_what_only_carries_it(activation: Callable, carry: Callable) -> None:
    for product in (lambda g, u: carry(activation(g)) * u, lambda g, u: u * carry(activation(g))):
        found = run(product, CP_LRP, g=[0.7, 1.3], u=[2.0, -1.0])
        assert found.relevance["g"].abs().max() == 0
        torch.testing.assert_close(found.relevance["u"].sum(), found.value)


def test_products_are_shared() -> None:
    assert relevance(lambda a, b: a * b, a=2.0, b=3.0) == [3.0, 3.0]
    assert relevance(lambda a, b: a * b, CP_LRP, a=2.0, b=3.0) == [3.0, 3.0]
    assert relevance(lambda a, b, c: a * b * c, a=2.0, b=3.0, c=4.0) == [6.0, 6.0, 12.0]  # (a * b) * c
    assert relevance(lambda a: a * a, a=3.0) == [9.0]
    assert relevance(lambda a: a**3, a=2.0) == [8.0]
    assert relevance(lambda a: a.square(), a=2.0) == [4.0]
    two_gates = relevance(lambda a, b: F.silu(a) * F.silu(b), CP_LRP, a=1.0, b=1.0)
    assert two_gates == pytest.approx([sigmoid(1) ** 2 / 2] * 2, rel=1e-15)
    assert relevance(lambda a, b: a * b, GRADIENT, a=2.0, b=3.0) == [6.0, 6.0]
    assert relevance(lambda a, b: torch.mm(a, b), a=[[1.0, 2.0]], b=[[3.0], [4.0]]) == [[[1.5, 4.0]], [[1.5], [4.0]]]
    assert relevance(lambda a, b, c: torch.addcmul(a, b, c), a=1.0, b=2.0, c=3.0) == [1.0, 3.0, 3.0]
    assert relevance(lambda a, b, c: torch.addmm(a, b, c), a=[[1.0]], b=[[2.0]], c=[[3.0]]) == [
        [[1.0]],
        [[3.0]],
        [[3.0]],
    ]


def test_functions_that_are_not_zero_at_zero_are_constants() -> None:
    for function in (torch.sigmoid, torch.exp, F.softplus, torch.cos, torch.rsqrt, torch.sqrt, torch.exp2):
        for rules in (ATTN_LRP, CP_LRP):
            found = run(lambda a, b, f=function: f(a) * b, rules, a=2.0, b=3.0)
            assert found.relevance["a"] == 0
            assert found.relevance["b"] == found.value
    assert relevance(lambda a, b: a / b, a=2.0, b=4.0) == [0.5, 0.0]
    assert relevance(lambda a, b: (1 - torch.sigmoid(a)) * b, a=0.0, b=4.0) == [0.0, 2.0]
    assert relevance(lambda a, b: torch.sigmoid(a) * torch.sigmoid(b), a=0.0, b=4.0) == [0.0, 0.0]
    assert relevance(lambda a: torch.cumprod(a, 0), a=[2.0, 3.0]) == [[0.0, 0.0]]


def test_a_number_plus_an_activation_is_a_gate() -> None:
    assert relevance(lambda a, b: (a + 1) * b, a=2.0, b=4.0) == [0.0, 12.0]
    assert relevance(lambda a, b: b * (3 - a).view(1), a=2.0, b=4.0) == [0.0, 4.0]
    assert relevance(lambda a, b: (a * 1).add_(1) * b, a=2.0, b=4.0) == [0.0, 12.0]
    # an epsilon is none, nor is a bias vector, although the graph shows both alike
    assert relevance(lambda a, b: (a + 1e-3) * b, a=2.0, b=4.0) == pytest.approx([4.0, 4.002])
    bias = torch.ones(1, dtype=torch.float64)
    assert relevance(lambda a, b: (a + bias) * b, a=[2.0], b=[4.0]) == [[4.0], [6.0]]
    assert relevance(lambda a, b: (a + 1) * (b + 1), a=2.0, b=4.0) == [5.0, 6.0]  # two gates are none
    assert relevance(lambda a, b: (a + 1) * b, GRADIENT, a=2.0, b=4.0) == [8.0, 12.0]


ACTIVATIONS: list[Callable[[Tensor], Tensor]] = [
    F.silu, F.gelu, lambda x: F.gelu(x, approximate="tanh"), F.relu, F.leaky_relu, F.elu, F.selu, F.celu, F.mish,
    lambda x: F.elu(x, alpha=0.3), lambda x: F.celu(x, alpha=0.3), F.hardswish, F.relu6, F.softsign, F.hardtanh,
    F.softshrink, F.hardshrink, torch.tanh, torch.erf, torch.expm1, torch.asinh, torch.atan, torch.abs,
    lambda x: x.clamp(-1, 2), lambda x: x.clamp(min=-1), lambda x: F.prelu(x, torch.tensor([0.3]).double()),
    lambda x: 30 * torch.tanh(x / 30), lambda x: F.relu(x).square(),
]  # fmt: skip
IN_PLACE = ["relu_", "tanh_", "expm1_"]
POINTS = [-40.0, -3.0, -1.0, -0.3, -1e-10, 1e-10, 0.4, 1.0, 5.0, 40.0]


@pytest.mark.parametrize("rules", [ATTN_LRP, CP_LRP], ids=lambda rules: rules.name)
@pytest.mark.parametrize("function", ACTIVATIONS)
def test_activation_functions_pass_relevance_through(function: Callable, rules: Composite) -> None:
    found = run(lambda x: function(x), rules, x=POINTS)
    expected = function(torch.tensor(POINTS, dtype=torch.float64))
    # GELU's own 1 + erf cancels in the negative tail, where the auditor's erfc doesn't: hence an absolute part
    torch.testing.assert_close(found.relevance["x"], expected, rtol=1e-13, atol=1e-14)
    assert found.unknown == ()


def test_activation_functions_in_place() -> None:
    for name in IN_PLACE:
        found = run(lambda x, name=name: getattr(x * 1, name)(), x=POINTS)
        expected = getattr(torch.tensor(POINTS, dtype=torch.float64), name)()
        torch.testing.assert_close(found.relevance["x"], expected, rtol=1e-13, atol=0)
    for function in (F.hardtanh, F.elu, F.celu, F.leaky_relu, F.silu):
        found = run(lambda x, f=function: f(x * 1, inplace=True), x=POINTS)
        expected = function(torch.tensor(POINTS, dtype=torch.float64))
        torch.testing.assert_close(found.relevance["x"], expected, rtol=1e-13, atol=0)


def test_coefficients_at_zero_are_the_limits() -> None:
    limits = {F.silu: 0.5, F.gelu: 0.5, torch.tanh: 1.0, torch.erf: 2 / math.sqrt(math.pi), F.elu: 1.0, F.relu: 0.0}
    for function, limit in limits.items():
        # relevance at 0 is 0, so the coefficient is read one linear map further back: x - 2 at x = 2
        found = run(lambda x, f=function: f(x - torch.tensor(2.0, dtype=x.dtype)), x=2.0)  # no Python number: a gate
        assert found.relevance["x"] / 2 == pytest.approx(limit, rel=1e-15)


WRITTEN = {
    "gelu_new": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0)))),
    "gelu_fast": lambda x: 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x))),
    "gelu_python": lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": lambda x: torch.sigmoid(x) * x,
    "mish": lambda x: x * torch.tanh(F.softplus(x)),
    "hard_swish": lambda x: x * F.relu6(x + 3) / 6,
}


@pytest.mark.parametrize("name", WRITTEN)
def test_activation_functions_written_in_primitives(name: str) -> None:
    function, x = WRITTEN[name], torch.tensor(POINTS, dtype=torch.float64)
    found = run(lambda x: function(x * 1), x=x)
    torch.testing.assert_close(found.relevance["x"], function(x), rtol=1e-13, atol=1e-14)
    # as the gate of an MLP it is one
    gated = run(lambda g, u: function(g) * u, CP_LRP, g=x, u=x + 1)
    assert gated.relevance["g"].abs().max() == 0
    torch.testing.assert_close(gated.relevance["u"], function(x) * (x + 1))
    # where activations are differentiated, it is differentiated as a whole
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(leaf).sum(), leaf)
    found = run(lambda x: function(x), ATTN_LRP.but(activation="gradient"), x=x)
    torch.testing.assert_close(found.relevance["x"], x * gradient, rtol=1e-13, atol=0)


X = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
W = torch.randn(6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
C = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def standardized(x: Tensor, dim: int | tuple[int, ...], correction: int = 0) -> Tensor:
    deviation = (x.var(dim, correction=correction, keepdim=True) + 1e-5).sqrt()
    return (x - x.mean(dim, keepdim=True)) / deviation.detach()


def root_mean_square(x: Tensor) -> Tensor:
    return (x.square().mean(1, keepdim=True) + 1e-5).sqrt().detach()


def with_var_mean(x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, 1, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + 1e-5) * C


NORMS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {  # and with the deviation detached
    "layer norm": (lambda x: F.layer_norm(x.mT, (6,), W) * C.mT, lambda x: standardized(x, 1) * W[:, None] * C),
    "rms norm": (lambda x: F.rms_norm(x.mT, (6,), W, 1e-5) * C.mT, lambda x: x / root_mean_square(x) * W[:, None] * C),
    "written rms norm": (
        lambda x: W[:, None] * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5)) * C,
        lambda x: x / root_mean_square(x) * W[:, None] * C,
    ),
    "var_mean": (with_var_mean, lambda x: standardized(x, 1, correction=1) * C),
    "group norm": (
        lambda x: F.group_norm(x, 2, W) * C,
        lambda x: standardized(x.reshape(2, 2, 12), 2).reshape(2, 6, 4) * W[:, None] * C,
    ),
    "batch norm of the batch": (
        lambda x: F.batch_norm(x, None, None, W, training=True) * C,
        lambda x: standardized(x, (0, 2)) * W[:, None] * C,
    ),
    "normalize": (lambda x: F.normalize(x, dim=1) * C, lambda x: x / x.norm(dim=1, keepdim=True).detach() * C),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_divide_by_a_constant(name: str) -> None:
    norm, twin = NORMS[name]
    x = X.clone().requires_grad_()
    (coefficient,) = torch.autograd.grad(twin(x).sum(), x)
    found = run(norm, x=X)
    torch.testing.assert_close(found.value, twin(x).sum().detach())
    torch.testing.assert_close(found.relevance["x"], X * coefficient, rtol=1e-12, atol=1e-14)
    # and with norm="gradient" the squares inside are differentiated too, not shared
    (gradient,) = torch.autograd.grad(norm(x).sum(), x)
    found = run(norm, ATTN_LRP.but(norm="gradient"), x=X)
    torch.testing.assert_close(found.relevance["x"], X * gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rules", [ATTN_LRP, GRADIENT])
def test_batch_norm_by_running_statistics(rules: Composite) -> None:
    # for one sample and a gradient in another memory format, torch's own backward is wrong (torch 2.13, CPU)
    images, gradient = X.reshape(1, 6, 2, 4), C.reshape(1, 8, 6)
    found = run(lambda x: F.batch_norm(x, W, W**2, W).flatten(2).transpose(1, 2) * gradient, rules, x=images)
    scale = (W / (W**2 + 1e-5).sqrt()).view(1, 6, 1, 1)
    expected = images * scale * gradient.mT.reshape(1, 6, 2, 4)
    torch.testing.assert_close(found.relevance["x"], expected, rtol=1e-12, atol=1e-14)


Q, K, V, G = torch.randn(4, 1, 2, 5, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64).unbind()


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT * 3**-0.5, -1) @ v * G


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("qkv", [(0.25, 0.25, 0.5), (0.5, 0.5, 1.0), (0.3, 0.1, 0.6)])
def test_attention_by_hand(qkv: tuple[float, float, float], temperature: float) -> None:
    scale = 3**-0.5
    logits = Q @ K.mT * scale
    weights, softened = logits.softmax(-1), (logits / temperature).softmax(-1)
    c_weights = G @ V.mT
    c_logits = softened * (c_weights - (softened * c_weights).sum(-1, keepdim=True)) * scale
    expected = (Q * (c_logits @ K) * qkv[0], K * (c_logits.mT @ Q) * qkv[1], V * (weights.mT @ G) * qkv[2])
    found = run(attention, ATTN_LRP.but(qkv=qkv, softmax_temperature=temperature), q=Q, k=K, v=V)
    for name, value in zip("qkv", expected, strict=True):
        torch.testing.assert_close(found.relevance[name], value, rtol=1e-12, atol=1e-14)
    if temperature == 1:
        fused = run(lambda q, k, v: F.scaled_dot_product_attention(q, k, v) * G, ATTN_LRP.but(qkv=qkv), q=Q, k=K, v=V)
        for name, value in zip("qkv", expected, strict=True):
            torch.testing.assert_close(fused.relevance[name], value, rtol=1e-12, atol=1e-14)


def test_a_constant_softmax_gives_all_to_the_values() -> None:
    for formula in (attention, lambda q, k, v: F.scaled_dot_product_attention(q, k, v) * G):
        found = run(formula, CP_LRP, q=Q, k=K, v=V)
        assert found.relevance["q"].abs().max() == found.relevance["k"].abs().max() == 0
        torch.testing.assert_close(found.relevance["v"].sum(), found.value)


def test_a_sigmoid_in_attention_is_not_a_gate() -> None:
    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.sigmoid(q @ k.mT) @ v * G

    weights = torch.sigmoid(Q @ K.mT)
    c_logits = weights * (1 - weights) * (G @ V.mT)
    torch.testing.assert_close(run(formula, q=Q, k=K, v=V).relevance["q"], Q * (c_logits @ K) / 4)
    assert run(formula, CP_LRP, q=Q, k=K, v=V).relevance["q"].abs().max() == 0


def test_a_softmax_written_out_keeps_its_exponentials_and_stops_its_sum() -> None:
    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.exp(q @ k.mT)
        return weights / weights.sum(-1, keepdim=True) @ v * G

    c_logits = torch.softmax(Q @ K.mT, -1) * (G @ V.mT)
    torch.testing.assert_close(run(formula, q=Q, k=K, v=V).relevance["q"], Q * (c_logits @ K) / 4)
    assert run(formula, CP_LRP, q=Q, k=K, v=V).relevance["q"].abs().max() == 0


def test_a_router_shares_or_stops() -> None:
    def routed(x: Tensor, e: Tensor) -> Tensor:
        weights = torch.softmax(x, -1).topk(2).values
        return (weights / weights.sum(-1, keepdim=True))[:, None] * e

    x, e = torch.tensor([0.0, 1.0, 3.0]).double(), torch.tensor([[1.0, 2.0], [3.0, 5.0]]).double()
    stopped = run(routed, ATTN_LRP.but(router="stop"), x=x, e=e)
    assert stopped.relevance["x"].abs().max() == 0
    torch.testing.assert_close(stopped.relevance["e"].sum(), stopped.value)
    shared = run(routed, x=x, e=e)
    torch.testing.assert_close(shared.relevance["e"], stopped.relevance["e"] / 2)
    # the weight's half goes through the softmax, with the renormalising sum constant
    leaf = x.clone().requires_grad_()
    weights = torch.softmax(leaf, -1).topk(2).values
    coefficient = ((weights / weights.sum().detach())[:, None] * e).sum() / 2
    torch.testing.assert_close(shared.relevance["x"], x * torch.autograd.grad(coefficient, leaf)[0])


def test_a_gated_linear_unit() -> None:
    x = torch.tensor([2.0, 3.0, 0.0, 1.0], dtype=torch.float64)
    for rules in (ATTN_LRP, CP_LRP):
        found = run(lambda x: F.glu(x, -1), rules, x=x)
        assert found.relevance["x"].tolist() == pytest.approx([1.0, 3 * sigmoid(1.0), 0.0, 0.0], rel=1e-15)


def test_a_stopped_path_may_have_an_infinite_derivative() -> None:
    found = run(lambda a, b: torch.sqrt(a) * b + (a.norm() + 1) * b, a=[0.0], b=[2.0])
    assert found.relevance["a"].tolist() == [0.0]
    assert found.relevance["b"].tolist() == [2.0]


def test_the_logarithm_of_1_plus_x_is_an_activation() -> None:
    assert relevance(torch.log1p, x=3.0) == pytest.approx([math.log(4.0)])
    assert relevance(torch.log1p, x=0.0) == [0.0]


def test_a_number_to_the_power_of_an_activation_is_constant() -> None:
    assert relevance(lambda x: 2.0**x + x, x=3.0) == [3.0]
    assert relevance(lambda x: 2.0**x + x, x=[3.0, 2.0]) == [[3.0, 2.0]]


def test_a_log_of_summed_exponentials_is_constant() -> None:
    found = run(lambda x: torch.logaddexp(x, -x) + x, x=[3.0, 2.0])
    assert found.relevance["x"].tolist() == [3.0, 2.0]
    assert found.unknown == ()


def test_a_bounded_gate_is_a_gate() -> None:
    by_hand = [0.0, 0.5 * 3.0]
    assert relevance(lambda gate, up: torch.relu(gate).clamp(-0.5, 0.5) * up, "cp", gate=2.0, up=3.0) == by_hand
