"""Mixtures of experts: the router's rule, and the same relevance whatever implementation runs the experts."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import transformers as tf
from equations import Float64
from models import skip_unless_it_runs
from torch import Tensor, nn
from transformers.integrations import moe

import lxt
from lxt.audit import audit, conservation

HIDDEN, TOKENS, EXPERTS = 32, 6, 4
_COMMON = {
    "vocab_size": 61,
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LATENT = {  # multi-head latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 0,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
}
TYPES = {
    "qwen3_moe": {"head_dim": 8, "num_experts": EXPERTS, "moe_intermediate_size": 24, "norm_topk_prob": True},
    "qwen2_moe": {"num_experts": EXPERTS, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
    "mixtral": {"num_local_experts": EXPERTS},
    "gpt_oss": {"head_dim": 8, "num_local_experts": EXPERTS},
    "deepseek_v2": {**_LATENT, "n_group": 1, "topk_group": 1},
    "deepseek_v3": {**_LATENT, "n_group": 2, "topk_group": 1, "norm_topk_prob": True},
    "glm4_moe": {
        "head_dim": 8,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 0,
        "n_group": 1,
        "topk_group": 1,
    },
    "llama4_text": {
        "head_dim": 8,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 24,
        "interleave_moe_layer_step": 1,
    },
    "olmoe": {"num_experts": EXPERTS},
    "jetmoe": {"num_local_experts": EXPERTS, "kv_channels": 8, "num_attention_heads": None},
    "phimoe": {"num_local_experts": EXPERTS},
    "granitemoe": {"num_local_experts": EXPERTS},
    "granitemoeshared": {"num_local_experts": EXPERTS, "shared_intermediate_size": 24},
}
WITHOUT_IMPLEMENTATIONS = ("jetmoe", "llama4_text")  # one way to run their experts, in transformers 5.23
SIGMOID = ("deepseek_v3", "glm4_moe", "llama4_text")  # their routers' weights are constants to every composite but one
RULES = {
    "half": lxt.ATTN_LRP,
    "stop": lxt.ATTN_LRP.but(router="stop"),
    "cp": lxt.CP_LRP,
    "half, value_only": lxt.ATTN_LRP.but(attention="value_only"),
}

each_type = pytest.mark.parametrize("name", TYPES)
each_rule = pytest.mark.parametrize("rules", RULES)


def build(name: str, implementation: str = "eager", dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    options = {key: value for key, value in (_COMMON | TYPES[name]).items() if value is not None}
    try:
        config = tf.AutoConfig.for_model(name, **options)
    except ValueError:
        pytest.skip(f"this version of transformers has no {name}")
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
            if "bias" in key.rsplit(".", 1)[-1]:
                parameter.zero_()  # a bias takes its share, and the sum would not be the logit
            elif parameter.dim() == 1:
                parameter.add_(1)
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn_like(buffer) * 0.3)
    if name not in WITHOUT_IMPLEMENTATIONS:
        model.set_experts_implementation(implementation)
    return model.to(dtype)


def inputs(dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, TOKENS, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)


def relevance(model: nn.Module, rules: lxt.Composite, dtype: torch.dtype) -> tuple[Tensor, float]:
    x = inputs(dtype).requires_grad_()
    with lxt.monkey_patch(model, rules):
        logit = model(inputs_embeds=x, use_cache=False).logits[0, -1, 5]
    (gradient,) = torch.autograd.grad(logit, x)
    return (x * gradient).detach(), logit.item()


@cache
def expected(name: str, rules: str) -> tuple[Tensor, float]:
    with Float64():
        return relevance(build(name), RULES[rules], torch.float64)


@each_rule
@each_type
def test_the_auditor_agrees_and_what_must_be_conserved_is(name, rules):
    found, logit = expected(name, rules)
    with Float64():
        given = {"inputs_embeds": inputs(torch.float64), "use_cache": False}
        audited = audit(build(name), given, lambda output: output.logits[0, -1, 5], RULES[rules])
    assert not audited.unknown
    torch.testing.assert_close(audited.relevance["inputs_embeds"], found, rtol=1e-9, atol=1e-9 * found.abs().max())
    if RULES[rules].conserves:
        assert conservation(found.sum(), logit) < 1e-9


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@each_rule
@each_type
def test_each_implementation_gives_the_same_relevance(name, rules, implementation):
    if name in WITHOUT_IMPLEMENTATIONS and implementation != "eager":
        with pytest.raises(ValueError, match="does not support setting experts implementation"):
            build(name).set_experts_implementation("grouped_mm")
        return
    skip_unless_it_runs(lambda: build(name, implementation, torch.float32))
    model, x = build(name, implementation, torch.float32), inputs(torch.float32).requires_grad_()
    skip_unless_it_runs(lambda: model(inputs_embeds=x, use_cache=False).logits.sum().backward())
    found, _ = relevance(model, RULES[rules], torch.float32)
    reference, _ = expected(name, rules)
    # float32 through two layers of some forty operations each, against float64
    assert float((found - reference).abs().max()) < 1e-5 * float(reference.abs().max())


@pytest.mark.parametrize("rules", ["half", "cp"])
def test_where_torch_has_no_grouped_product_transformers_own_has_the_rule(rules, monkeypatch):
    monkeypatch.setattr(moe, "_can_use_grouped_mm", lambda *_: False)
    found, _ = relevance(build("mixtral", "grouped_mm", torch.float32), RULES[rules], torch.float32)
    reference, _ = expected("mixtral", rules)
    assert float((found - reference).abs().max()) < 1e-5 * float(reference.abs().max())


@each_type
def test_stopping_the_router_changes_what_a_softmax_routes(name):
    half, stop = expected(name, "half")[0], expected(name, "stop")[0]
    assert torch.equal(half, stop) == (name in SIGMOID)


@pytest.mark.parametrize("renormalised", [True, False])
@pytest.mark.parametrize("router", ["half", "stop"])
def test_a_block_of_experts_has_the_relevance_of_its_equations(router, renormalised):
    config = tf.Qwen3MoeConfig(
        hidden_size=5, moe_intermediate_size=3, num_experts=4, num_experts_per_tok=2, norm_topk_prob=renormalised
    )
    torch.manual_seed(0)
    block = tf.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeSparseMoeBlock(config).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn_like(parameter))
    x, c = torch.randn(1, 1, 5, dtype=torch.float64, requires_grad=True), torch.randn(5, dtype=torch.float64)
    with Float64(), lxt.monkey_patch(block, lxt.ATTN_LRP.but(router=router)):
        y = block(x)
        y = y[0] if isinstance(y, tuple) else y
    (found,) = torch.autograd.grad(y, x, c.view(1, 1, -1))

    h, weight = x.detach().view(-1), block.gate.weight.detach()
    probabilities = torch.softmax(weight @ h, 0)
    chosen = probabilities.topk(2).indices
    scale = probabilities[chosen].sum() if renormalised else 1.0  # a denominator is a constant
    coefficient = torch.zeros(5, dtype=torch.float64)
    share = 0.5 if router == "half" else 1.0
    for expert in chosen.tolist():
        gate_up, down = block.experts.gate_up_proj[expert].detach(), block.experts.down_proj[expert].detach()
        gate, up = gate_up.chunk(2)
        sigmoid = torch.sigmoid(gate @ h)
        act, value = (gate @ h) * sigmoid, up @ h
        c_expert = share * probabilities[expert] / scale * c
        c_hidden = down.T @ c_expert
        coefficient += 0.5 * (up.T @ (c_hidden * act)) + 0.5 * (gate.T @ (c_hidden * value * sigmoid))
        if router == "half":
            c_weight = 0.5 * (down @ (act * value)) @ c / scale
            c_scores = c_weight * probabilities[expert] * (torch.eye(4, dtype=torch.float64)[expert] - probabilities)
            coefficient += weight.T @ c_scores
    torch.testing.assert_close(found.view(-1), coefficient, rtol=1e-12, atol=1e-12)


def test_half_is_another_name_of_uniform():
    assert lxt.Composite(router="half") == lxt.Composite(router="uniform")
    assert lxt.CP_LRP.but(router="half").router == "uniform"
    with pytest.raises(ValueError, match=r"router='third'\) is not a rule; allowed: uniform, half, stop"):
        lxt.Composite(router="third")
