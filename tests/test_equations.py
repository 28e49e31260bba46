"""The reference agrees with itself: with numbers worked out by hand, with conservation, with transformers' logits."""

from __future__ import annotations

from types import SimpleNamespace

import equations
import numpy as np
import pytest
import torch
from equations import Float64, gpt2_relevance, llama_relevance
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lxt.composites import ATTN_LRP, CP_LRP, GRADIENT, Epsilon, Gamma

VALUE_ONLY = ATTN_LRP.but(attention="value_only")
LN3 = np.log(3.0)

ROPE = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


def randomised(model: torch.nn.Module, *, biases: bool, seed: int = 0) -> torch.nn.Module:
    # 0.3 instead of 0.02 so that attention is far from uniform; norm weights away from one so that losing one shows.
    generator = torch.Generator().manual_seed(seed)
    model.double().eval()
    for name, parameter in model.named_parameters():
        values = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        scale = name.endswith("weight") and ("norm" in name or "ln_" in name)
        zero = name.endswith("bias") and not biases
        parameter.data = torch.zeros_like(values) if zero else values + float(scale)
    model.tie_weights()
    return model


def llama(*, biases: bool = False, tied: bool = False, rope: str = "default", attention: str = "sdpa"):
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=24,
        intermediate_size=36,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        attention_bias=biases,
        mlp_bias=biases,
        tie_word_embeddings=tied,
        rope_parameters=dict(ROPE[rope]),
        attn_implementation=attention,
    )
    return randomised(LlamaForCausalLM(config), biases=biases)


def gpt2(*, biases: bool = False, positions: bool = False, by_layer: bool = False, attention: str = "sdpa"):
    config = GPT2Config(
        vocab_size=40,
        n_embd=24,
        n_layer=3,
        n_head=4,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=0,
        scale_attn_by_inverse_layer_idx=by_layer,
        attn_implementation=attention,
    )
    model = randomised(GPT2LMHeadModel(config), biases=biases)
    if not positions:
        model.transformer.wpe.weight.data.zero_()
    return model


def embeddings(model: torch.nn.Module, length: int = 9) -> torch.Tensor:
    ids = torch.randint(40, (length,), generator=torch.Generator().manual_seed(1))
    return model.get_input_embeddings()(ids).detach()


MODELS = {"llama": (llama, llama_relevance), "gpt2": (gpt2, gpt2_relevance)}


def explain(name: str, composite, *, position: int = -1, **options):
    build, relevance = MODELS[name]
    model = build(**options)
    return relevance(model.state_dict(), model.config, embeddings(model), position, 3, composite)


# Rules, against numbers that can be followed on paper


def test_linear_epsilon_by_hand():
    x, weight = np.array([1.0, 2.0]), np.array([[1.0, 1.0], [3.0, -1.0]])
    relevance = np.array([6.0, 5.0])
    # z = (3, 1): R_1 = 1 (1 * 6/3 + 3 * 5/1) = 17, R_2 = 2 (1 * 6/3 - 1 * 5/1) = -6
    np.testing.assert_allclose(equations.linear_epsilon_rule(x, weight, weight @ x, relevance), [17.0, -6.0])
    # a bias (1, 1) makes z = (4, 2) and keeps 1/4 and 1/2: R = 1 (1.5 + 7.5), 2 (1.5 - 2.5)
    np.testing.assert_allclose(equations.linear_epsilon_rule(x, weight, weight @ x + 1, relevance), [9.0, -2.0])
    # epsilon = 1 takes the sign of z = (3, -3): R_2 = 3 (1 * 8/4 - 1 * 8/-4) = 12
    x = np.array([0.0, 3.0])
    result = equations.linear_epsilon_rule(x, weight, weight @ x, np.array([8.0, 8.0]), epsilon=1.0)
    np.testing.assert_allclose(result, [0.0, 12.0])


def test_linear_gamma_by_hand():
    x, relevance = np.array([1.0, 2.0]), np.array([8.0])
    for sign in (1.0, -1.0):
        # contributions (3, -2) with the output's sign or against it: with gamma = 1 they weigh (6, -2), sum 4
        weight = sign * np.array([[3.0, -1.0]])
        result = equations.linear_gamma_rule(x, weight, None, weight @ x, relevance, gamma=1.0)
        np.testing.assert_allclose(result, [12.0, -4.0])
    # a bias of 2 has the output's sign: it weighs 4 of 8
    weight = np.array([[3.0, -1.0]])
    result = equations.linear_gamma_rule(x, weight, np.array([2.0]), weight @ x + 2, relevance, gamma=1.0)
    np.testing.assert_allclose(result, [6.0, -2.0])


