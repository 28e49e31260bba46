"""Models with autograd functions of their own: SEW-D's softmax, YOSO's attention, Reformer's reversible layers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from equations import Float64
from torch import Tensor, nn

import lxt
from lxt.audit import audit
from lxt.composites import ATTN_LRP, CP_LRP, Composite
from lxt.patches._forwards import rebound, with_names
from lxt.patches.sew_d import _MaskedSoftmax
from lxt.patches.yoso import YOSO

reformer = pytest.importorskip("transformers.models.reformer.modeling_reformer")
sew_d = pytest.importorskip("transformers.models.sew_d.modeling_sew_d")
yoso = pytest.importorskip("transformers.models.yoso.modeling_yoso")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


FACTOR = 2.0


def times_factor(x: float, *, plus: float = 1.0) -> float:
    return x * FACTOR + plus


def test_a_name_means_something_else_in_the_copy_only() -> None:
    copied = with_names(times_factor, FACTOR=lambda factor: 10 * factor)
    assert copied is not None
    assert copied(3.0) == 61.0
    assert times_factor(3.0) == 7.0
    assert FACTOR == 2.0


def test_a_function_without_the_name_is_left_alone() -> None:
    assert with_names(times_factor, ANOTHER=lambda value: value) is None
    assert rebound(ANOTHER=lambda value: value)(nn.Linear(2, 2), ATTN_LRP) is None


def test_sew_d_softmax_is_the_models_to_the_last_bit() -> None:
    scores = normal(2, 3, 5, 5).requires_grad_()
    mask = torch.ones(2, 1, 5, 5, dtype=torch.int)
    mask[1, :, :, 3:] = 0
    theirs, ours = (function.apply(scores, mask, -1) for function in (sew_d.XSoftmax, _MaskedSoftmax))
    assert torch.equal(theirs, ours)
    cotangent = normal(2, 3, 5, 5, seed=1)
    (expected,) = torch.autograd.grad(theirs, scores, cotangent)
    (found,) = torch.autograd.grad(ours, scores, cotangent)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


class Attention(nn.Module):
    """YOSO's attention by itself, without a mask."""

    def __init__(self) -> None:
        super().__init__()
        config = yoso.YosoConfig(hidden_size=8, num_attention_heads=2, conv_window=None, hash_code_len=3)
        torch.manual_seed(0)
        self.attention = yoso.YosoSelfAttention(config).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, attention_mask=torch.zeros(x.shape[:2], dtype=x.dtype))[0]


def yoso_by_hand(attention: Any, x: Tensor, cotangent: Tensor, shares: tuple[float, float]) -> Tensor:
    """c_x with W = (1 - arccos(q k) / pi)^h, dW/d(q k) taken as W h / 2 as YOSO does; `shares` of the scores, of v."""
    heads, width, power = attention.num_attention_heads, attention.attention_head_size, attention.hash_code_len
    total = torch.zeros_like(x)
    for head in range(heads):
        rows = slice(head * width, (head + 1) * width)
        weights = [layer.weight[rows].detach() for layer in (attention.query, attention.key, attention.value)]
        biases = [layer.bias[rows].detach() for layer in (attention.query, attention.key, attention.value)]
        q, k, v = (x[0] @ weight.T + bias for weight, bias in zip(weights, biases, strict=True))
        q_norm, k_norm = q.norm(dim=-1, keepdim=True), k.norm(dim=-1, keepdim=True)
        expectation = (1 - torch.arccos((q / q_norm) @ (k / k_norm).T) / math.pi) ** power
        c = cotangent[0, :, rows] / (expectation @ v).norm(dim=-1, keepdim=True)
        c_scores = (c @ v.T) * expectation * power / 2 * shares[0] / 2
        c_q, c_k = c_scores @ (k / k_norm) / q_norm, c_scores.T @ (q / q_norm) / k_norm
        c_v = expectation.T @ c * shares[1]
        total[0] += c_q @ weights[0] + c_k @ weights[1] + c_v @ weights[2]
    return total


@pytest.mark.parametrize(
    ("rules", "shares"), [(ATTN_LRP, (0.5, 0.5)), (CP_LRP, (0.0, 1.0)), (ATTN_LRP.but(qkv=(0.5, 0.5, 1)), (1.0, 1.0))]
)
def test_yoso_has_the_shares_of_attention(rules: Composite, shares: tuple[float, float]) -> None:
    model, x, cotangent = Attention(), normal(1, 5, 8, seed=1).requires_grad_(), normal(1, 5, 8, seed=2)
    with torch.no_grad():
        bare = model(x)
    with lxt.monkey_patch(model, rules, patch_map=YOSO):
        y = model(x)
        (found,) = torch.autograd.grad(y, x, cotangent)
    assert torch.equal(y, bare)
    expected = yoso_by_hand(model.attention, x.detach(), cotangent, shares)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    audited = audit(model, {"x": x}, lambda y: (y * cotangent).sum(), rules, wrt="x")
    assert audited.unknown == ()
    torch.testing.assert_close(audited.relevance["x"], x.detach() * expected, rtol=1e-9, atol=1e-12)


