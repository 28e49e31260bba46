"""The norms' kernels against their twins: the same casts, and gradients to a rounding or two."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from kernels import DEVICE, DTYPES, INTERPRETED, LAYOUTS, assert_close, coefficients, far_apart, step
from torch import Tensor

pytest.importorskip("triton")

from lxt import rules
from lxt.triton_kernels.layer_norm import layer_norm
from lxt.triton_kernels.relevance import relevance
from lxt.triton_kernels.rms_norm import TILE, rms_norm

EPS = 1e-6
STYLES = ("llama", "gemma", "t5")
# A row, rows that share a program, a tile with a tail, and a row of several tiles.
SHAPES = [(2, 3, 7), (1, 1), (70, 16), (3, 257), (2, TILE + 5)]


@pytest.fixture(autouse=True)
def _eager_twins(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setenv("LXT_KERNELS", "off")


def grown(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output and c of rows far apart; memory is not poisoned, which would touch what lies between them."""
    x = far_apart(20).requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad(y, x, far_apart(20))


def rounding(dtype: torch.dtype, times: int) -> float:
    """`times` results in `dtype`, each of a short chain in float32."""
    return times * step(dtype) + 8 * 2**-24


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("style", STYLES)
def test_rms_norm(style, dtype, shape, exact):
    x = (torch.randn(shape, device=DEVICE) * 3).to(dtype)
    weight = torch.randn(shape[-1], device=DEVICE).to(dtype)
    y, (c,), c_y = coefficients(lambda x: rms_norm(x, weight, EPS, style, exact), x)
    twin, (expected,), _ = coefficients(lambda x: rules.rms_norm(x, weight, EPS, style), x, c_y=c_y)
    if exact and not (INTERPRETED and dtype == torch.bfloat16):
        assert torch.equal(y, twin)
        assert torch.equal(c, expected)
    else:
        assert_close(y, twin, rounding(dtype, 3))
        assert_close(c, expected, rounding(dtype, 3))


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("style", STYLES)
def test_rms_norm_of_any_layout(style, layout, exact):
    x = LAYOUTS[layout](torch.randn(3, 5, 37, device=DEVICE))
    weight = torch.randn(37, device=DEVICE)
    y, (c,), c_y = coefficients(lambda x: rms_norm(x, weight, EPS, style, exact), x)
    twin, (expected,), _ = coefficients(lambda x: rules.rms_norm(x, weight, EPS, style), x, c_y=c_y)
    assert_close(y, twin, 2**-21)
    assert_close(c, expected, 2**-21)
    (strided,) = coefficients(lambda x: rms_norm(x, weight, EPS, style, exact), x, c_y=LAYOUTS[layout](c_y))[1]
    assert layout == "empty" or torch.equal(strided, c)


