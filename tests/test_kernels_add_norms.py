"""The kernels of a residual connection and the norm behind it, against their twins; and other configurations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from kernels import DEVICE, DTYPES, INTERPRETED, LAYOUTS, assert_close, far_apart, poisoned, step
from torch import Tensor

pytest.importorskip("triton")

from lxt import rules
from lxt.triton_kernels import layer_norm as layer_norm_module
from lxt.triton_kernels import rms_norm as rms_norm_module
from lxt.triton_kernels.add_layer_norm import add_layer_norm
from lxt.triton_kernels.add_rms_norm import add_rms_norm
from lxt.triton_kernels.launch import configured
from lxt.triton_kernels.rms_norm import TILE

EPS = 1e-6
STYLES = ("llama", "gemma", "t5")
# A row, rows that share a program, a tile with a tail, and a row of several tiles.
SHAPES = [(2, 3, 7), (1, 1), (70, 16), (3, 257), (2, TILE + 5)]


@pytest.fixture(autouse=True)
def _eager_twins(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setenv("LXT_KERNELS", "off")


def coefficients(
    function: Callable, x: Tensor, residual: Tensor, sent: list[Tensor] | None = None
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(normed, summed), c of x and of residual, and what was sent in; the backward is run twice."""
    leaves = [x.detach().requires_grad_(), residual.detach().requires_grad_()]
    with poisoned():
        outputs = function(*leaves)
        sent = [torch.randn(y.shape, device=DEVICE).to(y.dtype) for y in outputs] if sent is None else sent
        kept = [c.clone() for c in sent]
        once = torch.autograd.grad(outputs, leaves, sent, retain_graph=True)
        twice = torch.autograd.grad(outputs, leaves, sent)
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(sent, kept, strict=True))
    return [y.detach() for y in outputs], list(once), sent


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    return [(torch.randn(shape, device=DEVICE) * 3).to(dtype) for _ in range(2)]


def assert_alike(kernel: Callable, twin: Callable, x: Tensor, residual: Tensor, atol: float = 0.0) -> None:
    """Sums to the bit, norms and coefficients to a few roundings; `atol` relative to the largest of a sum."""
    (normed, summed), found, sent = coefficients(kernel, x, residual)
    (normed_twin, summed_twin), expected, _ = coefficients(twin, x, residual, sent)
    truncated = INTERPRETED and torch.bfloat16 in (x.dtype, residual.dtype)
    if truncated:
        assert_close(summed, summed_twin, 2 * step(summed.dtype))
    else:
        assert torch.equal(summed, summed_twin)
    # A sum of 16 bits that is cut off, and not rounded, changes the norm of it.
    assert_close(normed, normed_twin, 4 * step(x.dtype) + 2**-20, atol=atol + (8 * step(x.dtype) if truncated else 0))
    for a, b in zip(found, expected, strict=True):
        # what comes through the norm and beside it may cancel, to a rounding of each
        assert_close(a, b, 4 * step(x.dtype) + 2**-20, atol=max(atol, 2 * step(x.dtype)))


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("style", STYLES)
def test_add_rms_norm(style, dtype, shape, exact):
    weight = torch.randn(shape[-1], device=DEVICE).to(dtype)
    x, residual = inputs(shape, dtype)
    kernel = partial(add_rms_norm, weight=weight, eps=EPS, style=style, exact=exact)
    twin = partial(rules.add_rms_norm, weight=weight, eps=EPS, style=style)
    assert_alike(kernel, twin, x, residual)
    if exact and not (INTERPRETED and dtype == torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(kernel(x, residual), twin(x, residual), strict=True))


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_layer_norm(dtype, shape, weighted, exact):
    weight, bias = (torch.randn(shape[-1], device=DEVICE).to(dtype) if weighted else None for _ in range(2))
    x, residual = inputs(shape, dtype)
    kernel = partial(add_layer_norm, normalized_shape=shape[-1:], weight=weight, bias=bias, eps=EPS, exact=exact)
    twin = partial(rules.add_layer_norm, normalized_shape=shape[-1:], weight=weight, bias=bias, eps=EPS)
    if shape[-1] == 1 and not exact and not weighted:
        assert not kernel(x, residual)[0].any()  # torch has a rounding of x - mean there, times 1 / sqrt(eps)
        return
    assert_alike(kernel, twin, x, residual, atol=2**-20)
    if exact:
        assert all(torch.equal(a, b) for a, b in zip(kernel(x, residual), twin(x, residual), strict=True))


NORMS = {
    "rms": (
        lambda x, r, w, exact: add_rms_norm(x, r, w, EPS, "llama", exact),
        lambda x, r, w: rules.add_rms_norm(x, r, w, EPS),
    ),
    "layer": (
        lambda x, r, w, exact: add_layer_norm(x, r, w.shape, w, w, EPS, exact),
        lambda x, r, w: rules.add_layer_norm(x, r, w.shape, w, w, EPS),
    ),
}


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NORMS)
def test_any_layout(name, layout, exact):
    kernel, twin = NORMS[name]
    weight = torch.randn(37, device=DEVICE)
    x, residual = inputs((3, 5, 37), torch.float32)
    dense = residual[:0] if layout == "empty" else residual
    x = LAYOUTS[layout](x)
    for a, b in ((x, dense), (dense, x)):
        assert_alike(lambda x, r: kernel(x, r, weight, exact), lambda x, r: twin(x, r, weight), a, b, atol=2**-20)
    if layout != "empty":
        _, found, sent = coefficients(lambda x, r: kernel(x, r, weight, exact), x, dense)
        normed, summed = (LAYOUTS[layout](c) for c in sent)
        for other in ([normed, summed], [normed, sent[1]], [sent[0], summed]):
            _, strided, _ = coefficients(lambda x, r: kernel(x, r, weight, exact), x, dense, other)
            assert all(torch.equal(a, b) for a, b in zip(found, strided, strict=True))


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
@pytest.mark.parametrize("style", STYLES)
def test_a_stream_kept_in_float32(style, exact):
    x, residual = torch.randn(4, 21, device=DEVICE).half(), torch.randn(4, 21, device=DEVICE)
    weight = torch.randn(21, device=DEVICE).half()
    assert_alike(
        partial(add_rms_norm, weight=weight, eps=EPS, style=style, exact=exact),
        partial(rules.add_rms_norm, weight=weight, eps=EPS, style=style),
        x,
        residual,
    )


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
def test_the_sum_is_rounded_before_the_norm_reads_it(exact):
    # In float16 nothing remains of x; weights in float32 would show it.
    residual, x = torch.ones(3, 40, device=DEVICE).half(), (torch.rand(3, 40, device=DEVICE) * 2**-12).half()
    normed, summed = add_rms_norm(x, residual, torch.ones(40, device=DEVICE), EPS, "t5", exact)
    assert torch.equal(summed, residual)
    assert_close(normed, torch.full_like(normed, (1 + EPS) ** -0.5), 2**-21)


