"""The operator mode under composites with fields that ask for the plain gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from by_hand import (
    COLUMNS,
    agree,
    eager_attention_without_dropout,
    leaves,
    ratio_silu,
    share_matmul,
    share_product,
)
from torch import Tensor

from lxt.composites import CP_LRP, GRADIENT, Composite
from lxt.mode import RuleMode


def hand_written_norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


NORMS = {
    "layer_norm": lambda x: F.layer_norm(x, (COLUMNS,)),
    "rms_norm": lambda x: F.rms_norm(x, (COLUMNS,)),
    "group_norm": lambda x: F.group_norm(x, 2),
}


@pytest.mark.parametrize(
    "function",
    [
        *NORMS.values(),
        F.silu,
        F.gelu,
        F.elu,
        torch.tanh,
        lambda a: a**3,
        hand_written_norm,
        lambda a: a * a.sigmoid(),
        lambda a: F.linear(a, a),
        F.glu,
        lambda a: a @ a.T,
        lambda a: 1 / (1 + a.exp()),
        lambda a: a.clone().mul_(a),
        lambda a: F.elu_(a * 1),
    ],
)
def test_the_gradient_preset_differentiates(function):
    agree(function, lambda a: function(a), GRADIENT)


@pytest.mark.parametrize("function", NORMS.values())
def test_gradient_of_a_norm_alone(function):
    agree(function, lambda a: function(a), Composite(norm="gradient"))


def test_gradient_of_activations_alone_still_marks_gates():
    agree(F.silu, lambda a: F.silu(a), Composite(activation="gradient"))
    agree(lambda a, b: F.elu(a) * b, lambda a, b: F.elu(a).detach() * b, CP_LRP.but(activation="gradient"))


def test_gradient_of_products_alone():
    composite = Composite(product="gradient")
    agree(lambda a, b: F.silu(a) * b, lambda a, b: ratio_silu(a) * b, composite)
    agree(lambda a, b: a @ b.T, share_matmul, composite)
    agree(hand_written_norm, lambda a: a * hand_written_norm(a).detach() / a.detach(), composite)


def test_gradient_of_attention_alone():
    composite = Composite(attention="gradient")
    agree(eager_attention_without_dropout, lambda q, k, v: eager_attention_without_dropout(q, k, v), composite)
    agree(lambda a, b: a * b, share_product, composite)


def test_the_gradient_of_a_norm_that_is_written_out_needs_that_of_products():
    (x,) = leaves(1)
    with RuleMode(Composite(norm="gradient")), pytest.raises(ValueError, match="product='gradient'"):
        hand_written_norm(x)
    agree(hand_written_norm, lambda a: hand_written_norm(a), Composite(norm="gradient", product="gradient"))
