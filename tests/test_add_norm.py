"""The residual connection with the norm behind it: the model's own numbers, and coefficients by the equation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy import ndarray
from torch import Tensor
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from lxt.rules import add_layer_norm, add_rms_norm, layer_norm, rms_norm

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
STYLES = {"llama": LlamaRMSNorm, "gemma": Gemma2RMSNorm, "t5": T5LayerNorm}
EPS = 1e-6
LAYOUTS = {
    "dense": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT,
    "empty": lambda x: x[:0],
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def coefficients(function, x: Tensor, residual: Tensor, c_normed: Tensor | None = None, c_summed: Tensor | None = None):
    """(normed, summed), c of both inputs, and the coefficients sent in; the backward is run twice."""
    leaves = [x.detach().requires_grad_(), residual.detach().requires_grad_()]
    outputs = function(*leaves)
    sent = [torch.randn_like(y) if c is None else c for y, c in zip(outputs, (c_normed, c_summed), strict=True)]
    kept = [c.clone() for c in sent]
    once = torch.autograd.grad(outputs, leaves, sent, retain_graph=True)
    twice = torch.autograd.grad(outputs, leaves, sent)
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(sent, kept, strict=True))
    return [y.detach() for y in outputs], once, sent


def rms_equation(summed: ndarray, weight: ndarray, c_normed: ndarray, c_summed: ndarray) -> ndarray:
    """c = c_summed + c_normed weight / sigma, number by number."""
    result = np.zeros_like(summed)
    for row in np.ndindex(summed.shape[:-1]):
        sigma = np.sqrt(sum(value**2 for value in summed[row]) / summed.shape[-1] + EPS)
        for i in range(summed.shape[-1]):
            result[(*row, i)] = c_summed[(*row, i)] + c_normed[(*row, i)] * weight[i] / sigma
    return result


def layer_norm_equation(summed: ndarray, weight: ndarray, c_normed: ndarray, c_summed: ndarray) -> ndarray:
    """c_j = c_summed_j + sum_i c_normed_i weight_i (delta_ij - 1/n) / sigma, number by number."""
    size = summed.shape[-1]
    result = c_summed.copy()
    for row in np.ndindex(summed.shape[:-1]):
        sigma = np.sqrt(((summed[row] - summed[row].mean()) ** 2).mean() + EPS)
        for i in range(size):
            for j in range(size):
                result[(*row, j)] += c_normed[(*row, i)] * weight[i] * ((i == j) - 1 / size) / sigma
    return result


def close(found: Tensor, expected: ndarray, dtype: torch.dtype) -> None:
    """To a few roundings of the row's largest number; RMSNorm's statistics are float32 in float64, too."""
    assert found.dtype == dtype
    limit = 4 * max(torch.finfo(dtype).eps, 2**-23)
    scale = np.abs(expected).max() if expected.size else 0.0
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=limit, atol=limit * scale)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("style", STYLES)
def test_add_rms_norm(style, dtype, layout):
    x, residual = (layout(torch.randn(2, 5, 7).mul(3).to(dtype)) for _ in range(2))
    module = STYLES[style](7, eps=EPS).to(dtype)
    module.weight.data.add_(torch.randn(7).to(dtype) / 2)
    weight = module.weight.detach()
    (normed, summed), found, sent = coefficients(lambda x, r: add_rms_norm(x, r, weight, EPS, style), x, residual)
    assert torch.equal(summed, residual + x)
    assert torch.equal(normed, module(residual + x))
    scale = weight.double().numpy() + (style == "gemma")
    expected = rms_equation(summed.double().numpy(), scale, *(c.double().numpy() for c in sent))
    for c in found:
        close(c, expected, dtype)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_layer_norm(dtype, affine, layout):
    x, residual = (layout(torch.randn(2, 5, 7).mul(3).add(1).to(dtype)) for _ in range(2))
    weight, bias = torch.randn(2, 7).to(dtype) if affine else (None, None)
    (normed, summed), found, sent = coefficients(
        lambda x, r: add_layer_norm(x, r, (7,), weight, bias, EPS), x, residual
    )
    assert torch.equal(summed, residual + x)
    assert torch.equal(normed, F.layer_norm(residual + x, (7,), weight, bias, EPS))
    scale = np.ones(7) if weight is None else weight.double().numpy()
    expected = layer_norm_equation(summed.double().numpy(), scale, *(c.double().numpy() for c in sent))
    for c in found:
        close(c, expected, dtype)


WEIGHT = torch.linspace(0.5, 2, 7, dtype=torch.float64)
PAIRS = {
    "rms": (lambda x, r: add_rms_norm(x, r, WEIGHT, EPS), lambda s: rms_norm(s, WEIGHT, EPS)),
    "layer": (lambda x, r: add_layer_norm(x, r, (7,), WEIGHT), lambda s: layer_norm(s, (7,), WEIGHT)),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("used", ["normed", "summed", "both"])
def test_either_output_may_go_unused(name, used):
    fused, norm = PAIRS[name]
    x, residual = torch.randn(2, 3, 7, dtype=torch.float64).requires_grad_()
    normed, summed = fused(x, residual)
    plain = residual + x
    pairs = {"normed": (normed, norm(plain)), "summed": (summed, plain), "both": (normed * summed, norm(plain) * plain)}
    found, expected = (torch.autograd.grad(y.sum(), (x, residual)) for y in pairs[used])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", PAIRS)
def test_one_input_may_be_a_constant(name):
    fused, norm = PAIRS[name]
    x, residual = torch.randn(2, 3, 7, dtype=torch.float64)
    for constant, leaf, function in ((x, residual, lambda r: fused(x, r)), (residual, x, lambda x: fused(x, residual))):
        leaf = leaf.detach().requires_grad_()
        (found,) = torch.autograd.grad(sum(y.sum() for y in function(leaf)), leaf)
        plain = constant + leaf
        (expected,) = torch.autograd.grad(plain.sum() + norm(plain).sum(), leaf)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("style", STYLES)
def test_a_stream_kept_in_float32(style):
    x, residual, weight = torch.randn(3, 7).bfloat16(), torch.randn(3, 7), torch.randn(7).bfloat16()
    (normed, summed), (c_x, c_residual), sent = coefficients(
        lambda x, r: add_rms_norm(x, r, weight, EPS, style), x, residual
    )
    assert summed.dtype == torch.float32
    assert torch.equal(normed, rms_norm(residual + x, weight, EPS, style))
    assert torch.equal(c_x, c_residual.bfloat16())
    assert not torch.equal(c_residual, c_residual.bfloat16().float())
    stream = residual.requires_grad_()
    summed = stream + x
    (apart,) = torch.autograd.grad((rms_norm(summed, weight, EPS, style), summed), stream, sent)
    assert torch.equal(c_residual, apart)


def test_the_sum_may_be_written_into():
    x, residual = torch.randn(2, 3, 7, dtype=torch.float64).requires_grad_()
    normed, summed = add_rms_norm(x, residual, WEIGHT, EPS)
    summed += 1
    (c,) = torch.autograd.grad((normed + summed).sum(), x)
    close(c, rms_equation((residual + x).detach().numpy(), WEIGHT.numpy(), *np.ones((2, 3, 7))), torch.float64)


def test_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"x of shape \[2, 7\] and a residual of \[7\]"):
        add_rms_norm(torch.ones(2, 7), torch.ones(7), torch.ones(7), EPS)
    with pytest.raises(ValueError, match=r"x of shape \[2, 7\] and a residual of \[1, 7\]"):
        add_layer_norm(torch.ones(2, 7), torch.ones(1, 7), (7,))