@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("style", STYLES)
def test_rms_norm_of_mixed_dtypes(style, weight_dtype, x_dtype):
    x = torch.randn(3, 21, device=DEVICE).to(x_dtype)
    weight = torch.randn(21, device=DEVICE).to(weight_dtype)
    y, (c,), c_y = coefficients(lambda x: rms_norm(x, weight, EPS, style), x)
    twin, (expected,), _ = coefficients(lambda x: rules.rms_norm(x, weight, EPS, style), x, c_y=c_y)
    if INTERPRETED and torch.bfloat16 in (x_dtype, weight_dtype):
        assert_close(y, twin, rounding(torch.bfloat16, 3))
        assert_close(c, expected, rounding(torch.bfloat16, 3))
    else:
        assert torch.equal(y, twin)
        assert torch.equal(c, expected)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e15], ids=str)
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
def test_rms_norm_of_zeros_and_of_huge_numbers(size, exact):
    x = torch.randn(2, 33, device=DEVICE) * size
    weight = torch.ones(33, device=DEVICE)
    y, (c,), c_y = coefficients(lambda x: rms_norm(x, weight, EPS, "llama", exact), x)
    twin, (expected,), _ = coefficients(lambda x: rules.rms_norm(x, weight, EPS, "llama"), x, c_y=c_y)
    assert y.isfinite().all()
    assert c.isfinite().all()
    assert_close(y, twin, 2**-21)
    assert_close(c, expected, 2**-21)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm(dtype, shape, weighted):
    x = (torch.randn(shape, device=DEVICE) * 3).to(dtype)
    weight, bias = (torch.randn(shape[-1], device=DEVICE).to(dtype) if weighted else None for _ in range(2))
    y, (c,), c_y = coefficients(lambda x: layer_norm(x, shape[-1:], weight, bias, EPS), x)
    twin, (expected,), _ = coefficients(lambda x: rules.layer_norm(x, shape[-1:], weight, bias, EPS), x, c_y=c_y)
    assert torch.equal(y, twin)
    # The mean is subtracted, so what remains carries the row's rounding and not its own; rows of one are 0.
    assert_close(c, expected, rounding(dtype, 2), atol=2**-20 if shape[-1] > 1 else 0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("normalized", [(37,), (5, 37)], ids=str)
def test_layer_norm_of_any_layout(layout, normalized):
    x = LAYOUTS[layout](torch.randn(3, 5, 37, device=DEVICE))
    weight = torch.randn(normalized, device=DEVICE)
    y, (c,), c_y = coefficients(lambda x: layer_norm(x, normalized, weight), x)
    twin, (expected,), _ = coefficients(lambda x: rules.layer_norm(x, normalized, weight), x, c_y=c_y)
    assert torch.equal(y, twin)
    assert_close(c, expected, 2**-20, atol=2**-20)
    (strided,) = coefficients(lambda x: layer_norm(x, normalized, weight), x, c_y=LAYOUTS[layout](c_y))[1]
    assert layout == "empty" or torch.equal(strided, c)


def exact_relevance(x: Tensor, c: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """In float64; and the sum of the absolute values, which the rounding is relative to."""
    product = (x.double() * c.double()).unflatten(-1, (groups, -1))
    return product.sum(-1), product.abs().sum(-1)


@pytest.mark.parametrize("groups", [None, 1, 4])
@pytest.mark.parametrize("hidden", [4, 36, 4 * 523], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_relevance(layout, dtype, hidden, groups):
    x, c = (torch.randn(2, 7, hidden, device=DEVICE).to(dtype) for _ in range(2))
    with torch.no_grad():
        found = relevance(LAYOUTS[layout](x), c[:0] if layout == "empty" else c, groups)
        assert torch.equal(relevance(c[:0] if layout == "empty" else c, LAYOUTS[layout](x), groups), found)
        twin = rules.relevance(LAYOUTS[layout](x), c[:0] if layout == "empty" else c, groups)
    assert found.shape == twin.shape
    assert found.dtype == twin.dtype == torch.float32
    if layout != "empty":
        expected, size = exact_relevance(x, c, groups or 1)
        assert ((found.double().view_as(expected) - expected).abs() <= 2**-20 * size).all()


def test_rows_far_apart():
    weight = torch.ones(20, device=DEVICE).half()
    for exact in (True, False):
        y, (c,) = grown(partial(rms_norm, weight=weight, eps=EPS, exact=exact))
        assert_close(y, torch.ones_like(y), 2**-9)
        assert_close(c, torch.ones_like(c), 2**-9)
    _, (c,) = grown(partial(layer_norm, normalized_shape=(20,), weight=weight))
    assert torch.equal(c, torch.zeros_like(c))
    x = far_apart(20)
    assert torch.equal(relevance(x, far_apart(20), 4), torch.full((4, 4), 5.0, device=DEVICE))


def test_relevance_of_nothing_and_of_uneven_groups():
    assert torch.equal(relevance(torch.ones(3, 0), torch.ones(3, 0)), torch.zeros(3))
    with pytest.raises(ValueError, match="10 numbers of a token can't be divided into 3 groups"):
        relevance(torch.ones(2, 10), torch.ones(2, 10), 3)
