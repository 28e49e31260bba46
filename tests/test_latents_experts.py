"""Experts and routers: the relevance of what each expert adds, and of what the router decides by."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
import transformers as tf
from equations import Float64
from models import skip_unless_it_runs
from small import llama
from torch import nn
from torch.nn import functional as F

import lxt
from lxt import placement
from lxt.attributor import Attributor
from lxt.latents import Keep, sites
from lxt.loading import model_of
from lxt.memory import resident
from lxt.patches import patch_map_for
from lxt.placement import Budget

HIDDEN, EXPERTS, CHOSEN, VOCABULARY = 16, 4, 2, 41
PROMPTS = [[1, 5, 6, 7, 8, 3], [2, 9, 10, 4, 11, 5]]
TARGET = 7
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 12,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": CHOSEN,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_SHARED = {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "first_k_dense_replace": 0, "topk_group": 1}
TYPES = {
    "qwen3_moe": {"num_experts": EXPERTS, "head_dim": 8},
    "qwen2_moe": {"num_experts": EXPERTS, "shared_expert_intermediate_size": 12},
    "mixtral": {"num_local_experts": EXPERTS},
    "gpt_oss": {"num_local_experts": EXPERTS, "head_dim": 8},
    "glm4_moe": {**_SHARED, "head_dim": 8, "n_group": 1},
    "llama4_text": {
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 12,
        "interleave_moe_layer_step": 1,
        "head_dim": 8,
    },
}
RULES = {
    "attnlrp": lxt.ATTN_LRP,
    "router stopped": lxt.ATTN_LRP.but(router="stop"),
    "cp": lxt.CP_LRP,
    "gradient": lxt.GRADIENT,
}


def build(name="qwen3_moe", dtype=torch.float64, implementation="eager", **options):
    torch.manual_seed(0)
    config = tf.AutoConfig.for_model(name, **_COMMON | TYPES.get(name, {}) | options)
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    if name not in ("llama4_text", "jetmoe"):
        model.set_experts_implementation(implementation)
    return model.to(dtype)


def attribute(model, latents=("expert", "router"), rules="attnlrp", inputs=PROMPTS, **options):
    with Float64():
        return Attributor(model, rules=rules, **options).attribute(inputs, target=TARGET, latents=latents)


def watched(model, modules, rules):
    """The output, and the arguments, of each module, with the output's gradient, as a forward hook sees them."""
    seen = {}

    def keep(module, args, output):
        output.retain_grad()
        seen[module] = args, output

    with ExitStack() as undo:
        for module in modules:
            undo.callback(module.register_forward_hook(keep).remove)
        attribute(model, "expert", rules)  # which has the last layer run in full
    return {module: (args, output.detach(), output.grad) for module, (args, output) in seen.items()}


def blocks(model):
    return [layer.feed_forward if hasattr(layer, "feed_forward") else layer.mlp for layer in model.model.layers]


