"""Why a head looked where it looked: one attention score against the equations, its sums, its views and its errors."""

import runpy
import warnings
from pathlib import Path

import equations
import numpy as np
import pytest
import torch
from equations import Float64, Flow
from equations_rules import identity_rule, linear_epsilon_rule
from models import DECODERS, build, checkpointed
from relevances import state
from rich.console import Console
from small import LAYERS, PROMPTS, bert, gpt2, llama, t5
from transformers import BertForSequenceClassification

import lxt
from lxt.attributor import Attributor
from lxt.composites import ATTN_LRP, CP_LRP, GRADIENT
from lxt.show import scores

IDS = PROMPTS[2]
ROUNDING = 1e-9  # float64 through two layers, where relevance cancels


def by_hand(model, layer, head, query, of, composite):
    """[token] and [layer, token, head] through the query, and the same through the keys, of a sum `of` scores."""
    config, weights, flow = model.config, equations._arrays(model.state_dict()), Flow(composite)
    h = equations._float64(model.get_input_embeddings()(torch.tensor(IDS)))
    n_heads, n_kv = config.num_attention_heads, config.num_key_value_heads
    d_head = config.hidden_size // n_heads
    rotation, backs = equations._rotation(config, len(h), d_head), []
    for number in range(layer):
        part = f"model.layers.{number}."
        h, back = equations._llama_layer(flow, lambda name, part=part: weights.get(part + name), config, h, rotation)
        backs.append(back)
    part = f"model.layers.{layer}."
    normed = weights[f"{part}input_layernorm.weight"] * h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-6)
    (q, q_back), (k, k_back) = (
        flow.linear(normed, weights[f"{part}self_attn.{x}_proj.weight"], weights.get(f"{part}self_attn.{x}_proj.bias"))
        for x in "qk"
    )
    q, k = equations._split_heads(q, n_heads), equations._split_heads(k, n_kv)
    turned_q, turned_k = ((rotation @ x[..., None])[..., 0] for x in (q, k))
    r_q, r_k, group = np.zeros_like(q), np.zeros_like(k), head * n_kv // n_heads
    products = turned_q[head, query] * turned_k[group] * d_head**-0.5 * np.asarray(of)[:, None]  # [key, d_head]
    r_q[head, query], r_k[group] = products.sum(0) / 2, products / 2
    found = []
    for x, z, r, back in ((q, turned_q, r_q, q_back), (k, turned_k, r_k, k_back)):
        relevance = identity_rule(back(equations._merge_heads(linear_epsilon_rule(x, rotation, z, r))))
        heads = []
        for below in reversed(backs):
            relevance, in_heads, _ = below(relevance)
            heads.append(in_heads)
        found += [torch.tensor(relevance.sum(-1)), torch.tensor(np.stack(heads[::-1])) if heads else None]
    return products.sum(), *found


def assert_same(got, expected, tolerance=ROUNDING):
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()
    assert expected.abs().max() > 0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rules", [ATTN_LRP, CP_LRP], ids=lambda rules: rules.name)
@pytest.mark.parametrize("contrast", [None, "mean", 1])
def test_a_score_is_explained_as_the_equations_say(rules, contrast, attention):
    model = llama(attention_bias=True).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
    model.set_attn_implementation(attention)
    for layer, head, query, key in ((2, 3, 6, 2), (1, 0, 4, 4), (0, 1, 5, 3)):
        of = np.zeros(len(IDS))
        of[key] = 1
        if contrast == "mean":
            of[: query + 1] -= 1 / (query + 1)
        elif contrast is not None:
            of[contrast] -= 1
        with Float64():
            value, in_query, query_heads, in_key, key_heads = by_hand(model, layer, head, query, of, rules)
            found = Attributor(model, rules=rules).attribute_attention(IDS, layer, head, query, key, contrast)
        assert found.value == pytest.approx(value, rel=ROUNDING)
        assert_same(found.query, in_query)
        assert_same(found.key, in_key)
        if layer:
            assert_same(found.query_heads, query_heads)
            assert_same(found.key_heads, key_heads)
        assert (found.layer, found.head, found.query_position, found.key_position) == (layer, head, query, key)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", DECODERS)
def test_both_sides_sum_to_the_score_half_and_half(name, attention):
    model = build(name, attention, zero_biases=True)
    explainer = Attributor(model, rules="cp")
    with Float64():
        found = explainer.attribute_attention([1, 9, 7, 3, 8, 6, 5], 1, 2, contrast=None)
        weights = _weights(model, [1, 9, 7, 3, 8, 6, 5], 1, 2)
    assert found.score == found.value
    assert found.total == pytest.approx(found.value, rel=1e-6)
    assert found.query.sum().item() == pytest.approx(found.value / 2, rel=1e-6)
    torch.testing.assert_close(found.weights, weights, rtol=1e-6, atol=1e-9)
    assert found.key_position == int(weights.argmax())


