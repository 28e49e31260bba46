"""The rules that can be declared, each against its equation."""

from __future__ import annotations

import pytest
import torch
from declared import assert_same, attention, kernel, masked, rms, some, swiglu
from torch.nn import functional as F

import lxt
from lxt.mode import RuleMode

PRESETS = (lxt.ATTN_LRP, lxt.CP_LRP, lxt.GRADIENT)


def coefficients(function, composite, inputs, c):
    with RuleMode(composite):
        y = function(*inputs)
    return torch.autograd.grad(y, inputs, c, allow_unused=True)


def test_identity_is_the_quotient_and_its_limit_at_zero():
    x = torch.tensor([-3.0, -1e-9, 0.0, 1e-300, 0.5, 4.0], dtype=torch.float64, requires_grad=True)
    c = torch.arange(1.0, 7.0, dtype=torch.float64)
    declared = lxt.declare(kernel(lambda x: torch.tanh(x)), "identity")
    (found,) = coefficients(declared, lxt.ATTN_LRP, [x], c)
    quotient = torch.where(x == 0, 1.0, torch.tanh(x) / torch.where(x == 0, 1.0, x))
    assert_same(found, (quotient * c).detach())
    (found,) = coefficients(declared, lxt.GRADIENT, [x], c)
    assert_same(found, ((1 - torch.tanh(x) ** 2) * c).detach())


def test_norm_takes_sigma_as_a_constant():
    (x,) = some((3, 4))
    with torch.no_grad():
        x[0, 2] = 0.0
    c = torch.randn_like(x)
    (found,) = coefficients(lxt.declare(kernel(rms), "norm"), lxt.ATTN_LRP, [x], c)
    sigma = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    assert_same(found, (c * sigma * torch.arange(1.0, 5.0, dtype=torch.float64)).detach())


def test_product_shares_among_its_activations():
    a, b, d = some((3,), (3,), (3,))
    c = torch.randn(3, dtype=torch.float64)
    declared = lxt.declare(kernel(lambda a, b, d: a * b * d), "product")
    assert_same(coefficients(declared, lxt.ATTN_LRP, [a, b, d], c), (b * d * c / 3, a * d * c / 3, a * b * c / 3))
    assert_same(coefficients(declared, lxt.GRADIENT, [a, b, d], c), (b * d * c, a * d * c, a * b * c))
    with RuleMode(lxt.ATTN_LRP):
        y = declared(a, b, d.detach())
    assert_same(torch.autograd.grad(y, a, c)[0], b * d * c / 2)


def test_gated_is_half_and_half_or_stops_its_gate():
    gate, up = some((5,), (5,))
    with torch.no_grad():
        gate[1] = 0.0
    c = torch.randn(5, dtype=torch.float64)
    declared, sigmoid, silu = lxt.declare(kernel(swiglu), "gated"), torch.sigmoid(gate), F.silu(gate)
    expected = {
        lxt.ATTN_LRP: (sigmoid * up * c / 2, silu * c / 2),
        lxt.CP_LRP: (None, silu * c),
        lxt.GRADIENT: (sigmoid * (1 + gate * (1 - sigmoid)) * up * c, silu * c),
        lxt.ATTN_LRP.but(product="gradient"): (sigmoid * up * c, silu * c),
        lxt.ATTN_LRP.but(activation="gradient"): (sigmoid * (1 + gate * (1 - sigmoid)) * up * c / 2, silu * c / 2),
    }
    for composite, values in expected.items():
        assert_same(coefficients(declared, composite, [gate, up], c), values)


def test_attention_has_the_composites_factors():
    q, k, v = some((4, 3), (4, 3), (4, 3))
    c = torch.randn(4, 3, dtype=torch.float64)
    declared = lxt.declare(kernel(attention), "attention")
    plain = torch.autograd.grad(attention(q, k, v), (q, k, v), c)
    for composite, shares in (
        (lxt.ATTN_LRP, (0.25, 0.25, 0.5)),
        (lxt.ATTN_LRP.but(qkv=(0.1, 0.3, 0.6)), (0.1, 0.3, 0.6)),
        (lxt.GRADIENT, (1, 1, 1)),
    ):
        expected = tuple(share * gradient for share, gradient in zip(shares, plain, strict=True))
        assert_same(coefficients(declared, composite, [q, k, v], c), expected)
    assert_same(coefficients(declared, lxt.CP_LRP, [q, k, v], c), (None, None, plain[2]))
    with RuleMode(lxt.ATTN_LRP):  # by keyword, and in another order
        y = declared(value=v, query=q, key=k)
    assert_same(torch.autograd.grad(y, v, c)[0], plain[2] / 2)