def test_layer_norm_of_mixed_dtypes_is_torchs():
    x, residual, weight = torch.randn(4, 21).half(), torch.randn(4, 21).half(), torch.randn(21)
    if INTERPRETED:  # on a GPU torch takes one dtype only
        found, expected = (
            f(x, residual, (21,), weight) for f in (partial(add_layer_norm, exact=False), rules.add_layer_norm)
        )
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_layer_norm_over_two_axes():
    x, residual = inputs((3, 5, 7), torch.float32)
    weight = torch.randn(5, 7, device=DEVICE)
    for exact in (True, False):
        assert_alike(
            lambda x, r, exact=exact: add_layer_norm(x, r, (5, 7), weight, exact=exact),
            lambda x, r: rules.add_layer_norm(x, r, (5, 7), weight),
            x,
            residual,
            atol=2**-20,
        )


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
@pytest.mark.parametrize("name", NORMS)
def test_either_output_may_go_unused(name, exact):
    kernel, twin = NORMS[name]
    weight = torch.randn(7, device=DEVICE)
    x, residual = (a.requires_grad_() for a in inputs((3, 7), torch.float32))
    for used in (0, 1):
        found, expected = (
            torch.autograd.grad(f[used].square().sum(), (x, residual))
            for f in (kernel(x, residual, weight, exact), twin(x, residual, weight))
        )
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b, 2**-18, atol=2**-18)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
@pytest.mark.parametrize("name", NORMS)
def test_rows_far_apart(name, exact):
    # One of them at a time: the coefficients, x, the residual.
    kernel, twin = NORMS[name]
    weight, ones = torch.ones(20, device=DEVICE).half(), torch.ones(4, 20, device=DEVICE).half()
    for x, residual in ((far_apart(20), ones), (ones, far_apart(20))):
        x, residual = x.detach().requires_grad_(), residual.detach().requires_grad_()
        normed, summed = kernel(x, residual, weight, exact)
        assert torch.equal(summed, 2 * ones)
        assert_close(normed, twin(ones, ones, weight)[0], 2**-9)
        c = torch.autograd.grad((normed, summed), (x, residual), (far_apart(20), far_apart(20)))
        expected = 1.5 if name == "rms" else 1.0
        assert_close(c[0], torch.full_like(ones, expected), 2**-9)
        assert_close(c[1], torch.full_like(ones, expected), 2**-9)


# -- other configurations, which benchmarks try


def test_where_tiles_and_warps_may_be_chosen_freely():
    # The backward of RMSNorm adds nothing up along a row: any tile gives the same bits.
    weight = torch.randn(257, device=DEVICE)
    x, residual = inputs((9, 257), torch.float32)
    run = partial(add_rms_norm, weight=weight, eps=EPS)
    _, expected, sent = coefficients(run, x, residual)
    for changes in ({"BLOCK": 64}, {"ROWS": 2, "BLOCK": 512, "num_warps": 8}, {"num_stages": 2}):
        with configured(rms_norm_module.backward_kernel, **changes):
            _, found, _ = coefficients(run, x, residual, sent)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_configuration_ends_with_its_block():
    kernel = rms_norm_module.backward_kernel
    seen = []

    def run() -> None:
        x = torch.ones(2, 4, device=DEVICE, requires_grad=True)
        rms_norm_module.rms_norm(x, torch.ones(4, device=DEVICE), EPS).sum().backward()

    def spy(kernel, grid, arguments, constants, warps=4):
        from lxt.triton_kernels.launch import _CHANGED

        seen.append(dict(_CHANGED.get(kernel, {})))

    before, rms_norm_module.launch = rms_norm_module.launch, spy
    try:
        with configured(kernel, num_warps=8):
            with configured(kernel, BLOCK=32):
                run()
            run()
        with pytest.raises(KeyError), configured(kernel, num_warps=2):
            raise KeyError
        run()
    finally:
        rms_norm_module.launch = before
    assert seen[1::2] == [{"num_warps": 8, "BLOCK": 32}, {"num_warps": 8}, {}]


def test_an_unknown_configuration_is_refused():
    x = torch.ones(2, 4, device=DEVICE, requires_grad=True)
    y = layer_norm_module.layer_norm(x, (4,))
    with (
        configured(layer_norm_module.backward_kernel, TILE=3),
        pytest.raises(
            ValueError, match="backward_kernel has no TILE; there are WEIGHTED, ADDED, ROWS, BLOCK, num_warps"
        ),
    ):
        y.sum().backward()
