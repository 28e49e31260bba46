"""f(x) / x as the backward of the identity rule gives it, over every finite 16-bit number."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers.activations as activations
from equations_rules import COEFFICIENTS as EXACT
from torch import Tensor
from torch.nn import functional as F

from lxt.coefficients import COEFFICIENTS, clipped_gelu, ratio
from lxt.rules import identity

# name in lxt.coefficients -> (forward, name of the reference)
FUNCTIONS = {
    "silu": (F.silu, "silu"),
    "gelu": (F.gelu, "gelu"),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), "gelu_tanh"),
    "quick_gelu": (activations.QuickGELUActivation(), "quick_gelu"),
    "relu": (F.relu, "relu"),
    "relu_squared": (activations.ReLUSquaredActivation(), "relu2"),
    "tanh": (torch.tanh, "tanh"),
    "mish": (F.mish, "mish"),
}
SIXTEEN_BITS = (torch.bfloat16, torch.float16)


def every_finite(dtype: torch.dtype) -> Tensor:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return x[x.isfinite()]


def ordered(x: Tensor) -> Tensor:
    """Integers in the order of the 16-bit floats: neighbours differ by one, and both zeros are 0."""
    bits = x.view(torch.int16).to(torch.int32)
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def unordered(i: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(i < 0, -i | 0x8000, i).to(torch.int16).view(dtype)


def coefficient(name: str, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    y = identity(x, FUNCTIONS[name][0], name)
    return torch.autograd.grad(y, x, torch.ones_like(y))[0]


def exact(name: str, x: Tensor) -> np.ndarray:
    return EXACT[FUNCTIONS[name][1]](x.double().numpy())


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_within_one_ulp_over_every_finite_number(name, dtype):
    x = every_finite(dtype)
    assert len(x) == 2**16 - 2 * 2 ** (7 if dtype == torch.bfloat16 else 10)
    c = coefficient(name, x)
    assert c.dtype == dtype
    assert c.isfinite().all()
    # The float64 value lies between the result's two neighbours, so it is less than an ulp away; float32, which
    # computes it, may flush to zero what lies below its smallest normal number.
    below, above = (unordered(ordered(c) + step, dtype).double().numpy() for step in (-1, 1))
    value = exact(name, x)
    wrong = ~((below <= value) & (value <= above)) & (value > torch.finfo(torch.float32).tiny)
    assert not wrong.any(), f"{wrong.sum()} wrong, the first at x = {x[torch.from_numpy(wrong)][0].item()!r}"


def relative_bound(value: np.ndarray, eps: float) -> np.ndarray:
    # A rounding of the argument u of exp costs |u| eps, and |u| is |log c| where a tail decays: 2 of those and 4
    # roundings around them.
    with np.errstate(divide="ignore"):
        return eps * (4 + 2 * np.abs(np.log(np.where(value > 0, np.minimum(value, 1), 1))))


def float32_sample() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (300_000,), generator=generator).to(torch.int32).view(torch.float32)
    moderate = torch.randn(200_000, generator=generator) * 6
    tiny, largest = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    special = torch.tensor([0.0, 1e-10, 1e-45, tiny, tiny / 8, largest, 1.0, 10.0, 20.0, 88.0, 104.0])
    x = torch.cat((bits, moderate, special, -special))
    return x[x.isfinite()]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_float32_to_a_few_roundings(name):
    x = float32_sample()
    c = coefficient(name, x)
    assert c.isfinite().all()
    value = exact(name, x)
    # exp of the far negative tail may be flushed to zero, so below the smallest normal number anything smaller will do
    allowed = relative_bound(value, torch.finfo(torch.float32).eps) * value + torch.finfo(torch.float32).tiny
    wrong = np.abs(c.double().numpy() - value) > allowed
    assert not wrong.any(), f"{wrong.sum()} wrong, the first at x = {x[torch.from_numpy(wrong)][0].item()!r}"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_float64_to_1e_14(name):
    generator = torch.Generator().manual_seed(0)
    special = torch.tensor([0.0, -0.0, 5e-324, -5e-324, 1e-310, 1e-10, -1e-10, 1e-3, -1e-3], dtype=torch.float64)
    middle = torch.rand(5_000, generator=generator, dtype=torch.float64) * 10 - 5
    x = torch.cat((special, middle, special.new_tensor([1.7e308, -1.7e308, 40.0, -40.0, 700.0, -700.0])))
    c, value = coefficient(name, x).numpy(), exact(name, x)
    assert np.isfinite(c).all()
    inside = np.abs(x.numpy()) <= 5
    np.testing.assert_allclose(c[inside], value[inside], rtol=1e-14, atol=0)
    allowed = relative_bound(value, np.finfo(np.float64).eps) * value + np.finfo(np.float64).tiny
    assert (np.abs(c - value) <= allowed).all()


@pytest.mark.parametrize("dtype", [*SIXTEEN_BITS, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_is_the_function_itself(name, dtype):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    function = FUNCTIONS[name][0]
    assert torch.equal(identity(x.requires_grad_(), function, name), function(x.detach()))


# The other named coefficients: the domain on which f is defined and finite in every dtype.
OTHERS = {
    "hardswish": (F.hardswish, lambda x: x.abs() >= 0),
    "softsign": (F.softsign, lambda x: x.abs() >= 0),
    "relu6": (F.relu6, lambda x: x.abs() >= 0),
    "erf": (torch.erf, lambda x: x.abs() >= 0),
    "expm1": (torch.expm1, lambda x: x < 11),
    "asinh": (torch.asinh, lambda x: x.abs() >= 0),
    "atan": (torch.atan, lambda x: x.abs() >= 0),
    "sinh": (torch.sinh, lambda x: x.abs() < 11),
    "tan": (torch.tan, lambda x: x.abs() < 1.5),
    "log1p": (torch.log1p, lambda x: x > -1),
}


def test_every_named_coefficient_is_tested():
    assert set(OTHERS) | set(FUNCTIONS) == set(COEFFICIENTS)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("name", OTHERS)
def test_other_coefficients_return_the_relevance(name, dtype):
    function, domain = OTHERS[name]
    x = every_finite(dtype)
    x = x[domain(x)]
    leaf = x.clone().requires_grad_()
    y = identity(leaf, function, name)
    (c,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    assert c.isfinite().all()
    # x c = f(x): a rounding of c to 16 bits, half an ulp, and float32 arithmetic before it
    normal = (x.double().abs() > torch.finfo(dtype).tiny) & (c.abs() > torch.finfo(dtype).tiny)
    expected = function(x.double())
    error = (x.double() * c.double() - expected).abs()
    assert (error[normal] <= 0.51 * torch.finfo(dtype).eps * expected.abs()[normal]).all()


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_clipped_gelu(dtype):
    low, high = -0.1, 3.0
    x = every_finite(dtype)
    c = clipped_gelu(x.float(), low, high).double()
    assert c.isfinite().all()
    phi = EXACT["gelu"](x.double().numpy())  # torch's gelu in float64 cancels in its tail
    expected = (x.double().numpy() * phi).clip(low, high)
    bound = relative_bound(phi, torch.finfo(torch.float32).eps) * np.abs(expected) + torch.finfo(torch.float32).tiny
    assert (np.abs(x.double().numpy() * c.numpy() - expected) <= bound).all()


def test_ratio_has_its_limit_at_both_zeros():
    x = torch.tensor([0.0, -0.0, 2.0])
    assert ratio(x * 3, x, limit=7.0).tolist() == [7.0, 7.0, 3.0]
