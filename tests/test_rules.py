"""Every rule against its equation written out in float64, and every forward against torch's or transformers' own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from equations_rules import COEFFICIENTS as EXACT
from equations_rules import layer_norm_rule
from torch import Tensor
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from lxt.attention import scaled_dot_product_attention
from lxt.composites import ATTN_LRP, CP_LRP, GRADIENT, Composite
from lxt.rules import (
    gated_product,
    glu,
    group_norm,
    identity,
    layer_norm,
    rms_norm,
    rms_norm_function,
    scale_gradient,
    stop,
    tempered_softmax,
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-6
Function = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def tolerance(dtype: torch.dtype, roundings: int = 4) -> float:
    """Each result is a short chain of roundings to `dtype`; transformers' norms keep float32 statistics in float64."""
    eps = torch.finfo(dtype).eps
    return roundings * max(eps, 1e-14) if dtype != torch.float64 else 1e-13


def coefficients(function: Function, *inputs: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    """The output, c of every input, and the random c_y that was sent in; the backward is run twice."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = function(*leaves)
    c_y = torch.randn(y.shape, dtype=torch.float64).to(y.dtype)
    kept = c_y.clone()
    once = torch.autograd.grad(y, leaves, c_y, retain_graph=True, allow_unused=True)
    twice = torch.autograd.grad(y, leaves, c_y, allow_unused=True)
    for a, b in zip(once, twice, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
    assert torch.equal(c_y, kept)
    return y.detach(), [torch.zeros_like(x) if c is None else c for c, x in zip(once, inputs, strict=True)], c_y


def close(actual: Tensor, expected: np.ndarray, rtol: float) -> None:
    """Relative to the largest element: sums over a row cancel, so a small one carries the row's error."""
    assert tuple(actual.shape) == expected.shape
    assert actual.isfinite().all()
    scale = np.abs(expected).max() if expected.size else 0.0
    np.testing.assert_allclose(actual.double().numpy(), expected, rtol=rtol, atol=rtol * scale)


def wide(*tensors: Tensor) -> list[np.ndarray]:
    return [x.detach().double().numpy() for x in tensors]


def strided(x: Tensor) -> Tensor:
    """The same numbers, every second element of a transposed buffer whose rest is NaN."""
    buffer = torch.full((*x.shape[:-2], x.shape[-1], 2 * x.shape[-2]), torch.nan, dtype=x.dtype)
    view = buffer.transpose(-1, -2)[..., ::2, :]
    view.copy_(x)
    assert not view.is_contiguous()
    return view


# -- scaling and identity


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_gradient(dtype):
    x = torch.randn(3, 5, dtype=dtype)
    y, (c,), c_y = coefficients(lambda x: scale_gradient(x, 0.25), x)
    assert torch.equal(y, x)
    assert torch.equal(c, c_y * 0.25)
    assert scale_gradient(x, 1) is x


def test_stop():
    assert not stop(torch.ones(2, requires_grad=True)).requires_grad


def test_a_scaled_tensor_can_be_changed_in_place():
    # Models write into what a product gave them: scores.masked_fill_(...), hidden += ...
    x = torch.randn(3, 5, requires_grad=True)
    y = scale_gradient(x * 2, 0.5)
    y += 1
    y[0] = 0
    (c,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(c, torch.tensor([0.0, 1.0, 1.0])[:, None].expand(3, 5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [lambda x: x, strided, lambda x: x[:0]], ids=["dense", "strided", "empty"])
def test_identity(dtype, layout):
    x = layout(torch.randn(7, 13, dtype=dtype))
    y, (c,), c_y = coefficients(lambda x: identity(x, F.silu, "silu"), x)
    assert torch.equal(y, F.silu(x))
    assert c.dtype == dtype
    close(c, EXACT["silu"](x.double().numpy()) * c_y.double().numpy(), tolerance(dtype, 1))


def test_identity_takes_a_coefficient_of_ones_own():
    x = torch.randn(4, dtype=torch.float64)
    _, (c,), c_y = coefficients(lambda x: identity(x, lambda x: x**3, lambda x: x**2), x)
    torch.testing.assert_close(c, c_y * x**2, rtol=1e-15, atol=0)


# -- norms

NORM_MODULES = {"llama": LlamaRMSNorm, "gemma": Gemma2RMSNorm, "t5": T5LayerNorm}


def rms_coefficient(x: np.ndarray, weight: np.ndarray, c_y: np.ndarray, eps: float) -> np.ndarray:
    result = np.zeros_like(x)
    for row in np.ndindex(x.shape[:-1]):
        sigma = np.sqrt(sum(value**2 for value in x[row]) / x.shape[-1] + eps)
        for i in range(x.shape[-1]):
            result[(*row, i)] = c_y[(*row, i)] * weight[i] / sigma
    return result


@pytest.mark.parametrize("layout", [lambda x: x, strided, lambda x: x[:0]], ids=["dense", "strided", "empty"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("style", NORM_MODULES)
def test_rms_norm(style, dtype, layout):
    x = layout(torch.randn(2, 5, 7, dtype=dtype) * 3)
    module = NORM_MODULES[style](7, eps=EPS).to(dtype)
    module.weight.data.add_(torch.randn(7).to(dtype) / 2)
    y, (c,), c_y = coefficients(lambda x: rms_norm(x, module.weight.detach(), EPS, style), x)
    assert torch.equal(y, module(x))
    assert y.dtype == module(x).dtype
    assert c.dtype == dtype
    arrays = wide(x, module.weight, c_y)
    arrays[1] += style == "gemma"
    # statistics are float32 in all three, in float64 too
    close(c, rms_coefficient(*arrays, EPS), max(tolerance(dtype, 2), 4e-7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("style", NORM_MODULES)
def test_rms_norm_with_wider_weights(style, dtype):
    x = torch.randn(4, 8, dtype=dtype)
    module = NORM_MODULES[style](8, eps=EPS)
    module.weight.data.add_(torch.randn(8) / 2)
    y, (c,), c_y = coefficients(lambda x: rms_norm(x, module.weight.detach(), EPS, style), x)
    assert torch.equal(y, module(x))
    assert y.dtype == module(x).dtype
    assert c.dtype == dtype
    arrays = wide(x, module.weight, c_y)
    arrays[1] += style == "gemma"
    close(c, rms_coefficient(*arrays, EPS), tolerance(dtype, 2))


@pytest.mark.parametrize("eps", [1e-3, None])
@pytest.mark.parametrize("shape", [(7,), (5, 7)], ids=str)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_function(dtype, weighted, shape, eps):
    # so small that epsilon takes its part, where it isn't given too: that of torch is of the dtype
    x = torch.randn(2, 5, 7, dtype=torch.float64).mul(3e-2).to(dtype)
    weight = torch.randn(shape).to(dtype) if weighted else None
    y, (c,), c_y = coefficients(lambda x: rms_norm_function(x, shape, weight, eps), x)
    assert torch.equal(y, F.rms_norm(x, shape, weight, eps))
    # 1 / sigma by its definition from torch's own forward: y = x weight / sigma
    rows = x.double().reshape(-1, int(np.prod(shape)))
    normed = F.rms_norm(x, shape, None, eps).double().reshape(rows.shape)
    sigma = (rows * rows).sum(-1, keepdim=True) / (rows * normed).sum(-1, keepdim=True)
    sigma = sigma.reshape(x.shape[: -len(shape)] + (1,) * len(shape))
    expected = c_y.double() / sigma * (1 if weight is None else weight.double())
    close(c, expected.numpy(), tolerance(dtype, 2))


def norm_coefficient(x: np.ndarray, weight: np.ndarray | None, c_y: np.ndarray, eps: float) -> np.ndarray:
    """c_j = sum_i c_i w_i (delta_ij - 1/n) / sigma, row by row."""
    size = x.shape[-1]
    result = np.zeros_like(x)
    for row in np.ndindex(x.shape[:-1]):
        sigma = np.sqrt(((x[row] - x[row].mean()) ** 2).mean() + eps)
        for i in range(size):
            c = c_y[(*row, i)] * (1 if weight is None else weight[i]) / sigma
            for j in range(size):
                result[(*row, j)] += c * ((i == j) - 1 / size)
    return result


@pytest.mark.parametrize("layout", [lambda x: x, strided, lambda x: x[:0]], ids=["dense", "strided", "empty"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm(dtype, affine, layout):
    x = layout(torch.randn(2, 5, 7).mul(3).add(1).to(dtype))
    weight, bias = torch.randn(2, 7).to(dtype) if affine else (None, None)
    y, (c,), c_y = coefficients(lambda x: layer_norm(x, (7,), weight, bias, EPS), x)
    assert torch.equal(y, F.layer_norm(x, (7,), weight, bias, EPS))
    weights = None if weight is None else weight.double().numpy()
    close(c, norm_coefficient(x.double().numpy(), weights, c_y.double().numpy(), EPS), tolerance(dtype, 2))


def test_layer_norm_over_two_axes():
    x, weight = torch.randn(3, 4, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    y, (c,), c_y = coefficients(lambda x: layer_norm(x, (4, 5), weight), x)
    assert torch.equal(y, F.layer_norm(x, (4, 5), weight))
    expected = norm_coefficient(*(a.reshape(-1, 20) if a.ndim > 2 else a.ravel() for a in wide(x, weight, c_y)), 1e-5)
    close(c, expected.reshape(3, 4, 5), 1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_layer_norm_with_wider_weights(dtype):
    x, weight, bias = torch.randn(4, 7).to(dtype), torch.randn(7), torch.randn(7)
    y, (c,), c_y = coefficients(lambda x: layer_norm(x, (7,), weight, bias), x)
    assert torch.equal(y, F.layer_norm(x, (7,), weight, bias))
    close(c, norm_coefficient(*wide(x, weight, c_y), 1e-5), tolerance(dtype, 2))


def test_layer_norm_keeps_relevance_as_the_papers_equation_does():
    x, weight, bias = torch.randn(3, 6).double(), torch.randn(6).double(), torch.randn(6).double()
    y, (c,), c_y = coefficients(lambda x: layer_norm(x, (6,), weight, bias, EPS), x)
    normed = F.layer_norm(x, (6,), eps=EPS)
    relevance = layer_norm_rule(*wide(x, weight, bias, normed, y, c_y * y))
    close(x * c, relevance, 1e-12)


@pytest.mark.parametrize("shape", [(3, 6, 5), (2, 6, 3, 4), (3, 6), (0, 6, 5)], ids=str)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_group_norm(dtype, affine, shape):
    x = torch.randn(shape).mul(2).add(1).to(dtype)
    weight, bias = torch.randn(2, 6).to(dtype) if affine else (None, None)
    y, (c,), c_y = coefficients(lambda x: group_norm(x, 3, weight, bias), x)
    assert torch.equal(y, F.group_norm(x, 3, weight, bias))
    c_weighted = c_y.double()
    if weight is not None:
        c_weighted = c_weighted * weight.double().view(1, 6, *[1] * (len(shape) - 2))
    rows = (shape[0] * 3, int(np.prod(shape[1:])) // 3)
    expected = norm_coefficient(x.double().numpy().reshape(rows), None, c_weighted.numpy().reshape(rows), 1e-5)
    close(c, expected.reshape(shape), tolerance(dtype, 2))


def test_group_norm_of_a_strided_image():
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64).permute(0, 3, 1, 2)
    _, (c,), c_y = coefficients(lambda x: group_norm(x, 2), x)
    rows = (4, 36)
    expected = norm_coefficient(x.numpy().reshape(rows), None, c_y.numpy().reshape(rows), 1e-5)
    close(c, expected.reshape(x.shape), 1e-13)


# -- gated products

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu}


@pytest.mark.parametrize("layout", [lambda x: x, strided, lambda x: x[:0]], ids=["dense", "strided", "empty"])
@pytest.mark.parametrize("stop_gate", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gated_product(name, dtype, stop_gate, layout):
    function = ACTIVATIONS[name]
    gate, up = (layout(torch.randn(5, 9).to(dtype)) for _ in range(2))
    y, (c_gate, c_up), c_y = coefficients(lambda g, u: gated_product(g, u, function, name, stop_gate), gate, up)
    assert torch.equal(y, function(gate) * up)
    g, u, c = wide(gate, up, c_y)
    activated = g * EXACT[name](g)
    close(c_up, activated * c * (1 if stop_gate else 0.5), tolerance(dtype, 2))
    close(c_gate, np.zeros_like(g) if stop_gate else EXACT[name](g) * u * c / 2, tolerance(dtype, 2))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_gated_product_of_the_largest_numbers_is_finite(dtype):
    # c_y up overflows, though with silu(gate) / gate = 0 behind it nothing arrives at the gate
    largest = torch.finfo(dtype).max
    gate = torch.tensor([-200.0, -30.0, -largest, 0.0], dtype=dtype, requires_grad=True)
    up = torch.tensor([largest, -largest, largest, largest], dtype=dtype, requires_grad=True)
    y = gated_product(gate, up, F.silu, "silu")
    c_gate, c_up = torch.autograd.grad(y, (gate, up), torch.full_like(y, 3.0))
    assert (gate * c_gate)[:3].isfinite().all()
    assert (up * c_up).isfinite().all()


@pytest.mark.parametrize("dim", [-1, 1, 0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_glu(dtype, dim):
    x = torch.randn(4, 6, 8, dtype=dtype)
    y, (c,), c_y = coefficients(lambda x: glu(x, dim), x)
    assert torch.equal(y, F.glu(x, dim))
    gate = np.split(x.double().numpy(), 2, axis=dim)[1]
    c_value = c_y.double().numpy() / (1 + np.exp(-gate))
    close(c, np.concatenate((c_value, np.zeros_like(c_value)), axis=dim), tolerance(dtype, 1))


# -- softmax and attention


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def softmax_coefficient(x: np.ndarray, c: np.ndarray, temperature: float) -> np.ndarray:
    """c_i = sum_j p_j (delta_ij - p_i) c_j with p at the temperature, a row at a time."""
    p = softmax(x / temperature)
    result = np.zeros_like(x)
    for row in np.ndindex(x.shape[:-1]):
        jacobian = np.diag(p[row]) - np.outer(p[row], p[row])
        result[row] = jacobian @ c[row]
    return result


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tempered_softmax(dtype, temperature):
    x = torch.randn(3, 5, 7).mul(2).to(dtype)
    x[0, 0, 3:] = -torch.inf
    x[0, 1, 2:] = torch.finfo(dtype).min
    y, (c,), c_y = coefficients(lambda x: tempered_softmax(x, -1, None, temperature), x)
    assert torch.equal(y, F.softmax(x, -1))
    close(c, softmax_coefficient(*wide(x, c_y), temperature), tolerance(dtype))


def test_tempered_softmax_over_another_axis_and_into_another_dtype():
    x = torch.randn(5, 7, dtype=torch.bfloat16)
    y, (c,), c_y = coefficients(lambda x: tempered_softmax(x, 0, torch.float32, 2.0), x)
    assert torch.equal(y, F.softmax(x, 0, dtype=torch.float32))
    assert c.dtype == torch.bfloat16
    close(c, softmax_coefficient(*(a.T for a in wide(x, c_y)), 2.0).T, tolerance(torch.bfloat16, 1))


COMPOSITES = {
    "attnlrp": ATTN_LRP,
    "cp": CP_LRP,
    "gradient": GRADIENT,
    "other factors": ATTN_LRP.but(qkv=(0.1, 0.3, 0.6)),
    "temperature": ATTN_LRP.but(softmax_temperature=2.0),
    "gradient at a temperature": GRADIENT.but(softmax_temperature=2.0),
}
MASKS: dict[str, dict[str, object]] = {
    "none": {},
    "causal": {"is_causal": True},
    "bool": {"attn_mask": torch.ones(5, 6, dtype=torch.bool).tril(1)},
    "float": {"attn_mask": torch.linspace(-2, 1, 30).view(5, 6).masked_fill(torch.ones(5, 6).triu(3) > 0, -torch.inf)},
    "scale": {"scale": 0.7},
    "grouped": {"enable_gqa": True, "is_causal": True},
}


def attention_coefficients(
    composite: Composite, q: np.ndarray, k: np.ndarray, v: np.ndarray, c_out: np.ndarray, options: dict
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """out = P v, P = softmax(S), S = scale q k^T + mask: c_v = f_v P^T c, c_P = c v^T, c_q = f_q scale c_S k."""
    factors = {"uniform": composite.qkv, "value_only": (0, 0, 1), "gradient": (1, 1, 1)}[composite.attention]
    groups = q.shape[1] // k.shape[1]
    c_q, c_k, c_v = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for batch, head in np.ndindex(q.shape[:2]):
        source = head // groups
        queries, keys, values, c = q[batch, head], k[batch, source], v[batch, source], c_out[batch, head]
        scale = options.get("scale", q.shape[-1] ** -0.5)
        scores = queries @ keys.T * scale
        if options.get("is_causal"):
            scores[np.triu(np.ones(scores.shape, dtype=bool), 1)] = -np.inf
        mask = options.get("attn_mask")
        if mask is not None:
            scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + mask
        c_scores = softmax_coefficient(scores, c @ values.T, composite.softmax_temperature)
        c_v[batch, source] += factors[2] * softmax(scores).T @ c
        c_q[batch, head] += factors[0] * scale * c_scores @ keys
        c_k[batch, source] += factors[1] * scale * c_scores.T @ queries
    return c_q, c_k, c_v


def qkv(dtype: torch.dtype, grouped: bool) -> list[Tensor]:
    # [batch, token, head, d_head] transposed, as models hand them over
    shapes = (2, 5, 4, 8), (2, 6, 2 if grouped else 4, 8), (2, 6, 2 if grouped else 4, 8)
    return [torch.randn(shape).to(dtype).transpose(1, 2) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", MASKS)
@pytest.mark.parametrize("name", COMPOSITES)
def test_attention(name, case, dtype):
    composite, tensors = COMPOSITES[name], qkv(dtype, grouped=case == "grouped")
    options = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in MASKS[case].items()}
    y, actual, c_y = coefficients(lambda *x: scaled_dot_product_attention(composite, *x, **options), *tensors)
    assert torch.equal(y, F.scaled_dot_product_attention(*(x.requires_grad_() for x in tensors), **options))
    arrays = {
        k: (v if v.dtype == torch.bool else v.double()).numpy() if isinstance(v, Tensor) else v
        for k, v in options.items()
    }
    expected = attention_coefficients(composite, *wide(*tensors, c_y), arrays)
    # 16-bit kernels round the weights, the scores' coefficients and the sums over keys
    rtol = 1e-12 if dtype == torch.float64 else 8 * torch.finfo(dtype).eps
    for c, e in zip(actual, expected, strict=True):
        close(c, e, rtol)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", COMPOSITES)
def test_attention_of_an_empty_batch(name, dtype):
    tensors = [x[:0] for x in qkv(dtype, grouped=False)]
    y, actual, _ = coefficients(lambda *x: scaled_dot_product_attention(COMPOSITES[name], *x), *tensors)
    assert y.shape == (0, 4, 5, 8)
    assert [c.shape for c in actual] == [x.shape for x in tensors]


def test_attention_has_no_dropout():
    tensors = qkv(torch.float64, grouped=False)
    y = scaled_dot_product_attention(ATTN_LRP, *tensors, dropout_p=0.9)
    assert torch.equal(y, F.scaled_dot_product_attention(*tensors))


@pytest.mark.parametrize("composite", [ATTN_LRP, CP_LRP, COMPOSITES["temperature"]], ids=lambda c: c.name)
def test_attention_takes_a_mask_of_activations_as_a_summand_of_the_scores(composite):
    (q, k, v), bias = qkv(torch.float64, grouped=False), torch.randn(2, 4, 5, 6, dtype=torch.float64)
    _, (*_, c_bias), c_y = coefficients(
        lambda q, k, v, m: scaled_dot_product_attention(composite, q, k, v, attn_mask=m), q, k, v, bias
    )
    if composite.attention == "value_only":
        assert not c_bias.any()
        return
    softened = ((q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + bias) / composite.softmax_temperature).softmax(-1)
    c_weights = c_y @ v.transpose(-2, -1) * sum(composite.qkv[:2])
    expected = softened * (c_weights - (softened * c_weights).sum(-1, keepdim=True))
    close(c_bias, expected.numpy(), rtol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradient_attention_differentiates_its_mask(temperature):
    composite = GRADIENT.but(softmax_temperature=temperature)
    tensors, bias = qkv(torch.float64, grouped=False), torch.randn(5, 6, dtype=torch.float64)
    _, (*_, c_bias), _ = coefficients(
        lambda q, k, v, m: scaled_dot_product_attention(composite, q, k, v, attn_mask=m), *tensors, bias
    )
    assert c_bias.any()


# -- numbers at the edges

RULES = {
    "identity": lambda x: identity(x, F.silu, "silu"),
    "scale_gradient": lambda x: scale_gradient(x, 0.5),
    "glu": lambda x: glu(x),
    "gated_product": lambda x: gated_product(x, torch.ones_like(x), F.gelu, "gelu"),
    "gate stopped": lambda x: gated_product(torch.ones_like(x), x, F.gelu, "gelu", True),
    **{style: lambda x, s=style: rms_norm(x, torch.ones(x.shape[-1], dtype=x.dtype), EPS, s) for style in NORM_MODULES},
    "rms_norm_function": lambda x: rms_norm_function(x, x.shape[-1:], None, EPS),
    "layer_norm": lambda x: layer_norm(x, x.shape[-1:]),
    "group_norm": lambda x: group_norm(x.unsqueeze(-1), 2),
    "tempered_softmax": lambda x: tempered_softmax(x, -1, None, 2.0),
    "softmax": lambda x: tempered_softmax(x, -1, None, 1.0),
}


def at_the_edges(dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps
    edge = [0.0, -0.0, smallest, -smallest, info.tiny / 2, 1e-10, -1e-10, 1.0, -1.0, 3.0, info.eps, -info.eps]
    return torch.stack((torch.tensor(edge), torch.tensor(edge).roll(1), torch.zeros(12))).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_zeros_and_the_smallest_numbers_give_finite_relevance(name, dtype):
    x = at_the_edges(dtype)
    _, (c,), _ = coefficients(RULES[name], x)
    assert c.isfinite().all()
    assert (x * c).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", RULES)
def test_the_largest_numbers_give_finite_relevance(name, dtype):
    # The squares of bfloat16's and float32's largest numbers overflow float32, the forward's statistics with them: what
    # a norm gives there is torch's business (0 or NaN). It must work up to where a row's sum of squares is finite.
    largest = torch.finfo(dtype).max
    if dtype != torch.float16 and ("norm" in name or name in NORM_MODULES):
        largest = torch.finfo(torch.float32).max ** 0.5 / 8
    x = torch.tensor([largest, -largest, largest / 2, 1.0, 0.0, -largest / 3], dtype=dtype).repeat(2, 2)
    leaf = x.clone().requires_grad_()
    y = RULES[name](leaf)
    (c,) = torch.autograd.grad(y, leaf, torch.full_like(y, 0.5))
    assert (x * c).isfinite().all()
