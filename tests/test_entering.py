"""Functions that torch implements in Python are entered, with what each version of torch has for it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from lxt.composites import CP_LRP
from lxt.entering import enter
from lxt.mode import RuleMode


@pytest.fixture
def older_torch(monkeypatch):
    monkeypatch.delattr(torch._C, "_skip_one_hop_torch_function", raising=False)


def gradient_under_rules() -> torch.Tensor:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64).requires_grad_(False)
    x = torch.randn(1, 4, 8, dtype=torch.float64, requires_grad=True)
    with RuleMode(CP_LRP):
        output = attention(x, x, x, need_weights=False)[0]
    return torch.autograd.grad(output[0, -1, 3], x)[0]


def test_an_older_torch_gives_the_same(request):
    newer = gradient_under_rules()
    request.getfixturevalue("older_torch")
    assert torch.equal(gradient_under_rules(), newer)


@pytest.mark.usefixtures("older_torch")
def test_keywords_and_defaults_survive():
    x = torch.randn(1, 1, 6, 6)
    expected = F.interpolate(x, scale_factor=2.0)
    assert torch.equal(enter(F.interpolate, (x,), {"scale_factor": 2.0}), expected)


def public(x):
    return _private(x)


def _private(x):
    if has_torch_function_unary(x):
        return handle_torch_function(public, (x,), x)
    return torch.square(x)


@pytest.mark.parametrize("older", [False, True])
def test_a_function_that_asks_in_its_private_parts(older, request):
    """As torch.unique_consecutive does."""
    if older:
        request.getfixturevalue("older_torch")
    x = torch.tensor([3.0], requires_grad=True)
    with RuleMode(CP_LRP):
        y = public(x)
    assert torch.autograd.grad(y, x)[0].item() == 3.0  # half the gradient: the rule for x * x