def test_linear_gamma_is_the_four_layer_form():
    generator = np.random.default_rng(0)
    x, weight, bias = generator.normal(size=5), generator.normal(size=(7, 5)), generator.normal(size=7)
    relevance, gamma = generator.normal(size=7), 0.25
    z, expected = weight @ x + bias, np.zeros(5)

    def plus(a):
        return np.maximum(a, 0)

    def minus(a):
        return np.minimum(a, 0)

    for i in range(7):
        same, other = (plus, minus) if z[i] > 0 else (minus, plus)
        w = weight[i]
        parts = plus(x) * (w + gamma * same(w)) + minus(x) * (w + gamma * other(w))
        expected += parts / (parts.sum() + bias[i] + gamma * same(bias[i])) * relevance[i]
    result = equations.linear_gamma_rule(x, weight, bias, z, relevance, gamma=gamma)
    np.testing.assert_allclose(result, expected, rtol=1e-12)


def test_softmax_by_hand():
    # (ln 3, 0) -> (3/4, 1/4) with R = (1, 2): R_1 = ln 3 (1 - 3/4 * 3), R_2 = 0
    # (5, 5) -> (1/2, 1/2) with R = (4, 0): R_1 = 5 (4 - 1/2 * 4), R_2 = 5 (0 - 1/2 * 4)
    x = np.array([[LN3, 0.0], [5.0, 5.0]])
    relevance = np.array([[1.0, 2.0], [4.0, 0.0]])
    s = equations.softmax(x)
    np.testing.assert_allclose(s, [[0.75, 0.25], [0.5, 0.5]], rtol=1e-15)
    result = equations.softmax_rule(x, s, relevance)
    np.testing.assert_allclose(result, [[-1.25 * LN3, 0.0], [10.0, -10.0]], rtol=1e-14)


def test_softmax_at_a_temperature_by_hand():
    # softmax(2 ln 3, 0) = (9/10, 1/10), at temperature 2 (3/4, 1/4); R / s = (1, 3), of mean 3/2 under the latter
    x = np.array([2 * LN3, 0.0])
    result = equations.softmax_rule(x, equations.softmax(x), np.array([0.9, 0.3]), temperature=2.0)
    np.testing.assert_allclose(result, [2 * LN3 * 0.75 * (1 - 1.5), 0.0], rtol=1e-14)


def test_masked_scores_receive_nothing():
    x = np.array([[1.0, -np.inf], [1.0, 2.0]])
    for temperature in (1.0, 2.0):
        s = equations.softmax(x)
        result = equations.softmax_rule(x, s, np.array([[3.0, 0.0], [1.0, 1.0]]), temperature=temperature)
        assert np.isfinite(result).all()
        np.testing.assert_allclose(result[0], 0, atol=1e-15)


def test_matmul_is_equation_13_and_14_in_loops():
    generator = np.random.default_rng(0)
    a, v = generator.normal(size=(3, 4)), generator.normal(size=(4, 2))
    o, relevance = a @ v, generator.normal(size=(3, 2))
    expected_a, expected_v = np.zeros_like(a), np.zeros_like(v)
    for j in range(3):
        for i in range(4):
            for p in range(2):
                part = a[j, i] * v[i, p] / (2 * o[j, p]) * relevance[j, p]
                expected_a[j, i] += part
                expected_v[i, p] += part
    result_a, result_v = equations.matmul_rule(a, v, o, relevance)
    np.testing.assert_allclose(result_a, expected_a, rtol=1e-12)
    np.testing.assert_allclose(result_v, expected_v, rtol=1e-12)


def test_layer_norm_by_hand():
    # d = (-1, 1), sigma = 1: y = w d + b = (-2 + 1, 3 + 3) keeps of R = (1, 4) the shares 2 and 1/2: (2, 2) for d,
    # then R_1 = 1 (1/2 * 2/-1 - 1/2 * 2/1) = -2 and R_2 = 3 (-1/2 * 2/-1 + 1/2 * 2/1) = 6
    x, weight, bias = np.array([1.0, 3.0]), np.array([2.0, 3.0]), np.array([1.0, 3.0])
    normed = np.array([-1.0, 1.0])
    result = equations.layer_norm_rule(x, weight, bias, normed, weight * normed + bias, np.array([1.0, 4.0]))
    np.testing.assert_allclose(result, [-2.0, 6.0])


def test_relevance_at_an_exact_zero_is_an_error_and_zero_by_zero_is_zero():
    np.testing.assert_array_equal(equations.ratio(np.array([0.0, 6.0]), np.array([0.0, 3.0])), [0.0, 2.0])
    with pytest.raises(FloatingPointError, match="exactly 0"):
        equations.ratio(np.array([1.0]), np.array([0.0]))


