"""Which implementation runs: kernels for tensors on a GPU, in whole models too; their eager twins elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from importlib import import_module

import pytest
import torch
from kernels import DEVICE, INTERPRETED
from small import PROMPTS, a_tokenizer, gpt2, llama

import lxt
from lxt import dispatch, norm_rules, rules

pytest.importorskip("triton")

NAMES = (
    "add_layer_norm",
    "add_rms_norm",
    "gated_product",
    "identity",
    "layer_norm",
    "relevance",
    "rms_norm",
    "rotary",
    "value_attention",
)


class FakeTensor:
    """As much of a tensor on a GPU as the dispatch looks at."""

    is_cuda = True

    def __init__(self, dtype=torch.float32, device="cuda:0"):
        self.dtype, self.device = dtype, torch.device(device)


@pytest.fixture
def a_gpu(monkeypatch):
    monkeypatch.setattr(dispatch, "_runs_kernels", lambda device: True)
    monkeypatch.setattr(dispatch, "_is_plain", lambda x: isinstance(x, FakeTensor))
    monkeypatch.setenv("LXT_KERNELS", "exact")


def test_tensors_of_the_cpu_have_no_kernel():
    assert dispatch.kernel("rms_norm", torch.ones(2), torch.ones(2)) is None


@pytest.mark.parametrize("name", NAMES)
def test_every_kernel_is_found_by_its_name(a_gpu, name):
    assert dispatch.kernel(name, FakeTensor()) is getattr(import_module(f"lxt.triton_kernels.{name}"), name)


@pytest.mark.parametrize(
    "others",
    [[FakeTensor(torch.float64)], [FakeTensor(device="cuda:1")], [None, FakeTensor(torch.int8)], [torch.ones(2)]],
    ids=["float64", "another device", "integers", "subclass"],
)
def test_what_a_kernel_can_not_read_runs_eagerly(a_gpu, others):
    if isinstance(others[0], torch.Tensor):
        others[0] = FakeTensor()
        others[0].__class__ = type("Quantised", (), {"is_cuda": True})
    assert dispatch.kernel("identity", FakeTensor(), *others) is None


def test_the_environment_says_how_far_kernels_go(a_gpu, monkeypatch):
    monkeypatch.delenv("LXT_KERNELS")
    assert dispatch.kernel("rms_norm", FakeTensor()) is None
    monkeypatch.setenv("LXT_KERNELS", "off")
    assert dispatch.kernel("rms_norm", FakeTensor()) is None
    monkeypatch.setenv("LXT_KERNELS", "fast")
    for name in NAMES:
        found = dispatch.kernel(name, FakeTensor())
        inexact = isinstance(found, partial) and found.keywords == {"exact": False}
        assert inexact == (name in dispatch.INEXACT_FORWARDS)
    monkeypatch.setenv("LXT_KERNELS", "on")
    with pytest.raises(ValueError, match="LXT_KERNELS='on' in the environment; allowed: exact, fast, off"):
        dispatch.kernel("rms_norm", FakeTensor())


def test_names_of_coefficients():
    assert dispatch.form("silu") == "silu"
    assert dispatch.form(lxt.coefficients.COEFFICIENTS["gelu"]) == "gelu"
    assert dispatch.form("asinh") is None  # has a coefficient, and no kernel
    assert dispatch.form(lambda x: x) is None


def test_triton_is_not_loaded_without_a_gpu():
    code = (
        "import sys, torch, lxt.rules as rules; x = torch.ones(2, 4, requires_grad=True);"
        "rules.rms_norm(x, torch.ones(4), 1e-6).sum().backward();"
        "rules.identity(x, torch.tanh, 'tanh').sum().backward(); print('triton' in sys.modules)"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert result.stdout.strip() == "False"


@pytest.fixture
def everywhere(monkeypatch):
    """Kernels run on any device, and are counted."""
    monkeypatch.setenv("LXT_KERNELS", "off")
    calls = dict.fromkeys(NAMES, 0)

    def forced(name, *tensors):
        function = getattr(import_module(f"lxt.triton_kernels.{name}"), name)
        given = [x for x in tensors if x is not None]
        if any(x.dtype not in dispatch.DTYPES for x in given):
            return None

        def counted(*args):
            calls[name] += 1
            return function(*args)

        return counted

    def switch():
        monkeypatch.setattr(rules, "kernel", forced)
        monkeypatch.setattr(norm_rules, "kernel", forced)
        return calls

    return switch


@pytest.mark.parametrize("preset", ["attnlrp", "cp"])
@pytest.mark.parametrize("build", [llama, gpt2])
def test_a_model_explained_by_kernels(build, preset, everywhere):
    explainer = lxt.Attributor(build().to(DEVICE), a_tokenizer(), rules=preset)
    options = {"latents": ("residual", "head"), "target": 7}
    expected = explainer.attribute(PROMPTS[0], **options)
    calls = everywhere()
    found = explainer.attribute(PROMPTS[0], **options)
    scale = expected.relevance.abs().max().item()
    # float32 sums of 32 numbers and three layers in another order.
    torch.testing.assert_close(found.relevance, expected.relevance, rtol=0, atol=2**-17 * scale)
    for name in ("residual", "head"):
        size = expected.latents[name].abs().max().item()
        torch.testing.assert_close(found.latents[name], expected.latents[name], rtol=0, atol=2**-17 * size)
    used = {name for name, count in calls.items() if count}
    norms = {"add_rms_norm", "rms_norm", "gated_product", "rotary"} if build is llama else {"layer_norm", "identity"}
    assert used == norms | {"relevance"} | ({"value_attention"} if preset == "cp" else set())


def test_a_kernel_that_fails_says_so(monkeypatch):
    from lxt.triton_kernels import identity

    class Broken:
        __name__ = "backward_kernel"

        def __getitem__(self, grid):
            def run(*args, **options):
                raise ValueError("out of resources")

            return run

    monkeypatch.setattr(identity, "backward_kernel", Broken())
    x = torch.ones(2, 3, device=DEVICE, requires_grad=True)
    y = identity.identity(x, torch.tanh, "tanh")
    with pytest.raises(RuntimeError, match=r"backward_kernel failed on .* with float32\[2, 3\].*LXT_KERNELS=off"):
        y.sum().backward()


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
def test_on_a_gpu_kernels_run_when_asked_for(monkeypatch):
    monkeypatch.setenv("LXT_KERNELS", "exact")
    x = torch.ones(2, 4, device="cuda", requires_grad=True)
    y = rules.rms_norm(x, torch.ones(4, device="cuda"), 1e-6)
    assert y.grad_fn is not None
    assert type(y.grad_fn)._forward_cls.__module__ == "lxt.triton_kernels.rms_norm"