@pytest.mark.parametrize("rules", RULES)
def test_an_expert_has_the_relevance_of_its_equation(rules):
    model = build()
    found = attribute(model, "expert", RULES[rules]).latents["expert"]
    seen = watched(model, [block.experts for block in blocks(model)], RULES[rules])
    expected = torch.zeros(2, 2, 6, EXPERTS, dtype=torch.float64)
    for layer, (experts, ((hidden, chosen, weights), _, c_y)) in enumerate(seen.items()):
        for token in range(12):
            x, c = hidden[token].detach(), c_y[token]
            for slot in range(CHOSEN):
                e = int(chosen[token, slot])
                gate, up = (experts.gate_up_proj[e] @ x).chunk(2)
                adds = weights[token, slot] * (experts.down_proj[e] @ (F.silu(gate) * up))
                expected[layer, token // 6, token % 6, e] = adds @ c
    torch.testing.assert_close(found.values, expected.detach(), rtol=1e-10, atol=1e-14)
    assert ((found.values[0] != 0).sum(-1) == CHOSEN).all()  # of the last layer only the last token counts


@pytest.mark.parametrize("rules", ["attnlrp", "cp"])
@pytest.mark.parametrize("name", TYPES)
def test_experts_and_what_is_shared_make_up_the_mlp(name, rules):
    model = build(name)
    found = attribute(model, "expert", RULES[rules]).latents["expert"].values
    mlp = watched(model, [block.experts for block in blocks(model)], RULES[rules])
    for layer, (_, y, c_y) in enumerate(mlp.values()):
        whole = y * c_y
        if name == "llama4_text":  # its experts' outputs come one expert after the other
            whole = whole.view(EXPERTS, 12, HIDDEN).sum(0)
        torch.testing.assert_close(found[layer].sum(-1), whole.sum(-1).view(2, 6), rtol=1e-10, atol=1e-14)
    if name != "glm4_moe":
        return
    block = blocks(model)[0]
    seen = watched(model, [block, block.shared_experts], RULES[rules])
    whole, shared = ((y * c_y).view(2, 6, -1).sum(-1) for _, y, c_y in (seen[block], seen[block.shared_experts]))
    torch.testing.assert_close(found[0].sum(-1) + shared, whole, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_each_implementation_gives_the_same(name, implementation):
    def run():
        return attribute(build(name, torch.float32, implementation))

    skip_unless_it_runs(run)
    found, expected = run(), attribute(build(name))
    for latent in ("expert", "router"):
        # float32 through two layers of some forty operations each, against float64
        difference = (found.latents[latent].values - expected.latents[latent].values).abs().max()
        assert difference < 1e-5 * expected.latents[latent].values.abs().max()


@pytest.mark.parametrize("rules", RULES)
def test_a_router_is_activation_times_gradient_of_its_logits(rules, monkeypatch):
    model = build(norm_topk_prob=True)
    found = attribute(model, "router", RULES[rules]).latents["router"]
    logits = []

    def forward(self, hidden):
        logits.append(F.linear(hidden.reshape(-1, HIDDEN), self.weight))
        if logits[-1].requires_grad:
            logits[-1].retain_grad()
        weights, chosen = F.softmax(logits[-1], -1).topk(CHOSEN)
        weights = weights / weights.sum(-1, keepdim=True)
        return logits[-1], weights, chosen

    monkeypatch.setattr(type(model.model.layers[0].mlp.gate), "forward", forward)
    attribute(model, "expert", RULES[rules])
    expected = torch.stack([x.detach() * (0 if x.grad is None else x.grad) for x in logits]).view(2, 2, 6, EXPERTS)
    torch.testing.assert_close(found.values, expected, rtol=1e-5, atol=1e-9)  # transformers' router is float32's
    assert (found.values == 0).all() == (rules in ("router stopped", "cp"))


@pytest.mark.parametrize("checkpoint", ["layer", "nested"])
def test_checkpoints_give_the_same(checkpoint):
    model = build(dtype=torch.float32, num_hidden_layers=5)
    found, expected = (
        Attributor(model, checkpoint=how).attribute(PROMPTS, target=TARGET, latents=("expert", "router"))
        for how in (checkpoint, "off")
    )
    for latent in ("expert", "router"):
        assert torch.equal(found.latents[latent].values, expected.latents[latent].values)
        assert expected.latents[latent].values.abs().max() > 0


def test_reading_them_changes_nothing():
    model = build()
    with_latents, without = attribute(model), attribute(model, ("residual", "head"))
    assert torch.equal(with_latents.relevance, without.relevance)


def test_rows_of_other_lengths_and_several_targets():
    model = build()
    out = attribute(model, inputs=[PROMPTS[0], PROMPTS[1][:3]])
    for latent in ("expert", "router"):
        for row, prompt in enumerate((PROMPTS[0], PROMPTS[1][:3])):
            alone = attribute(model, inputs=[prompt]).latents[latent].values
            both = out.latents[latent].values[:, row : row + 1]
            torch.testing.assert_close(both[:, :, 6 - len(prompt) :], alone, rtol=1e-9, atol=1e-12)
            assert (both[:, :, : 6 - len(prompt)] == 0).all()
    with Float64():
        several = Attributor(model).attribute_targets(PROMPTS[0], [TARGET, 9], latents=("expert", "router"))
    for latent in ("expert", "router"):
        first = attribute(model, inputs=PROMPTS[:1]).latents[latent].values
        torch.testing.assert_close(several.latents[latent].values[:, :1], first, rtol=1e-9, atol=1e-12)
        assert not torch.allclose(several.latents[latent].values[:, 1:], first)


def test_stopped_routers_are_zero_for_every_target():
    model = build()
    with Float64():
        out = Attributor(model, rules="cp").attribute_targets(PROMPTS[0], [TARGET, 9], latents="router")
    assert out.latents["router"].values.shape == (2, 2, 6, EXPERTS)
    assert (out.latents["router"].values == 0).all()


def test_the_largest_of_each_token():
    model = build()
    every = attribute(model, "expert").latents["expert"].values
    kept = attribute(model, Keep("expert", top=1)).latents["expert"]
    values, indices = kept.values, kept.indices
    torch.testing.assert_close(every.gather(-1, indices.long()), values)
    torch.testing.assert_close(values.abs()[..., 0], every.abs().amax(-1))
    torch.testing.assert_close(kept.rest, every.sum(-1) - values.sum(-1))


def switch():
    config = tf.SwitchTransformersConfig(
        vocab_size=VOCABULARY,
        d_model=HIDDEN,
        d_kv=8,
        d_ff=12,
        num_layers=2,
        num_sparse_encoder_layers=2,
        num_heads=2,
        num_experts=EXPERTS,
        dropout_rate=0.5,
        decoder_start_token_id=0,
        initializer_factor=3.0,
    )
    return tf.SwitchTransformersForConditionalGeneration(config)


def nllb():
    config = tf.NllbMoeConfig(
        vocab_size=VOCABULARY,
        d_model=HIDDEN,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=12,
        decoder_ffn_dim=12,
        encoder_sparse_step=1,
        decoder_sparse_step=0,
        num_experts=EXPERTS,
        expert_capacity=64,
        dropout=0.5,
        activation_dropout=0.5,
        moe_token_dropout=0.5,
        second_expert_policy="all",
        init_std=0.5,
    )
    return tf.NllbMoeForConditionalGeneration(config)


@pytest.mark.parametrize("make", [switch, nllb])
def test_dropout_in_training_is_inactive_when_experts_run_again(make):
    torch.manual_seed(0)
    model = make().eval().double()
    expected = attribute(model, "expert").latents["expert"].values
    assert torch.equal(attribute(model.train(), "expert").latents["expert"].values, expected)
    assert expected.abs().sum() > 0
    assert model.training
    assert all(module.training for module in model.modules())


def test_layers_without_experts_are_left_out():
    model = build(num_hidden_layers=3, mlp_only_layers=[1])
    for latent in ("expert", "router"):
        found = attribute(model, latent).latents[latent]
        assert (found.layers, found.values.shape[0]) == ((0, 2), 2)
        only = attribute(model, Keep(latent, layers=(2,))).latents[latent]
        assert only.layers == (2,)
        assert torch.equal(only.values[0], found.values[1])
        with pytest.raises(ValueError, match=r"without experts: 1; those with experts are 0, 2"):
            attribute(model, Keep(latent, layers=(0, 1)))


@pytest.mark.parametrize("latent", ["expert", "router"])
def test_a_model_without_experts_says_so(latent):
    with pytest.raises(ValueError, match=f"{latent!r} is wanted of layers without experts: 0, 1, 2; leave"):
        Attributor(llama()).attribute(PROMPTS[0], latents=latent)


def test_experts_of_another_form_are_refused():
    model = build("jetmoe", num_local_experts=EXPERTS, kv_channels=8, num_attention_heads=None)
    with pytest.raises(ValueError, match=r"JetMoeParallelExperts.*their relevance is not known"):
        attribute(model, "expert")


def test_experts_that_do_not_add_up_are_refused(monkeypatch):
    model = build()
    experts = type(blocks(model)[0].experts)
    forward = experts.forward

    def squared(self, hidden_states, top_k_index, top_k_weights):
        return forward(self, hidden_states, top_k_index, top_k_weights**2)

    monkeypatch.setattr(experts, "forward", squared)
    with pytest.raises(ValueError, match="is not the sum of its experts times their weights"):
        attribute(model, "expert", "gradient")  # the other rules share a square among its factors


def test_a_block_that_gives_its_experts_some_tokens_only_is_refused(monkeypatch):
    model = build()
    block = type(blocks(model)[0])
    forward = block.forward

    def half(self, hidden):
        return torch.cat([forward(self, hidden[:, :3].contiguous()), hidden[:, 3:]], 1)

    monkeypatch.setattr(block, "forward", half)
    for latent in ("expert", "router"):
        with pytest.raises(ValueError, match=r"has the shape \(6, 4\), where the prompt's is \(2, 6\)"):
            attribute(model, latent)


def test_nothing_is_left_behind_after_an_error(monkeypatch):
    model = build()

    def fails(self, *args):
        raise KeyError("in the middle of a router")

    before = torch.overrides._get_current_function_mode_stack()
    monkeypatch.setattr(type(blocks(model)[0].gate), "forward", fails)
    with pytest.raises(KeyError):
        attribute(model)
    assert torch.overrides._get_current_function_mode_stack() == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_experts_that_stay_on_disk_give_the_same(tmp_path, monkeypatch):
    pytest.importorskip("accelerate")
    monkeypatch.setattr(placement, "SMALL", 256)  # bytes, so that nothing of a tiny model is small
    build("mixtral", torch.float32).save_pretrained(tmp_path / "model", max_shard_size="20KB")
    (tmp_path / "written").mkdir()
    placed = model_of(str(tmp_path / "model"), None, Budget(resident() + 2**26), tmp_path / "written").eval()
    assert "disk" in placed.hf_device_map.values()
    found, expected = (
        Attributor(model).attribute(PROMPTS, target=TARGET, latents=("expert", "router"))
        for model in (placed, model_of(str(tmp_path / "model"), None).eval())
    )
    for latent in ("expert", "router"):
        assert torch.equal(found.latents[latent].values, expected.latents[latent].values)


@pytest.mark.parametrize("latent", ["expert", "router"])
def test_a_forecast_counts_them(latent):
    explainer = Attributor(build(dtype=torch.float32))
    without, counted = (explainer.forecast(PROMPTS, latents=names).flops for names in ("head", ("head", latent)))
    assert counted > without if latent == "expert" else counted == without  # experts run once more


def test_the_places_are_the_experts_and_their_gate():
    model = build("qwen2_moe")
    found = sites(model, patch_map_for(model), (Keep("expert"), Keep("router")))
    expected = [block.experts for block in blocks(model)] + [block.gate for block in blocks(model)]
    assert [site.module for site in found] == expected
    assert isinstance(found[0].module, nn.Module)
