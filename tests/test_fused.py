"""Fused forwards: each one alone, all and none give the same logits and relevance, and a hooked part is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from equations import Float64
from models import EXAMPLES, build, inputs_of
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.gptj import modeling_gptj
from transformers.models.llama import modeling_llama

import lxt
from lxt import rules
from lxt.patches import MAPS, patch_map_for
from lxt.patches._rotary import _fused
from lxt.patchmap import PatchMap

ALONE = [(m.architectures[0], part) for m in MAPS if m.architectures[0] in EXAMPLES for part in m.forwards]
PRESETS = [lxt.ATTN_LRP, lxt.CP_LRP]
over_presets = pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)


def built(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    return build(name, "eager" if name == "gemma2" else "sdpa", dtype)  # which has no other


def run(name: str, model: nn.Module, preset: lxt.Composite, patch_map: PatchMap | None) -> tuple[Tensor, Tensor]:
    """The logits, and the relevance of all inputs in a row."""
    inputs = inputs_of(name)
    with Float64(), lxt.monkey_patch(model, preset, patch_map):
        logits = model(**inputs).logits
        EXAMPLES[name].logit(logits).backward()
    return logits.detach(), torch.cat([(x.detach() * x.grad).flatten() for x in inputs.values()])


@over_presets
@pytest.mark.parametrize(("name", "part"), ALONE, ids=[f"{name}-{part}" for name, part in ALONE])
def test_each_fused_forward_alone_changes_nothing(name: str, part: str, preset: lxt.Composite) -> None:
    model = built(name)
    whole = patch_map_for(model)
    logits, relevance = run(name, model, preset, replace(whole, forwards={}))
    others = {key: forward for key, forward in whole.forwards.items() if key != part}
    for forwards in ({part: whole.forwards[part]}, others):
        mixed_logits, mixed = run(name, model, preset, replace(whole, forwards=forwards))
        assert torch.equal(mixed_logits, logits)
        torch.testing.assert_close(mixed, relevance, rtol=1e-9, atol=1e-12 * float(relevance.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_residual_and_norm_in_one_are_to_the_last_bit_the_two(dtype: torch.dtype) -> None:
    """As checkpointing by transformers runs the one in the backward, where the other ran without it."""
    model = build("llama", dtype=dtype)
    whole = patch_map_for(model)
    found = []
    for forwards in (whole.forwards, {k: f for k, f in whole.forwards.items() if k != "LlamaDecoderLayer"}):
        inputs = inputs_of("llama", dtype)
        with lxt.monkey_patch(model, patch_map=replace(whole, forwards=forwards)):
            model(**inputs).logits[0, -1, 5].backward()
        found.append(inputs["inputs_embeds"].grad)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("name", "place"),
    [("llama", "model.layers.1.post_attention_layernorm"), ("bert", "bert.encoder.layer.0.output.LayerNorm")],
)
def test_a_hooked_norm_is_called(name: str, place: str) -> None:
    model, seen = build(name), []
    norm = model.get_submodule(place)
    _, before = run(name, model, lxt.ATTN_LRP, None)
    handle = norm.register_forward_hook(lambda module, args, output: seen.append(output))
    _, after = run(name, model, lxt.ATTN_LRP, None)
    handle.remove()
    assert len(seen) == 1
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)


def test_a_norm_of_the_users_is_called() -> None:
    """A forward that somebody put on the instance is not the class's, which the fused layer would stand in for."""
    model = build("llama")
    norm = model.model.layers[0].post_attention_layernorm
    norm.forward = lambda x: x * 2.0
    plain = model(**inputs_of("llama")).logits
    with lxt.monkey_patch(model):
        assert torch.equal(model(**inputs_of("llama")).logits, plain)


