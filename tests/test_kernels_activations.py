"""The activations' kernels against their twins and, over the whole range, against the equations in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from kernels import DEVICE, DTYPES, INTERPRETED, LAYOUTS, assert_close, coefficients, far_apart, step
from torch import Tensor

pytest.importorskip("triton")

from lxt import rules
from lxt.coefficients import COEFFICIENTS
from lxt.triton_kernels.activations import FORMS
from lxt.triton_kernels.gated_product import gated_product
from lxt.triton_kernels.identity import identity

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "hardswish": F.hardswish,
    "mish": F.mish,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu6": F.relu6,
    "relu_squared": lambda x: F.relu(x).square(),
    "silu": F.silu,
    "softsign": F.softsign,
    "tanh": torch.tanh,
}


@pytest.fixture(autouse=True)
def _eager_twins(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setenv("LXT_KERNELS", "off")


def awkward(dtype: torch.dtype) -> Tensor:
    """Both zeros, the smallest and largest numbers, and tails, in a size that fills no tile."""
    limits = torch.finfo(dtype)
    least = limits.tiny if INTERPRETED and dtype == torch.bfloat16 else limits.tiny / 4  # it reads subnormals as 0
    edges = [0.0, -0.0, limits.tiny, -limits.tiny, limits.max, limits.min, least, 1e-3, -1e-3]
    tails = torch.linspace(-30, 30, 1021)
    return torch.cat((torch.tensor(edges), tails)).to(DEVICE, dtype)


def test_every_form_is_tested():
    assert FUNCTIONS.keys() == FORMS
    assert FORMS <= COEFFICIENTS.keys()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sorted(FORMS))
def test_identity(name, dtype):
    x = awkward(dtype)
    y, (c,), c_y = coefficients(lambda x: identity(x, FUNCTIONS[name], name), x)
    twin, (expected,), _ = coefficients(lambda x: rules.identity(x, FUNCTIONS[name], name), x, c_y=c_y)
    assert torch.equal(y, twin)
    assert c.isfinite().all()
    # Tails of 1e-30 stand behind an exponential of a float32: its argument's rounding counts 70 times there.
    assert_close(c, expected, 2 * step(dtype) + 200 * 2**-24)


@pytest.mark.parametrize("name", sorted(FORMS))
def test_coefficients_are_right_in_the_tails(name):
    # To the closed forms in float64: in the far tail the twin in float32 errs as much as the kernel may.
    x = awkward(torch.float32)
    _, (c,), _ = coefficients(lambda x: identity(x, FUNCTIONS[name], name), x, c_y=torch.ones_like(x))
    exact = COEFFICIENTS[name](x.double())
    seen = exact.abs() > torch.finfo(torch.float32).smallest_normal
    error = ((c.double() - exact) / exact)[seen].abs().max().item()
    # A rounding of exp's argument u costs |u| units, and u goes to -87 before the result is no normal number. GELU's
    # square is split, so that only its polynomial and a few products round; hardswish cancels near -3.
    assert error < (12 if name in ("gelu", "softsign", "tanh") else 4 * 87) * 2**-24
    assert c[~seen].abs().max() <= 2 * torch.finfo(torch.float32).smallest_normal


@pytest.mark.parametrize("name", sorted(FORMS))
def test_infinities_and_nan_are_the_twins(name):
    x = torch.tensor([torch.nan, torch.inf, -torch.inf], device=DEVICE)
    _, (c,), c_y = coefficients(lambda x: identity(x, FUNCTIONS[name], name), x)
    _, (expected,), _ = coefficients(lambda x: rules.identity(x, FUNCTIONS[name], name), x, c_y=c_y)
    torch.testing.assert_close(c, expected, equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_identity_of_any_layout(layout, dtype):
    x = LAYOUTS[layout](torch.randn(3, 5, 7, device=DEVICE).to(dtype))
    y, (c,), c_y = coefficients(lambda x: identity(x, F.silu, "silu"), x)
    _, (expected,), _ = coefficients(lambda x: rules.identity(x, F.silu, "silu"), x, c_y=c_y)
    assert torch.equal(y, F.silu(x))
    assert_close(c, expected, 2 * step(dtype) + 2**-21)


def test_identity_of_a_number_and_of_an_expanded_gradient():
    x = torch.tensor(0.7, device=DEVICE, requires_grad=True)
    (c,) = torch.autograd.grad(identity(x, F.silu, "silu"), x)
    torch.testing.assert_close(c, torch.sigmoid(x.detach()))
    x = torch.randn(3, 5, device=DEVICE, requires_grad=True)
    (c,) = torch.autograd.grad(identity(x, F.silu, "silu").sum(), x)  # a stride of 0
    torch.testing.assert_close(c, torch.sigmoid(x.detach()))


def test_a_second_derivative_raises():
    x = torch.randn(4, device=DEVICE, requires_grad=True)
    c_y = torch.randn(4, device=DEVICE, requires_grad=True)
    (c,) = torch.autograd.grad(identity(x, F.silu, "silu"), x, c_y, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        c.sum().backward()


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
@pytest.mark.parametrize("stop_gate", [False, True], ids=["uniform", "stop_gate"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sorted(FORMS))
def test_gated_product(name, dtype, stop_gate, exact):
    gate = awkward(dtype)[None]
    up = torch.randn(gate.shape, device=DEVICE).to(dtype)
    up[0, :9] = torch.tensor([2.0, -2.0, 1.0, 1.0, 0.5, -0.5, 1.0, 1e4, -0.0])
    c_y = torch.rand(gate.shape, device=DEVICE).to(dtype) * 0.5  # the largest numbers stay finite
    function = FUNCTIONS[name]
    if name == "relu_squared":
        gate.clamp_(max=50)  # its square is the function's own, and infinite
    y, (c_gate, c_up), _ = coefficients(
        lambda g, u: gated_product(g, u, function, name, stop_gate, exact), gate, up, c_y=c_y
    )
    twin = rules.gated_product(gate, up, function, name, stop_gate)
    # In float64, since torch's functions lose their tails to cancellation (mish, GELU's tanh form).
    ratio, u, c = COEFFICIENTS[name](gate.double()), up.double(), c_y.double() * (1 if stop_gate else 0.5)
    f = (gate.double() * ratio).to(dtype).double()
    rtol = 3 * step(dtype) + 200 * 2**-24  # f(gate) is rounded, then its product; far tails as above
    if exact:
        assert torch.equal(y, twin)
    else:
        assert_close(y, (f * u).to(dtype), rtol)
    if exact and stop_gate:
        assert_close(c_up, (c * function(gate).double()).to(dtype), rtol)
    else:
        assert_close(c_up, (c * f).to(dtype), rtol)
    if stop_gate:
        assert c_gate is None
    else:
        assert_close(c_gate, (c * (ratio * u)).to(dtype), rtol)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 3, 1031), (5, 7), (1, 2)], ids=str)
def test_gated_product_of_any_layout(layout, shape, exact):
    gate, up = (torch.randn(shape, device=DEVICE) for _ in range(2))
    gate, up = LAYOUTS[layout](gate), up[:0] if layout == "empty" else up
    y, found, c_y = coefficients(lambda g, u: gated_product(g, u, F.silu, "silu", False, exact), gate, up)
    twin, expected, _ = coefficients(lambda g, u: rules.gated_product(g, u, F.silu, "silu"), gate, up, c_y=c_y)
    assert_close(y, twin, 2**-21)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, 2**-21)


def test_gated_product_of_rows_far_apart():
    gate, up = far_apart(20), torch.full((4, 20), 2.0, device=DEVICE).half()
    for a, b in ((gate, up), (up, gate)):
        c = torch.autograd.grad(
            gated_product(a.requires_grad_(), b.requires_grad_(), F.silu, "silu", False, False), (a, b), far_apart(20)
        )
        assert_close(c[0], (b * 0.5 * torch.sigmoid(a.float())).half(), 2**-10)
        assert_close(c[1], (a * 0.5 * torch.sigmoid(a.float())).half(), 2**-9)


def test_gated_product_of_mixed_dtypes():
    gate = torch.randn(3, 5, device=DEVICE).half()
    up = torch.randn(3, 5, device=DEVICE)
    for exact in (True, False):
        run = partial(gated_product, activation=F.silu, coefficient="silu", exact=exact)
        y, found, c_y = coefficients(run, gate, up)
        twin, expected, _ = coefficients(lambda g, u: rules.gated_product(g, u, F.silu, "silu"), gate, up, c_y=c_y)
        assert_close(y, twin, 2**-10)
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b, 2**-10)