def _weights(model, ids, layer, head):
    """The last query's attention weights, from transformers' own eager attention."""
    was = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weights = model(torch.tensor([ids]), output_attentions=True).attentions[layer][0, head, -1]
    model.set_attn_implementation(was)
    return weights.double()


def test_what_is_added_to_all_keys_is_seen_without_a_contrast_only():
    model = llama(attention_bias=True).double()
    explainer, before = Attributor(model, rules="cp"), {}
    for contrast in (None, "mean", 2):
        before[contrast] = explainer.attribute_attention(IDS, 0, 0, key=3, contrast=contrast)
    with torch.no_grad():  # of layer 0, whose first pair of dimensions turns; the others hardly do
        model.model.layers[0].self_attn.k_proj.bias[:8] = 0.0
        model.model.layers[0].self_attn.k_proj.bias[7] = 50.0
        model.model.rotary_emb.inv_freq.zero_()
    after = {c: explainer.attribute_attention(IDS, 0, 0, key=3, contrast=c) for c in before}
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.bias[7] = 0.0
    without = {c: explainer.attribute_attention(IDS, 0, 0, key=3, contrast=c) for c in before}
    assert abs(after[None].score - without[None].score) > 1
    for contrast in ("mean", 2):
        assert after[contrast].value == pytest.approx(without[contrast].value, abs=1e-6)
        torch.testing.assert_close(after[contrast].weights, without[contrast].weights, rtol=1e-6, atol=1e-9)


def test_the_gradient_counts_the_score_twice_at_the_layer():
    model = llama().double()
    with Float64():
        found = Attributor(model, rules=GRADIENT.but(norm="identity")).attribute_attention(
            IDS, 0, 1, key=2, contrast=None
        )
    assert found.total == pytest.approx(2 * found.score, rel=1e-6)


@pytest.mark.parametrize("make", [lambda: bert(BertForSequenceClassification), t5, gpt2])
def test_encoders_and_learned_positions(make):
    found = {}
    for attention in ("sdpa", "eager"):
        model = make()
        model.set_attn_implementation(attention)
        found[attention] = Attributor(model).attribute_attention(IDS, 1, 0, query=2)
    one, other = found.values()
    assert_same(one.query, other.query, 1e-4)
    assert_same(one.key, other.key, 1e-4)
    assert one.weights.sum().item() == pytest.approx(1, rel=1e-5)
    assert (one.weights[3:] > 0).all() == (make is not gpt2)


def test_the_forward_ends_at_the_layer_and_leaves_the_model():
    model, ran = checkpointed(llama()), []
    model.train()
    handles = [part.register_forward_hook(lambda *_, n=n: ran.append(n)) for n, part in enumerate(model.model.layers)]
    before = state(model)
    found = Attributor(model).attribute_attention(IDS, 1, 0)
    assert ran == [0]
    assert state(model) == before
    for handle in handles:
        handle.remove()
    model.eval()
    plain = Attributor(llama()).attribute_attention(IDS, 1, 0)
    assert torch.equal(found.query, plain.query)
    assert model(torch.tensor([IDS])).logits.shape == (1, len(IDS), 300)


def test_rankings():
    found = Attributor(llama()).attribute_attention(IDS, 2, 1, query=5, key=1)
    tokens, heads = found.top(100), found.top(3, heads=True)
    assert len(tokens) == 2 * len(IDS)
    assert [abs(entry.relevance) for entry in tokens] == sorted((abs(e.relevance) for e in tokens), reverse=True)
    best = tokens[0]
    assert best.relevance == pytest.approx(float(getattr(found, best.side)[best.position]))
    assert best.token == found.tokens[best.position]
    assert best.head is None
    layer, head = (int(part) for part in heads[0].head[1:].split("H"))
    known = found.query_heads if heads[0].side == "query" else found.key_heads
    assert heads[0].relevance == pytest.approx(float(known[layer, heads[0].position, head]))
    assert {entry.side for entry in found.top(50, side="key")} == {"key"}
    assert Attributor(llama()).attribute_attention(IDS, 0, 1).top(3, heads=True) == []
    with pytest.raises(ValueError, match="unknown side 'value'"):
        found.top(side="value")
    with pytest.raises(ValueError, match="k must be a whole number >= 1"):
        found.top(0)
    unknown = Attributor(llama(), patch_map=lxt.PatchMap()).attribute_attention(IDS, 1, 1)
    if unknown.query_heads is None:
        with pytest.raises(ValueError, match="isn't known where the heads"):
            unknown.top(heads=True)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"layer": LAYERS, "head": 0}, "layer 3 is out of range; there are 3, 0 to 2"),
        ({"layer": 0, "head": 4}, "head 4 is out of range; there are 4, 0 to 3"),
        ({"layer": 0, "head": 0, "query": 7}, "query 7 is out of range; there are 7"),
        ({"layer": 0, "head": 0, "key": -8}, "key -8 is out of range"),
        ({"layer": 0, "head": 0, "query": 2, "key": 5}, r"the query 2 \('12'\) does not see the key 5.*: 0 to 2"),
        ({"layer": 0, "head": 0, "query": 2, "contrast": 4}, "does not see the contrast 4"),
        ({"layer": 0, "head": 0, "query": 0}, "sees one key alone"),
        ({"layer": 0, "head": 0, "key": 1, "contrast": 1}, "is the explained key itself"),
        ({"layer": 0, "head": 0, "contrast": "median"}, "unknown contrast 'median'; allowed: 'mean'"),
    ],
)
def test_what_is_not_there_is_named(asked, message):
    for attention in ("sdpa", "eager"):
        model = llama()
        model.set_attn_implementation(attention)
        with pytest.raises(ValueError, match=message):
            Attributor(model).attribute_attention(IDS, **asked)