# -- rotary -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt_neox"])
def test_attention_turns_queries_and_keys_in_one_operation(name: str, monkeypatch) -> None:
    model, ran = built(name), []
    run(name, model, lxt.ATTN_LRP, None)  # what the function does was tried
    monkeypatch.setattr("lxt.patches._rotary.rotary", lambda *args: ran.append(1) or rules.rotary(*args))
    run(name, model, lxt.ATTN_LRP, None)
    assert len(ran) == 2 * model.config.get_text_config().num_hidden_layers


def angles(batch: int, tokens: int, size: int) -> tuple[Tensor, Tensor]:
    turn = torch.rand(batch, tokens, size // 2, dtype=torch.float64).repeat(1, 1, 2)
    return turn.cos(), turn.sin()


def test_another_form_of_rotary_embedding_is_left_alone() -> None:
    """GPT-J turns neighbours, and its function is called otherwise."""
    apply = modeling_gptj.apply_rotary_pos_emb
    q = torch.randn(1, 5, 2, 8, dtype=torch.float64).requires_grad_()
    cos, sin = angles(1, 5, 8)

    def neighbours(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return q * cos.unsqueeze(1), k * cos.unsqueeze(1)

    q = q.transpose(1, 2)
    turned, _ = _fused(neighbours)(q, q, cos, sin)
    assert torch.equal(turned, q * cos.unsqueeze(1))
    assert type(turned.grad_fn).__name__ == "MulBackward0"
    assert _fused(apply) is not apply  # trying a function of another signature does no harm


def test_what_does_not_fit_runs_as_it_was_written() -> None:
    cos, sin = angles(2, 5, 8)
    q, k = (torch.randn(2, n, 5, 8, dtype=torch.float64).requires_grad_() for n in (4, 2))
    fused, plain = _fused(modeling_llama.apply_rotary_pos_emb), modeling_llama.apply_rotary_pos_emb
    cases: dict[str, Callable[[], tuple]] = {
        "heads behind tokens": lambda: (q.transpose(1, 2), k.transpose(1, 2), cos, sin, 2),
        "another dtype": lambda: (q.float(), k.float(), cos, sin),
        "a constant": lambda: (q.detach(), k, cos, sin),
        "fits": lambda: (q, k, cos, sin),
    }
    for name, case in cases.items():
        for found, expected in zip(fused(*case()), plain(*case()), strict=True):
            assert torch.equal(found, expected)
            is_ours = type(found.grad_fn).__name__ == "_RotaryBackward"
            assert is_ours == (name == "fits")


# -- experts ----------------------------------------------------------------------------------------------------------


def moe() -> nn.Module:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=32, intermediate_size=24, moe_intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2, vocab_size=61,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).eval()


@over_presets
@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_experts_keep_gate_and_up_only(implementation: str, preset: lxt.Composite, monkeypatch) -> None:
    model, ran = moe(), []
    model.set_experts_implementation(implementation)
    x = torch.randn(1, 6, 32)

    def relevance() -> Tensor:
        embeds = x.clone().requires_grad_()
        with lxt.monkey_patch(model, preset):
            model(inputs_embeds=embeds).logits[0, -1, 3].backward()
        return x * embeds.grad

    gated = rules.gated_product
    monkeypatch.setattr("lxt.patches._experts.gated_product", lambda *args: ran.append(1) or gated(*args))
    fused = relevance()
    assert len(ran) == 2
    monkeypatch.setattr("lxt.patches.has_gated_experts", lambda module: False)
    torch.testing.assert_close(fused, relevance(), rtol=1e-4, atol=1e-6 * float(fused.abs().max()))
    assert len(ran) == 2
    assert "_apply_gate" not in vars(model.model.layers[0].mlp.experts)


def test_a_hooked_activation_of_experts_is_called() -> None:
    model, seen = moe(), []
    model.set_experts_implementation("batched_mm")
    model.model.layers[0].mlp.experts.act_fn.register_forward_hook(lambda *_: seen.append(1))
    with lxt.monkey_patch(model):
        model(inputs_embeds=torch.randn(1, 6, 32).requires_grad_()).logits[0, -1, 3].backward()
    assert seen