def test_attention_is_gradient_times_input_where_no_rule_departs_from_it():
    # With every share 1, what is left of the attention's rules is the chain rule, grouped keys and masks included.
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, 5, 3, generator=generator, dtype=torch.float64).requires_grad_() for n in (4, 2, 2))
    keys, values = k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)
    output = torch.nn.functional.scaled_dot_product_attention(q, keys, values, is_causal=True)
    output[:, -1].sum().backward()
    flow = equations.Flow(ATTN_LRP.but(attention="gradient"))
    result, back = flow.attend(*(x.detach().numpy() for x in (q, k, v)), 3**-0.5)
    relevance = np.where(np.arange(5)[:, None] == 4, result, 0.0)
    for x, r in zip((q, k, v), back(relevance), strict=True):
        np.testing.assert_allclose(r, (x * x.grad).detach().numpy(), rtol=1e-10, atol=1e-13)


def test_coefficients_against_fifty_digits():
    mp = pytest.importorskip("mpmath")
    with mp.workdps(50):
        kappa = mp.mpf(44715) / 10**6
        true = {
            "silu": lambda x: 1 / (1 + mp.exp(-x)),
            "gelu": lambda x: mp.erfc(-x / mp.sqrt(2)) / 2,
            "gelu_tanh": lambda x: 1 / (1 + mp.exp(-2 * mp.sqrt(2 / mp.pi) * (x + kappa * x**3))),
            "quick_gelu": lambda x: 1 / (1 + mp.exp(-mp.mpf(1702) / 1000 * x)),
            "relu": lambda x: mp.mpf(x > 0),
            "relu2": lambda x: max(x, mp.mpf(0)),
            "tanh": lambda x: mp.tanh(x) / x if x else mp.mpf(1),
            "mish": lambda x: mp.tanh(mp.log1p(mp.exp(x))),
        }
        assert set(true) == set(equations.COEFFICIENTS)
        magnitudes = np.concatenate([np.geomspace(1e-45, 100, 400), np.linspace(0.1, 15, 200)])
        x = np.concatenate([magnitudes, -magnitudes, [0.0, -0.0, 2.0**-1074]])
        for name, f in true.items():
            expected = np.array([float(f(mp.mpf(float(number)))) for number in x])
            # 4 ulp where long double is wider than double, for the C library's erfc and the last rounding; atol is
            # far below any 16-bit subnormal.
            result = equations.COEFFICIENTS[name](x)
            rtol = 1e-15 if np.finfo(np.longdouble).eps < np.finfo(np.float64).eps else 1e-12
            np.testing.assert_allclose(result, expected, rtol=rtol, atol=1e-300, err_msg=name)


def test_coefficients_are_finite_for_every_bfloat16():
    bits = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).double()
    x = bits[bits.isfinite()].numpy()
    for name, coefficient in equations.COEFFICIENTS.items():
        assert np.isfinite(coefficient(x)).all(), name
    assert equations.coefficient_silu(x.min()) == 0
    assert equations.coefficient_silu(x.max()) == 1


# Whole models


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("llama", {"biases": True, "tied": True}),
        ("llama", {"rope": "linear"}),
        ("llama", {"rope": "llama3"}),
        ("gpt2", {"positions": True}),
        ("gpt2", {"biases": True, "positions": True, "by_layer": True}),
    ],
)
def test_forward_is_transformers(name, options, attention):
    build, relevance = MODELS[name]
    model = build(**options, attention=attention)
    embeds = embeddings(model)
    with torch.no_grad(), Float64():
        expected = model(inputs_embeds=embeds[None], use_cache=False).logits[0].numpy()
    result = relevance(model.state_dict(), model.config, embeds, 4, 7, CP_LRP)
    # Sums of at most 40 float64 terms through 3 layers; measured 3e-15.
    np.testing.assert_allclose(result.logits, expected, rtol=0, atol=1e-12 * abs(expected).max())
    assert result.logit == result.logits[4, 7]


@pytest.mark.parametrize("composite", [CP_LRP, VALUE_ONLY, VALUE_ONLY.but(linear=Gamma(0.25))], ids=lambda c: c.name)
@pytest.mark.parametrize("name", MODELS)
def test_conserves_with_a_constant_softmax(name, composite):
    result = explain(name, composite)
    np.testing.assert_allclose(result.input.sum(), result.logit, rtol=1e-10)
    np.testing.assert_allclose(result.residual.sum(-1), np.full(4, result.logit), rtol=1e-10)
    assert (abs(result.input) > 0).all()


@pytest.mark.parametrize("name", MODELS)
def test_attnlrp_conserves_except_in_the_softmax(name):
    result = explain(name, ATTN_LRP)
    np.testing.assert_allclose(result.input.sum() + result.leaks.pop("softmax"), result.logit, rtol=1e-10)
    assert abs(result.input.sum() - result.logit) > 1e-3, "the softmax leaked nothing: this model proves nothing"
    assert max(map(abs, result.leaks.values())) < 1e-12