def test_bloom_is_differentiated_through_its_own_gelu() -> None:
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    torch.manual_seed(0)
    model = bloom.BloomModel(bloom.BloomConfig(vocab_size=40, hidden_size=16, n_layer=1, n_head=2)).double().eval()
    x, cotangent = normal(1, 5, 16).requires_grad_(), normal(1, 5, 16, seed=1)
    with Float64():
        (expected,) = torch.autograd.grad(model(inputs_embeds=x).last_hidden_state, x, cotangent)
        with lxt.monkey_patch(model, "gradient"):
            (found,) = torch.autograd.grad(model(inputs_embeds=x).last_hidden_state, x, cotangent)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def small_reformer(hashes: int) -> Any:
    config = reformer.ReformerConfig(
        vocab_size=40,
        hidden_size=16,
        num_attention_heads=2,
        attention_head_size=8,
        feed_forward_size=20,
        attn_layers=["local", "lsh"],
        local_attn_chunk_length=4,
        lsh_attn_chunk_length=4,
        num_buckets=2,
        num_hashes=hashes,
        hash_seed=0,
        axial_pos_shape=[4, 4],
        axial_pos_embds_dim=[8, 8],
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        local_attention_probs_dropout_prob=0.0,
        lsh_attention_probs_dropout_prob=0.0,
        is_decoder=False,
    )
    torch.manual_seed(0)
    return reformer.ReformerModel(config).double().eval()


@pytest.mark.parametrize("hashes", [1, 2])
def test_reformer_computes_what_it_did(hashes: int) -> None:
    model, x = small_reformer(hashes), normal(1, 16, 16)
    with torch.no_grad():
        bare = model(inputs_embeds=x).last_hidden_state
    with lxt.monkey_patch(model):
        patched = model(inputs_embeds=x.requires_grad_()).last_hidden_state
    assert patched.requires_grad
    assert torch.equal(patched, bare)


@pytest.mark.parametrize("hashes", [1, 2])
def test_reformer_unrolled_has_the_gradient_of_its_reversible_layers(hashes: int) -> None:
    model, x, cotangent = small_reformer(hashes), normal(1, 16, 16).requires_grad_(), normal(1, 16, 32, seed=1)
    with lxt.monkey_patch(model, "gradient"):
        (found,) = torch.autograd.grad(model(inputs_embeds=x).last_hidden_state, x, cotangent)
    model.train()  # their own backward runs in training only
    loss = (model(inputs_embeds=x).last_hidden_state * cotangent).sum()
    loss.backward()
    assert x.grad is not None
    torch.testing.assert_close(found, x.grad, rtol=1e-9, atol=1e-12)


def test_an_exponential_over_its_logsumexp_is_a_softmax_to_the_auditor() -> None:
    def written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.T
        return torch.exp(scores - torch.logsumexp(scores, -1, keepdim=True)) @ v

    def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.T, -1) @ v

    inputs = {name: normal(4, 3, seed=seed) for seed, name in enumerate("qkv")}
    for rules in (ATTN_LRP, CP_LRP):
        found, expected = (
            audit(_Formula(formula), inputs, torch.sum, rules, wrt=("q", "k", "v")).relevance
            for formula in (written, softmax)
        )
        for name in inputs:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-14)


def test_a_logsumexp_used_otherwise_is_a_constant_to_the_auditor() -> None:
    inputs = {"x": normal(4, 3), "y": normal(4, 3, seed=1)}
    formula = _Formula(lambda x, y: y * torch.logsumexp(x, -1, keepdim=True))
    audited = audit(formula, inputs, torch.sum, ATTN_LRP, wrt=("x", "y"))
    assert not audited.relevance["x"].any()
    assert audited.relevance["y"].any()


class _Formula(nn.Module):
    def __init__(self, formula: Any) -> None:
        super().__init__()
        self.formula = formula

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.formula(**inputs)


@pytest.mark.parametrize("key", ["masked/yoso", "masked/reformer", "audio/sew-d"])
def test_the_whole_model_is_proven(key: str) -> None:
    from lxt.coverage.proof import prove
    from lxt.coverage.subjects import all_subjects

    subject = next(subject for subject in all_subjects() if subject.key == key)
    record = prove(subject)
    assert record.proven, record.reasons()
