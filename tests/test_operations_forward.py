"""Operations that run another way than they are written, or that are known from an earlier call."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from by_hand import COLUMNS, CONSTANT, agree
from torch.nn import functional as F

from lxt.composites import ATTN_LRP
from lxt.mode import RuleMode

SQUARES = {
    "square": torch.square,
    "**": lambda x: x**2,
    "pow": lambda x: x.pow(2.0),
    "float_power": lambda x: torch.float_power(x, 2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("square", SQUARES.values(), ids=SQUARES)
def test_a_square_is_torchs_to_the_last_bit(square, dtype):
    x = torch.linspace(-9, 9, 1001).to(dtype).requires_grad_()
    for context in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            with RuleMode(ATTN_LRP):
                y = square(x)
            plain = square(x)
        assert y.dtype == plain.dtype
        assert torch.equal(y, plain)
        (c,) = torch.autograd.grad(y.float().sum(), x)
        assert torch.equal(c, x.detach())


def test_under_autocast_a_square_is_torchs_own_call():
    """It may compute in another dtype than a product, as on a GPU."""
    x = torch.linspace(-9, 9, 11).requires_grad_()
    for enabled, graph in ((False, "MulBackward0"), (True, "_ScaleGradientBackward")):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), RuleMode(ATTN_LRP):
            assert type(torch.square(x).grad_fn).__name__ == graph


def test_bounds_and_slopes_that_are_tensors():
    low, slopes = -CONSTANT.abs(), torch.linspace(0.1, 0.7, COLUMNS, dtype=torch.float64)
    agree(lambda a: a.clamp(min=low), lambda a: a * (a.clamp(min=low) / a).detach())
    agree(lambda a: a.clamp(min=CONSTANT), lambda a: 0 * a)  # above 0 in places: a constant
    agree(lambda a: F.prelu(a, slopes), lambda a: a * (F.prelu(a, slopes) / a).detach())


def test_what_is_known_of_a_function_is_of_its_options():
    for slope in (0.1, 0.5, 0.1):
        agree(lambda a: F.leaky_relu(a, slope), lambda a: a * (F.leaky_relu(a, slope) / a).detach())  # noqa: B023
    for low in (-0.5, 0.5, -0.5):  # above 0 it is a constant
        part = float(low < 0)
        agree(lambda a: a.clamp(min=low), lambda a: part * a * (a.clamp(min=low) / a).detach())  # noqa: B023