@pytest.mark.parametrize("composite", [ATTN_LRP, CP_LRP, VALUE_ONLY.but(linear=Epsilon(0.1))], ids=lambda c: c.name)
@pytest.mark.parametrize(("name", "options"), [("llama", {}), ("gpt2", {"positions": True})])
def test_what_does_not_reach_the_input_is_in_the_leaks(name, options, composite):
    result = explain(name, composite, biases=True, **options)
    np.testing.assert_allclose(result.input.sum() + sum(result.leaks.values()), result.logit, rtol=1e-10)
    assert abs(result.leaks["linear"]) > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_the_future_is_irrelevant(name):
    result = explain(name, ATTN_LRP, position=4)
    assert (result.input[5:] == 0).all()
    assert (result.input[:5] != 0).all()


@pytest.mark.parametrize("name", MODELS)
def test_latents_have_the_documented_shapes(name):
    result = explain(name, ATTN_LRP)
    d_mlp = {"llama": 36, "gpt2": 96}[name]
    shapes = (result.input.shape, result.residual.shape, result.heads.shape, result.neurons.shape)
    assert shapes == ((9, 24), (4, 9), (3, 9, 4), (3, 9, d_mlp))
    np.testing.assert_allclose(result.residual[0], result.input.sum(-1), rtol=1e-12)


def test_composites_differ_where_they_should():
    by_rule = {
        "attnlrp": explain("llama", ATTN_LRP).input,
        "cp": explain("llama", CP_LRP).input,
        "value_only": explain("llama", VALUE_ONLY).input,
        "temperature": explain("llama", ATTN_LRP.but(softmax_temperature=2.0)).input,
        "factors": explain("llama", ATTN_LRP.but(qkv=(0.5, 0.5, 1.0))).input,
        "gamma": explain("llama", ATTN_LRP.but(linear=Gamma(0.25))).input,
    }
    names = list(by_rule)
    for i, first in enumerate(names):
        for second in names[:i]:
            difference = abs(by_rule[first] - by_rule[second]).max() / abs(by_rule[second]).max()
            assert difference > 1e-2, (first, second)


def test_a_stopped_gate_is_the_branch_with_the_activation():
    # No attention, gate reading only the lower half of the stream, up only the upper half: if the gate is stopped, the
    # lower half keeps what the skip connection brings it, which the head, the norm and the sum give in closed form.
    model = llama(tied=False)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
    for layer in model.model.layers[1:]:
        layer.mlp.down_proj.weight.data.zero_()
    mlp = model.model.layers[0].mlp
    mlp.gate_proj.weight.data[:, 12:] = 0
    mlp.up_proj.weight.data[:, :12] = 0
    embeds = embeddings(model, 1)
    with torch.no_grad(), Float64():
        final = model.model.layers[0](
            embeds[None], position_embeddings=model.model.rotary_emb(embeds, torch.zeros(1, 1))
        )
        rms = (final.pow(2).mean() + model.config.rms_norm_eps).sqrt()
        skip = (embeds[0] * model.model.norm.weight * model.lm_head.weight[3] / rms).numpy()
    for composite, stopped in ((CP_LRP, True), (ATTN_LRP, False)):
        result = llama_relevance(model.state_dict(), model.config, embeds, 0, 3, composite).input[0]
        changed = abs(result - skip) > 1e-10 * abs(skip)
        assert changed[:12].any() != stopped
        assert changed[12:].all()


def test_value_only_is_uniform_without_query_and_key():
    stopped = explain("gpt2", ATTN_LRP.but(qkv=(0.0, 0.0, 1.0)), biases=True)
    np.testing.assert_allclose(stopped.input, explain("gpt2", VALUE_ONLY, biases=True).input, rtol=1e-12)


def test_float64_mode_changes_nothing_in_float32():
    model = llama(attention="eager").float()
    embeds = embeddings(model)[None]
    with torch.no_grad():
        plain = model(inputs_embeds=embeds, use_cache=False).logits
        with Float64():
            assert torch.equal(model(inputs_embeds=embeds, use_cache=False).logits, plain)


def test_what_the_reference_does_not_know_is_an_error():
    with pytest.raises(ValueError, match="identity"):
        explain("llama", GRADIENT)
    with pytest.raises(ValueError, match="softplus"):
        equations.activation("softplus", np.zeros(1))
    with pytest.raises(ValueError, match="batch axis"):
        llama_relevance({}, SimpleNamespace(), torch.zeros(1, 2, 3), -1, 0, ATTN_LRP)
    model = llama()
    model.config.rope_parameters = {"rope_type": "yarn", "rope_theta": 1e4}
    with pytest.raises(ValueError, match="yarn"):
        llama_relevance(model.state_dict(), model.config, embeddings(model), -1, 0, ATTN_LRP)