def test_other_mistakes():
    explainer = Attributor(llama())
    with pytest.raises(ValueError, match="one prompt at a time, got 3"):
        explainer.attribute_attention(PROMPTS, 0, 0)
    with pytest.raises(TypeError, match=r"layer must be a whole number, got 1\.5"):
        explainer.attribute_attention(IDS, 1.5, 0)
    with pytest.raises(TypeError, match="head must be a whole number, got True"):
        explainer.attribute_attention(IDS, 0, True)
    with pytest.raises(ValueError, match="does not see the key 5"):
        Attributor(build("mistral", dtype=torch.float32)).attribute_attention(IDS, 1, 0, key=5, query=0)
    windowed = Attributor(build("mistral", dtype=torch.float32)).attribute_attention(IDS, 1, 0)
    assert (windowed.weights > 0).tolist() == [False] * 3 + [True] * 4
    recurrent = Attributor(_hybrid())
    with pytest.raises(ValueError, match=r"layer 0 \(\w+\) computes no scores q k\^T"):
        recurrent.attribute_attention(IDS, 0, 0)


def test_what_has_no_rule_is_refused_below_the_layer():
    class Foreign(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, c):
            return c

    model = llama()
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: Foreign.apply(output))
    explainer = Attributor(model)
    explainer.attribute_attention(IDS, 0, 0)
    with pytest.raises(lxt.UnknownOperation, match="no rule for 'Foreign'"):
        explainer.attribute_attention(IDS, 1, 0)


def _hybrid():
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    torch.manual_seed(0)
    config = Qwen3NextConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, linear_num_value_heads=2, linear_num_key_heads=1, linear_key_head_dim=8,
        linear_value_head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8,
        shared_expert_intermediate_size=8, layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    return Qwen3NextForCausalLM(config).eval()


def test_the_bundled_models_induction_head_is_explained_by_what_induction_needs():
    explainer = lxt.load("tiny")
    found = explainer.attribute_attention(" river bag cold lamp river bag", layer=1, head=2)
    assert found.tokens[found.key_position] == " cold"
    key, query = found.top(1, side="key")[0], found.top(1, side="query")[0]
    assert (key.position, key.token) == (2, " bag")  # the token before, which the key knows from an earlier head
    assert (query.position, query.token) == (6, " bag")
    earlier = found.top(1, heads=True, side="key")[0]
    assert (earlier.position, earlier.token) == (3, " cold")
    looks = explainer.attribute_attention(" river bag cold lamp river bag", 0, int(earlier.head[3:]), query=3)
    assert looks.key_position == 2


def test_views(tmp_path):
    found = lxt.load("tiny").attribute_attention("I have 5 cats and 3 dogs. My cats love to play with my", 1, 0)
    assert repr(found).startswith("AttentionRelevance(L1H0: ' my' → ' dogs' − mean of keys, ")
    console = Console(width=100, record=True, file=open(tmp_path / "out", "w", encoding="utf-8"))
    scores.render(found, console)
    text = console.export_text()
    assert "Why does L1H0 at ' my' (15) look at ' dogs' (7)?" in text
    assert "␣3 (6)" in text
    assert "L0H0  ␣dogs (7)" in text
    figure = found.plot(tmp_path / "score.png")
    assert (tmp_path / "score.png").stat().st_size > 10_000
    assert [part.get_text() for part in figure.axes[1].get_xticklabels()][:2] == ["<bos>", "I"]
    assert len(found.plot(special=False).axes[1].get_xticklabels()) == len(found.tokens) - 1
    ends = found.plot().axes[0].patches
    assert sum(bar.get_height() for bar in ends) == pytest.approx(found.total, rel=1e-4)
    console = Console(width=60, no_color=True, record=True, file=open(tmp_path / "out", "w", encoding="utf-8"))
    scores.render(found, console, special=False)
    assert "<bos>" not in console.export_text()


def test_the_example_follows_the_induction_head(tmp_path, capsys):
    path = Path(__file__).resolve().parent.parent / "examples" / "why_a_head_looked.py"
    example = runpy.run_path(str(path))
    example["main"](tmp_path)
    assert "L1H2 finds ' cold' since L0H0 wrote there what stood before: it looked at ' bag'" in capsys.readouterr().out
    assert (tmp_path / "score.png").exists()
