"""The operator mode: attention in every spelling, and routers."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from by_hand import (
    COLUMNS,
    CONSTANT,
    ROWS,
    agree,
    gradients,
    leaves,
    share,
)
from torch import Tensor

from lxt.composites import ATTN_LRP, CP_LRP, GRADIENT
from lxt.mode import RuleMode

ONES = torch.ones(ROWS, ROWS, dtype=torch.float64)


def eager_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    scores = torch.matmul(q, k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    scores = scores if mask is None else scores + mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float64).to(q.dtype)
    return F.dropout(weights, 0.5, training=True) @ v


def einsum_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("qd,kd->qk", q * q.shape[-1] ** -0.5, k).softmax(-1)
    return torch.einsum("qk,kd->qd", weights, v)


def baddbmm_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.baddbmm(ONES[None], q[None], k.T[None], beta=0, alpha=q.shape[-1] ** -0.5)
    return torch.bmm(scores.softmax(-1), v[None])[0]


SPELLINGS = {"eager": eager_attention, "einsum": einsum_attention, "baddbmm": baddbmm_attention}
KINDS = {
    "attnlrp": ATTN_LRP,
    "cp": CP_LRP,
    "gradient": GRADIENT,
    "value_only": ATTN_LRP.but(attention="value_only"),
    "factors": ATTN_LRP.but(qkv=(0.5, 0.5, 1.0)),
    "other factors": ATTN_LRP.but(qkv=(0.1, 0.1, 0.7)),
    "temperature": ATTN_LRP.but(softmax_temperature=2.0),
    "both": ATTN_LRP.but(softmax_temperature=2.0, qkv=(0.5, 0.5, 1.0)),
    "gradient at a temperature": GRADIENT.but(softmax_temperature=2.0),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_attention_written_out_is_attention_fused(kind, spelling):
    inputs = leaves(3)
    results = []
    for attention in (SPELLINGS[spelling], F.scaled_dot_product_attention):
        with RuleMode(KINDS[kind]):
            y = attention(*(x + 0 for x in inputs))
        results.append(gradients(y, inputs))
    for written, fused in zip(*results, strict=True):
        torch.testing.assert_close(written, fused, rtol=1e-11, atol=1e-13)


def test_attention_by_hand():
    q, k, v = leaves(3)
    for attention in (F.scaled_dot_product_attention, *SPELLINGS.values()):
        with RuleMode(ATTN_LRP):
            y = attention(q, k, v)
        by_hand = F.scaled_dot_product_attention(share(q, 0.25), share(k, 0.25), share(v, 0.5))
        for actual, expected in zip(gradients(y, [q, k, v]), gradients(by_hand, [q, k, v]), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_unequal_factors_need_a_fused_attention(spelling):
    composite, inputs = ATTN_LRP.but(qkv=(0.1, 0.3, 0.6)), leaves(3)
    with RuleMode(composite), pytest.raises(ValueError, match="sdpa"):
        SPELLINGS[spelling](*inputs)
    agree(
        F.scaled_dot_product_attention,
        lambda q, k, v: F.scaled_dot_product_attention(share(q, 0.1), share(k, 0.3), share(v, 0.6)),
        composite,
    )
    # a matrix product with a constant is none of attention's
    agree(lambda a: torch.einsum("ij,kj->ik", a @ CONSTANT.T, ONES), lambda a: a @ CONSTANT.T @ ONES, composite)


@pytest.mark.parametrize("router", ["uniform", "stop"])
def test_router(router):
    generator = torch.Generator().manual_seed(1)
    experts = torch.randn(2, COLUMNS, COLUMNS, generator=generator, dtype=torch.float64)

    def moe(x: Tensor, weigh: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        weights, chosen = torch.topk(torch.softmax(x[:, :2], -1, dtype=torch.float64), 1, dim=-1)
        weights = weights.to(x.dtype)
        out = torch.zeros_like(x)
        for i, expert in enumerate(experts):
            token, slot = torch.where(chosen == i)
            out.index_add_(0, token, weigh(x[token] @ expert, weights[token, slot, None]))
        return out

    def by_hand(h: Tensor, w: Tensor) -> Tensor:
        return h * w.detach() if router == "stop" else share(h, 0.5) * share(w, 0.5)

    agree(lambda x: moe(x, operator.mul), lambda x: moe(x, by_hand), ATTN_LRP.but(router=router))


CARRIERS = {
    "max": lambda weights: torch.max(weights, dim=-1).values.unsqueeze(-1),
    "amax": lambda weights: weights.amax(-1, keepdim=True),
    "sum of two": lambda weights: weights[..., :1] + weights[..., 1:2],
    "pad": lambda weights: F.pad(weights, (1, 0))[..., 1:],
    "as_strided": lambda weights: weights.contiguous().as_strided((ROWS, 1), (weights.shape[-1], 1)),
}


@pytest.mark.parametrize("carrier", CARRIERS)
def test_what_is_taken_of_softmax_weights_is_weights(carrier):
    def routed(x: Tensor, weigh: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return weigh(CARRIERS[carrier](torch.softmax(x, -1, dtype=torch.float64)).to(x.dtype), x)

    agree(
        lambda x: routed(x, operator.mul),
        lambda x: routed(x, lambda weights, x: weights.detach() * x),
        ATTN_LRP.but(router="stop"),
    )


@pytest.mark.parametrize("square", [torch.square, lambda x: x**2, lambda x: torch.pow(x, 2)])
def test_a_squared_relu_is_one_activation(square):
    agree(lambda x: square(torch.relu(x)), lambda x: square(torch.relu(x)), ATTN_LRP.but(activation="gradient"))
    agree(lambda x: square(torch.relu(x)), lambda x: x * torch.relu(x).detach())
    agree(lambda x: square(x), lambda x: x * x.detach(), ATTN_LRP.but(activation="gradient"))


def test_an_active_mask_takes_the_softmaxs_share_where_query_and_key_are_constants():
    def written(x: Tensor) -> Tensor:
        return share((x @ x.detach().mT).softmax(-1), 0.5) @ share(x, 0.5)

    (x,) = leaves(1)
    zero = torch.zeros_like(x)
    x4, zero4 = x[None, None], zero[None, None]
    with RuleMode(ATTN_LRP):
        mask = (x @ x.detach().mT)[None, None]
        y = F.scaled_dot_product_attention(zero4, zero4, x4, attn_mask=mask)[0, 0]
    for found, expected in zip(gradients(y, [x]), gradients(written(x), [x]), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
