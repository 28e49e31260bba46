"""Positions, windows, caps, scaled and tied embeddings: each conserves, and the auditor agrees.

The texts are longer than the context that the scaled rotary embeddings were made for, so that the scaling acts.
"""

import pytest
import torch
from equations import Float64
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

import lxt
from lxt.audit import audit

IDS = torch.tensor([[5, 6, 7, 8, 40, 41, 42, 9, 3, 2, 11, 12]])
HALF = 4  # of the dimensions of a head
SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
GROUPED = SMALL | {"num_key_value_heads": 2}
GEMMA = GROUPED | {"head_dim": 8, "query_pre_attn_scalar": 8}
ROPES = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 4},
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": 4,
        "short_factor": [1.0] * HALF,
        "long_factor": [1.0, 1.5, 2.0, 4.0],
    },
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 4,
    },
}


def with_rope(kind, model=LlamaForCausalLM, config=LlamaConfig, **more):
    rope = {"rope_type": kind, "rope_theta": 10000.0, **ROPES.get(kind, {})}
    return model(config(**GROUPED, max_position_embeddings=4, rope_parameters=rope, **more))


CASES = {f"rope {kind}": lambda kind=kind: with_rope(kind) for kind in ("default", *ROPES)} | {
    "rope longrope in phi3": lambda: with_rope(
        "longrope", Phi3ForCausalLM, Phi3Config, original_max_position_embeddings=4
    ),
    "rope on a part of each head": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, rotary_pct=0.5)),
    "sliding window": lambda: MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=3)),
    "sliding and full layers, two ropes, scaled embeddings": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**GEMMA, sliding_window=3, layer_types=["sliding_attention", "full_attention"])
    ),
    "softcaps": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            **GEMMA,
            attn_logit_softcapping=1.0,
            final_logit_softcapping=2.0,
            sliding_window=3,
            attn_implementation="eager",
        )
    ),
    "tied embeddings": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED, tie_word_embeddings=True)),
}
over_cases = pytest.mark.parametrize("name", CASES)


def model_of(name) -> nn.Module:
    torch.manual_seed(0)
    model = CASES[name]().eval().double()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def embedded(model):
    with torch.no_grad():
        return model.get_input_embeddings()(IDS).clone().requires_grad_()


def target(output):
    return output.logits[0, -1, 7]


@over_cases
def test_relevance_sums_to_the_logit(name):
    model = model_of(name)
    embeds = embedded(model)
    with Float64():
        plain = target(model(input_ids=IDS))
        with lxt.monkey_patch(model, "cp"):
            value = target(model(inputs_embeds=embeds))
    value.backward()
    assert torch.equal(value, plain)  # embeddings come scaled from the module
    assert float((embeds * embeds.grad).sum()) == pytest.approx(float(value), rel=1e-9)


@over_cases
@pytest.mark.parametrize("rules", ["attnlrp", "cp"])
def test_the_auditor_agrees(name, rules):
    model = model_of(name)
    embeds = embedded(model)
    with Float64():
        with lxt.monkey_patch(model, rules):
            target(model(inputs_embeds=embeds)).backward()
        expected = audit(model, {"inputs_embeds": embedded(model)}, target, rules, wrt="inputs_embeds")
    assert expected.unknown == ()
    found = (embeds * embeds.grad).detach()
    torch.testing.assert_close(found, expected.relevance["inputs_embeds"], rtol=0, atol=1e-9 * found.abs().max())


@pytest.mark.parametrize("kind", ROPES)
def test_the_scaling_acts(kind):
    scaled, plain = model_of(f"rope {kind}"), model_of("rope default")
    with torch.no_grad():
        assert not torch.allclose(target(scaled(IDS)), target(plain(IDS)), rtol=1e-3)


def test_the_softcap_acts():
    model, uncapped = model_of("softcaps"), model_of("softcaps")
    uncapped.config.final_logit_softcapping = None
    with torch.no_grad():
        assert target(model(IDS)).abs() < 2
        assert not torch.allclose(target(model(IDS)), target(uncapped(IDS)))


def test_tied_weights_are_one_constant():
    model = model_of("tied embeddings")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    out = lxt.load(model.float(), rules="cp").attribute(IDS, target=7)
    assert float(out.relevance.sum()) == pytest.approx(float(target(model(IDS))), rel=1e-5)
    assert model.lm_head.weight.grad is None
    assert model.lm_head.weight.requires_grad
