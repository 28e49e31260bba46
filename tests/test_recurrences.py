"""Recurrences against the step by step equation in float64: chunked and recurrent forms, kernels, older code."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lxt
from lxt.composites import Composite
from lxt.coverage.precision import Float64

qwen3_next = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
kimi_linear = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear")
mamba = pytest.importorskip("transformers.models.mamba.modeling_mamba")
mamba2 = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
if not hasattr(mamba2, "mamba2_chunk_scan"):
    pytest.skip("this transformers writes recurrences in an older form, which is refused", allow_module_level=True)

from transformers.models.kimi_linear.modeling_kimi_linear import (  # noqa: E402
    chunk_kimi_delta_attention,
    recurrent_kimi_delta_attention,
)
from transformers.models.mamba.modeling_mamba import mamba_selective_scan  # noqa: E402
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan  # noqa: E402
from transformers.models.qwen3_next.modeling_qwen3_next import (  # noqa: E402
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

VALUE_ONLY, UNIFORM = lxt.ATTN_LRP, lxt.ATTN_LRP.but(recurrence="uniform")
TOKENS, HEADS, D_KEY, D_VALUE = 11, 2, 4, 3
TOLERANCE = 1e-10  # float64; the chunked form inverts a triangular matrix, measured below 1e-13


# Each layer calls its function by a global name, as transformers' modules do.


class ChunkedDelta(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        return torch_chunk_gated_delta_rule(query, key, value, g=g, beta=beta, chunk_size=4)[0]


class RecurrentDelta(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        return torch_recurrent_gated_delta_rule(query, key, value, g=g, beta=beta)[0]


class ChunkedKimi(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        return chunk_kimi_delta_attention(query, key, value, g=g, beta=beta, chunk_size=4)[0]


class RecurrentKimi(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        return recurrent_kimi_delta_attention(
            query, key, value, g=g, beta=beta, initial_state=None, output_final_state=False
        )[0]


class Mamba(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.A = nn.Parameter(-torch.rand(D_VALUE, D_KEY, dtype=torch.float64) - 0.1)

    def forward(self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> Tensor:
        out = mamba_selective_scan(x, dt, self.A, B, C, delta_softplus=True)
        return out[0] if isinstance(out, tuple) else out


class Mamba2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.A = nn.Parameter(-torch.rand(HEADS, dtype=torch.float64) - 0.1)

    def forward(self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> Tensor:
        out = mamba2_chunk_scan(x, dt, self.A, B, C, chunk_size=4, dt_softplus=True)
        return out[0] if isinstance(out, tuple) else out


# The equations, one step at a time.


def delta_rule(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """S = S e^g;  S += beta k (v - S^T k)^T;  o = S^T q / sqrt(d_key); g by head, or by head and channel (Kimi)."""
    state = torch.zeros(1, HEADS, D_KEY, D_VALUE, dtype=torch.float64)
    outputs = []
    for t in range(value.shape[1]):
        decay = g[:, t].exp()
        state = state * (decay[..., None] if decay.dim() == 3 else decay[..., None, None])
        known = torch.einsum("bhkv,bhk->bhv", state, key[:, t])
        written = beta[:, t, :, None] * (value[:, t] - known)
        state = state + torch.einsum("bhk,bhv->bhkv", key[:, t], written)
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, query[:, t]) * D_KEY**-0.5)
    return torch.stack(outputs, 1)


def mamba_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """h = e^(dt A) h + dt B x;  y = C h; x and dt are [batch, channel, token], B and C [batch, state, token]."""
    state = torch.zeros(1, D_VALUE, D_KEY, dtype=torch.float64)
    outputs = []
    for t in range(x.shape[-1]):
        step = nn.functional.softplus(dt[..., t])[..., None]
        state = (step * A).exp() * state + step * B[:, None, :, t] * x[..., t, None]
        outputs.append((state * C[:, None, :, t]).sum(-1))
    return torch.stack(outputs, -1)


def mamba2_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The same by heads: x is [batch, token, head, channel], dt [batch, token, head], B, C [batch, token, 1, state]."""
    state = torch.zeros(1, HEADS, D_VALUE, D_KEY, dtype=torch.float64)
    outputs = []
    for t in range(x.shape[1]):
        step = nn.functional.softplus(dt[:, t])
        state = (step * A).exp()[..., None, None] * state
        state = state + (step[..., None] * x[:, t])[..., None] * B[:, t, :, None, :]
        outputs.append((state * C[:, t, :, None, :]).sum(-1))
    return torch.stack(outputs, 1)


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _delta_inputs(channels: bool) -> dict[str, Tensor]:
    key = nn.functional.normalize(_normal(1, TOKENS, HEADS, D_KEY, seed=1), dim=-1)
    g = -_normal(1, TOKENS, HEADS, *([D_KEY] if channels else []), seed=3).abs()
    query, value = _normal(1, TOKENS, HEADS, D_KEY, seed=0), _normal(1, TOKENS, HEADS, D_VALUE, seed=2)
    beta = _normal(1, TOKENS, HEADS, seed=4).sigmoid()
    return {"query": query, "key": key, "value": value, "g": g, "beta": beta}


def _scan_inputs(by_head: bool) -> dict[str, Tensor]:
    if by_head:
        x, dt = _normal(1, TOKENS, HEADS, D_VALUE, seed=0), _normal(1, TOKENS, HEADS, seed=1)
        B, C = _normal(1, TOKENS, 1, D_KEY, seed=2), _normal(1, TOKENS, 1, D_KEY, seed=3)
    else:
        x, dt = _normal(1, D_VALUE, TOKENS, seed=0), _normal(1, D_VALUE, TOKENS, seed=1)
        B, C = _normal(1, D_KEY, TOKENS, seed=2), _normal(1, D_KEY, TOKENS, seed=3)
    return {"x": x, "dt": dt, "B": B, "C": C}


