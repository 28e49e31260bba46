"""Attention implementations from transformers' table: the rule goes around them, the table stays as it is."""

from __future__ import annotations

import pytest
import torch
from equations import Float64
from models import build, inputs_of
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import lxt
from lxt.mode import UnknownOperation


class StandIn(torch.autograd.Function):
    """A kernel that torch's operators don't show, as flash attention's: attention with its own backward."""

    @staticmethod
    def forward(ctx, query, key, value, scaling):
        ctx.save_for_backward(query, key, value)
        ctx.scaling = scaling
        return StandIn.attention(query, key, value, scaling)

    @staticmethod
    def attention(query, key, value, scaling):
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        scores = query @ key.transpose(-2, -1) * scaling
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value

    @staticmethod
    def backward(ctx, gradient):
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            out = StandIn.attention(*inputs, ctx.scaling)
            return *torch.autograd.grad(out, inputs, gradient), None


def kernel_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    return StandIn.apply(query, key, value, scaling).transpose(1, 2).contiguous(), None


@pytest.fixture(params=["written in torch", "a kernel"])
def name(request):
    table = dict(AttentionInterface._global_mapping)
    function = kernel_attention if request.param == "a kernel" else sdpa_attention_forward
    AttentionInterface.register("stand_in", function)
    AttentionMaskInterface.register("stand_in", sdpa_mask)
    yield "stand_in"
    del AttentionInterface._global_mapping["stand_in"], AttentionMaskInterface._global_mapping["stand_in"]
    assert table == AttentionInterface._global_mapping


def gradient(model, rules):
    inputs = inputs_of("llama")
    with Float64(), lxt.monkey_patch(model, rules):
        logits = model(**inputs).logits
    logits[0, -1, 5].backward()
    return logits.detach(), inputs["inputs_embeds"].grad


@pytest.mark.parametrize("rules", [lxt.ATTN_LRP, lxt.CP_LRP, lxt.GRADIENT], ids=lambda rules: rules.name)
def test_the_rule_reaches_a_registered_implementation(name, rules):
    model = build("llama", "sdpa")
    expected = gradient(model, rules)
    model.set_attn_implementation(name)
    found = gradient(model, rules)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12 * b.abs().max().item())


def test_a_kernel_that_comes_after_patching_is_refused():
    AttentionInterface.register("late", kernel_attention)
    AttentionMaskInterface.register("late", sdpa_mask)
    try:
        model = build("llama", "sdpa")
        with lxt.monkey_patch(model):
            model.set_attn_implementation("late")
            with pytest.raises(UnknownOperation, match="StandIn"):
                model(**inputs_of("llama"))
    finally:
        del AttentionInterface._global_mapping["late"], AttentionMaskInterface._global_mapping["late"]


def test_forwards_come_back(name):
    model = build("llama", "sdpa")
    model.set_attn_implementation(name)
    attention = model.model.layers[0].self_attn
    with lxt.monkey_patch(model):
        assert "forward" in attention.__dict__
    assert "forward" not in attention.__dict__


def test_a_temperature_that_cannot_reach_the_softmax_is_refused(name):
    model = build("llama", "sdpa")
    model.set_attn_implementation(name)
    with pytest.raises(ValueError, match="never shows"):
        lxt.monkey_patch(model, lxt.ATTN_LRP.but(softmax_temperature=2.0))
    assert all("forward" not in module.__dict__ for module in model.modules())