def test_linear_is_the_gradient_and_constant_is_none():
    x, y = some((3,), (3,))
    c = torch.randn(3, dtype=torch.float64)
    cubed = kernel(lambda x: x**3)
    assert_same(coefficients(lxt.declare(cubed, "linear"), lxt.ATTN_LRP, [x], c)[0], 3 * x**2 * c)
    with RuleMode(lxt.ATTN_LRP):
        assert not lxt.declare(cubed, "constant")(x).requires_grad
        assert_same(torch.autograd.grad(lxt.declare(cubed, "constant")(x) * y, y, c)[0], (x**3 * c).detach())


def test_a_reference_gives_the_rules_and_the_function_its_numbers():
    gate, up = some((5,), (5,), dtype=torch.float32)
    c = torch.randn(5)
    off = kernel(lambda gate, up: F.silu(gate) * up * (1 + 1e-6))
    for composite in PRESETS:
        assert_same(
            coefficients(lxt.declare(off, swiglu), composite, [gate, up], c),
            coefficients(swiglu, composite, [gate, up], c),
        )
    with RuleMode(lxt.ATTN_LRP):
        assert torch.equal(lxt.declare(off, swiglu)(gate, up), off(gate, up))
        wrong = lxt.declare(off, lambda gate, up: F.silu(up) * gate)
        with pytest.raises(ValueError, match=r"the reference declared for call differs by .* it must compute the same"):
            wrong(gate, up)
        with pytest.raises(ValueError, match=r"has shape \(4,\), where call gives shape \(5,\)"):
            lxt.declare(off, lambda gate, up: gate[1:])(gate, up)
        with pytest.raises(ValueError, match="differs by nan"):
            lxt.declare(off, lambda gate, up: swiglu(gate, up) * torch.nan)(gate, up)


def test_a_reference_may_be_infinite_where_the_function_is():
    (scores,) = some((5,))
    mask = torch.tensor([0.0, -torch.inf, 0.0, 0.0, -torch.inf])
    masked = lxt.declare(kernel(lambda x: x + mask), lambda x: x + mask)
    with RuleMode(lxt.ATTN_LRP):
        assert torch.equal(masked(scores), scores + mask)


def test_an_identity_makes_a_gate():
    gate, up = some((5,), (5,))
    act = lxt.declare(kernel(lambda x: F.silu(x)), "identity")
    c = torch.randn(5, dtype=torch.float64)
    found = coefficients(lambda gate, up: act(gate) * up, lxt.CP_LRP, [gate, up], c)
    assert_same(found, (None, F.silu(gate) * c))


def test_16_bits_stay_finite():
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.tensor([0.0, -0.0, 1e-7, -6e-8, 300.0], dtype=dtype, requires_grad=True)
        (found,) = coefficients(lxt.declare(kernel(lambda x: F.gelu(x)), "identity"), lxt.ATTN_LRP, [x], x.new_ones(5))
        assert found.isfinite().all()
        assert found.dtype == dtype
        assert float(found[0]) == pytest.approx(0.5)


def test_a_mask_that_depends_on_the_input_is_a_constant():
    q, k, v, mask = some((4, 3), (4, 3), (4, 3), (4, 4))
    c = torch.randn(4, 3, dtype=torch.float64)
    declared = lxt.declare(kernel(masked), "attention")
    assert coefficients(declared, lxt.ATTN_LRP, [q, k, v, mask], c)[3] is None
    assert coefficients(declared, lxt.GRADIENT, [q, k, v, mask], c)[3] is not None


def test_a_call_of_another_form_is_refused():
    a, b = some((3,), (3,))
    with RuleMode(lxt.ATTN_LRP):
        with pytest.raises(ValueError, match=r"call is declared 'identity', the rule of a function of one .* got 2"):
            lxt.declare(kernel(lambda a, b: a * b), "identity")(a, b)
        with pytest.raises(ValueError, match=r"one tensor of its input's shape \(3,\), got shape \(\)"):
            lxt.declare(kernel(lambda a: a.sum()), "norm")(a)
    with RuleMode(lxt.ATTN_LRP.but(softmax_temperature=2.0)), pytest.raises(ValueError, match="needs the softmax"):
        lxt.declare(kernel(attention), "attention")(*some((4, 3), (4, 3), (4, 3)))