CASES: dict[str, tuple[type[nn.Module], Callable[..., Tensor], dict[str, Tensor], str, str]] = {
    "delta, chunked": (ChunkedDelta, delta_rule, _delta_inputs(False), "value", "query"),
    "delta, recurrent": (RecurrentDelta, delta_rule, _delta_inputs(False), "value", "query"),
    "kimi, chunked": (ChunkedKimi, delta_rule, _delta_inputs(True), "value", "query"),
    "kimi, recurrent": (RecurrentKimi, delta_rule, _delta_inputs(True), "value", "query"),
    "mamba": (Mamba, mamba_scan, _scan_inputs(False), "x", "C"),
    "mamba 2, chunked": (Mamba2, mamba2_scan, _scan_inputs(True), "x", "C"),
}


def _coefficients(
    function: Callable[..., Tensor], inputs: dict[str, Tensor], c_out: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    out = function(**leaves)
    c_out = _normal(*out.shape, seed=9) if c_out is None else c_out
    found = torch.autograd.grad(out, list(leaves.values()), c_out, materialize_grads=True, allow_unused=True)
    return out.detach(), dict(zip(leaves, found, strict=True)), c_out


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rules", [VALUE_ONLY, UNIFORM], ids=["value only", "uniform"])
def test_a_recurrence_gets_what_the_equation_says(name: str, rules: Composite) -> None:
    make, equation, inputs, values, reads = CASES[name]
    torch.manual_seed(0)
    layer = make()
    with Float64():
        bare = layer(**inputs)
        with lxt.monkey_patch(layer, rules):
            out, found, c_out = _coefficients(layer, inputs)
    assert torch.equal(out, bare)
    weights = {"A": layer.A.detach()} if hasattr(layer, "A") else {}
    exact, gradients, _ = _coefficients(lambda **x: equation(**x, **weights), inputs, c_out)
    torch.testing.assert_close(out, exact, rtol=TOLERANCE, atol=TOLERANCE)
    shares = {values: 1.0} if rules is VALUE_ONLY else {values: 0.5, reads: 0.5}
    for key, coefficient in found.items():
        expected = gradients[key] * shares.get(key, 0.0)
        torch.testing.assert_close(coefficient, expected, rtol=0, atol=TOLERANCE * gradients[key].abs().max().item())
    total = sum(float((inputs[key] * found[key]).sum()) for key in inputs)
    assert total == pytest.approx(float((out * c_out).sum()), rel=1e-9)  # linear in v, bilinear in v and what reads


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_stops_nothing(name: str) -> None:
    make, _, inputs, _, _ = CASES[name]
    torch.manual_seed(0)
    layer = make()
    with Float64():
        _, expected, c_out = _coefficients(layer, inputs)
        with lxt.monkey_patch(layer, "gradient"):
            _, found, _ = _coefficients(layer, inputs, c_out)
    for key in inputs:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-12, atol=1e-12)


# kernels


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        raise AssertionError("the kernel ran")


def _stand_in_of_hub(function: Callable) -> Callable:
    """What transformers' decorator gives: a wrapper in its file, which takes a kernel where one is installed."""
    source = (
        "def make(function, kernel):\n"
        "    import functools\n"
        "    @functools.wraps(function)\n"
        "    def wrapped(*args, **kwargs):\n"
        "        return kernel.apply(args[2]), None\n"
        "    return wrapped\n"
    )
    names: dict[str, Callable] = {}
    exec(compile(source, "transformers/integrations/hub_kernels.py", "exec"), names)
    return names["make"](getattr(function, "__wrapped__", function), _Kernel)


def test_a_fused_kernel_is_switched_off_while_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, inputs, _, _ = CASES["delta, chunked"]
    layer = ChunkedDelta()
    with Float64():
        expected = layer(**inputs)
        monkeypatch.setitem(globals(), "torch_chunk_gated_delta_rule", _stand_in_of_hub(torch_chunk_gated_delta_rule))
        with pytest.raises(AssertionError, match="the kernel ran"):
            layer(**inputs)
        with lxt.monkey_patch(layer, "cp"):
            out, found, _ = _coefficients(layer, inputs)
        with pytest.raises(AssertionError, match="the kernel ran"):
            layer(**inputs)
    assert torch.equal(out, expected)
    assert found["value"].any()
    assert not found["key"].any()


def test_a_kernel_that_is_called_otherwise_is_refused() -> None:
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx, c: Tensor) -> Tensor:
            return c * 2

    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Opaque.apply(x)

    layer = Layer()
    with lxt.monkey_patch(layer), pytest.raises(lxt.UnknownOperation, match="Opaque"):
        layer(torch.ones(2, requires_grad=True))


# older code


class OldMixer(nn.Module):
    """As a state-space layer was before transformers made functions of its scan."""

    def __init__(self) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.zeros(3))

    def slow_forward(self, x: Tensor) -> Tensor:
        return x * self.A_log.exp()

    def forward(self, x: Tensor) -> Tensor:
        return self.slow_forward(x)


def test_recurrences_of_older_code_are_refused() -> None:
    layer = OldMixer()
    with pytest.raises(ValueError, match=r"OldMixer writes its recurrence as older .* transformers 5\.23 or newer"):
        lxt.monkey_patch(layer)
    x = torch.ones(3, requires_grad=True)
    assert layer(x).requires_grad  # untouched
    with lxt.monkey_patch(layer, "gradient"):
        assert layer(x).requires_grad
