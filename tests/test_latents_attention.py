"""Queries, keys, values, attention weights and flow: against the equations, by their sums, and what can't be read."""

import equations
import numpy as np
import pytest
import torch
from equations import Float64, gpt2_relevance, llama_relevance
from equations_rules import matmul_rule
from models import DECODERS, build, checkpointed
from relevances import state
from small import LAYERS, PROMPTS, bert, gpt2, llama, t5
from torch import nn
from torch.nn import functional as F
from transformers import BertForSequenceClassification

import lxt
from lxt.attributor import Attributor
from lxt.composites import ATTN_LRP, CP_LRP, GRADIENT
from lxt.inputs import prepare, read
from lxt.latents import Keep, Site, capture

KINDS = ("query", "key", "value", "pattern", "flow")
IDS = PROMPTS[2]
ROUNDING = 1e-9  # float64 through three layers, where relevance cancels


class Recording(equations.Flow):
    """The reference, which also keeps what enters attention: layers come from the last to the first."""

    kept: list[dict]

    def attend(self, q, k, v, scale):
        output, back = super().attend(q, k, v, scale)
        group = len(q) // len(k)
        keys, values = (np.repeat(x, group, axis=0) for x in (k, v))
        scores = np.where(np.triu(np.ones((len(q[0]),) * 2), 1) > 0, -np.inf, q @ keys.swapaxes(-1, -2) * scale)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        (share, _), _ = equations.attention_shares(self.composite)

        def recorded(relevance):
            flow, _ = matmul_rule(weights, values, output, relevance, (1.0, 1.0))
            r_q, r_k, r_v = back(relevance)
            sides = {"query": r_q, "key": r_k, "value": r_v}
            Recording.kept.append(
                {name: r.sum(-1).T for name, r in sides.items()} | {"flow": flow, "pattern": share * flow}
            )
            return r_q, r_k, r_v

        return output, recorded


def by_equations(monkeypatch, model, composite):
    monkeypatch.setattr(equations, "Flow", Recording)
    Recording.kept = []
    reference = gpt2_relevance if model.config.model_type == "gpt2" else llama_relevance
    embeds = model.get_input_embeddings()(torch.tensor(IDS))
    with Float64():
        reference(model.state_dict(), model.config, embeds, len(IDS) - 1, 42, composite)
    return {name: torch.tensor(np.stack([one[name] for one in Recording.kept[::-1]])) for name in KINDS}


def explained(model, rules="attnlrp", latents=KINDS, ids=IDS, **options):
    with Float64():
        return Attributor(model, rules=rules, **options).attribute(ids, target=42, latents=latents).latents


def assert_same(got, expected, tolerance=ROUNDING):
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance * max(expected.abs().max(), 1e-3)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "rules",
    [ATTN_LRP, CP_LRP, ATTN_LRP.but(qkv=(0.5, 0.5, 1.0)), ATTN_LRP.but(softmax_temperature=2.0)],
    ids=["attnlrp", "cp", "whole", "temperature"],
)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_what_enters_attention_is_what_the_equations_say(monkeypatch, make, rules, attention):
    model = make().double()
    model.set_attn_implementation(attention)
    expected = by_equations(monkeypatch, model, rules)
    latents = explained(model, rules)
    for name in KINDS:
        assert_same(latents[name].tensor[:, 0], expected[name])
        assert expected[name].abs().max() > 0 or (rules is CP_LRP and name in ("query", "key", "pattern"))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", DECODERS)
def test_flow_adds_up_to_heads_and_to_values(name, attention):
    model = build(name, attention)
    for rules, times in (("attnlrp", 2), ("cp", 1), (GRADIENT, 1)):
        latents = explained(model, rules, ("head", *KINDS), [1, 9, 7, 3, 8, 6, 5])
        flow, value = latents["flow"].tensor, latents["value"].tensor
        assert_same(flow.sum(-1).transpose(2, 3), latents["head"].tensor)
        carried = flow.sum(-2).transpose(2, 3).unflatten(-1, (value.shape[-1], -1)).sum(-1)
        assert_same(carried, times * value)
        share = {"attnlrp": 0.5, "cp": 0.0}.get(rules, 1.0)
        assert_same(latents["pattern"].tensor, share * flow)
        assert (flow.triu(1) == 0).all()
    if name == "mistral":
        assert (flow.tril(-4) == 0).all()  # its window


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rotation_and_norms_of_queries_keep_the_relevance_of_heads(attention):
    model = build("qwen3", attention)  # normalises each head's queries and keys before it turns them
    parts = [layer.self_attn for layer in model.model.layers]
    heads = {"query": [(part.q_proj, 4) for part in parts], "key": [(part.k_proj, 2) for part in parts]}
    for name, places in heads.items():
        sites = [Site("head", number, place, "output", count) for number, (place, count) in enumerate(places)]
        with capture(sites, 1, len(IDS)) as sink:
            found = explained(model, latents=name)[name].tensor[:, 0]
            before = torch.cat([sink.values["head", number][0] for number in range(len(parts))])
        assert_same(before, found)


def test_padding_changes_nothing():
    for attention in ("sdpa", "eager"):
        model = llama()
        model.set_attn_implementation(attention)
        explainer = Attributor(model)
        batch = explainer.attribute(PROMPTS, target=42, latents=KINDS).latents
        for row, prompt in enumerate(PROMPTS):
            alone = explainer.attribute(prompt, target=42, latents=KINDS).latents
            for name in KINDS:
                left = batch[name].values.shape[3 if name in ("pattern", "flow") else 2] - len(prompt)
                whole = batch[name].tensor[:, row]
                if name in ("pattern", "flow"):
                    assert (whole[..., :left, :] == 0).all()
                    assert (whole[..., :left] == 0).all()
                    own = whole[..., left:, left:]
                else:
                    assert (whole[:, :left] == 0).all()
                    own = whole[:, left:]
                assert_same(own, alone[name].tensor[:, 0], 1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_checkpoints_give_the_same(make, attention):
    model = make()
    model.set_attn_implementation(attention)
    expected = explained(model)
    for how in ("layer", "nested"):
        latents = explained(model, checkpoint=how)
        assert all(torch.equal(latents[name].tensor, expected[name].tensor) for name in KINDS)
    checkpointed(model).train()
    latents = explained(model)
    assert all(torch.equal(latents[name].tensor, expected[name].tensor) for name in KINDS)


def test_each_of_several_targets_has_its_own():
    for attention in ("sdpa", "eager"):
        model = llama()
        model.set_attn_implementation(attention)
        explainer = Attributor(model)
        both = explainer.attribute_targets(IDS, [42, 43], latents=KINDS).latents
        for row, target in enumerate((42, 43)):
            one = explainer.attribute(IDS, target=target, latents=KINDS).latents
            for name in KINDS:
                assert_same(both[name].tensor[:, row], one[name].tensor[:, 0], 1e-5)


@pytest.mark.parametrize("rules", ["attnlrp", "cp"])
def test_taps_leave_the_model_and_its_relevance_alone(rules):
    model = llama()
    before = state(model)
    explainer = Attributor(model, rules=rules)
    plain, tapped = explainer.attribute(IDS, latents="head"), explainer.attribute(IDS, latents=("head", *KINDS))
    assert torch.equal(plain.relevance, tapped.relevance)
    assert torch.equal(plain.latents["head"].tensor, tapped.latents["head"].tensor)
    assert state(model) == before


def test_the_largest_and_some_layers_only():
    explainer = Attributor(llama())
    whole = explainer.attribute(IDS, latents=KINDS).latents
    some = explainer.attribute(IDS, latents=(Keep("flow", top=2, layers=(1,)), Keep("query", top=1), "key")).latents
    dense, flow = whole["flow"].tensor[1:2], some["flow"]
    assert flow.layers == (1,)
    assert torch.equal(flow.values, dense.gather(-1, flow.indices.long()))
    torch.testing.assert_close(flow.values.sum(-1) + flow.rest, dense.sum(-1))
    assert torch.equal(some["query"].values[..., 0].abs(), whole["query"].tensor.abs().amax(-1))
    assert torch.equal(some["key"].tensor, whole["key"].tensor)


def test_encoders_and_the_encoder_of_both():
    for model in (bert(BertForSequenceClassification), t5()):
        for attention in ("sdpa", "eager"):
            try:
                model.set_attn_implementation(attention)
            except ValueError:
                continue
            explainer = Attributor(model)
            latents = explainer.attribute(IDS, latents=KINDS).latents
            flow = latents["flow"].tensor
            assert flow.shape == (LAYERS, 1, 4, len(IDS), len(IDS))
            assert (flow.triu(1) != 0).any()
            assert_same(flow.sum(-2).transpose(2, 3), 2 * latents["value"].tensor, 1e-5)


class Written(nn.Module):
    """Attention as somebody may write it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.inner = how, nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
        self.whole = nn.MultiheadAttention(12, 3, batch_first=True)
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how.startswith("torch"):
            return self.whole(x, x, x, need_weights=self.how == "torch, written out")[0]
        q, k, v = F.linear(x, self.whole.in_proj_weight, self.whole.in_proj_bias).unflatten(-1, (3, 3, 4)).unbind(2)
        if self.how == "einsum":
            weights = torch.einsum("bqhd,bkhd->bhqk", q / 2, k).softmax(-1)
            mixed = torch.einsum("bhqk,bkhd->bqhd", weights, v)
        elif self.how == "a sum of products":
            scores = [
                torch.einsum("bqhd,bkhd->bhqk", *part) for part in zip(q.split(1, -1), k.split(1, -1), strict=True)
            ]
            mixed = torch.einsum("bhqk,bkhd->bqhd", (sum(scores) / 2).softmax(-1), v)
        elif self.how == "einsum, turned":
            weights = torch.einsum("bkhd,bqhd->bhqk", k, q / 2).softmax(-1)
            mixed = torch.einsum("bkhd,bhqk->bqhd", v, weights)
        else:
            q, k, v = (part.transpose(1, 2).reshape(-1, *part.shape[1::2]) for part in (q, k, v))  # batch * head
            scores = torch.baddbmm(torch.zeros(1, 1, 1, dtype=x.dtype), q, k.transpose(1, 2), beta=0, alpha=0.5)
            mixed = torch.bmm(torch.softmax(scores, 2), v).unflatten(0, (-1, 3)).transpose(1, 2)
        return self.whole.out_proj(mixed.flatten(2))


WAYS = ("torch", "torch, written out", "einsum", "einsum, turned", "a sum of products", "baddbmm")


def test_attention_is_seen_however_it_is_written():
    x = torch.randn(2, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = {}
    for how in WAYS:
        layer = Written(how).double()
        with capture([Site(name, 0, layer, "attention") for name in KINDS], 2, 5) as sink:
            output = layer(x.clone().requires_grad_())
            output.square().sum().backward()
            found[how] = {name: sink.stacked(name, torch.ones(2, 5, dtype=torch.bool)).tensor for name in KINDS}
    for how in WAYS[1:]:
        for name in KINDS:
            assert_same(found[how][name], found["torch"][name])


def test_a_query_that_sees_nothing_carries_nothing():
    class Masked(Written):
        def forward(self, x):
            seen = torch.ones(3, 3, dtype=torch.bool).tril(-1)
            return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], seen)[:, 0]

    with capture([Site("flow", 0, layer := Masked(""), "attention")], 1, 3) as sink:
        layer(torch.randn(1, 3, 12, requires_grad=True)).sum().backward()
    flow = sink.stacked("flow", torch.ones(1, 3, dtype=torch.bool)).tensor
    assert (flow[..., 0, :] == 0).all()
    assert (flow[..., 1, 0] != 0).all()


@pytest.mark.parametrize("rules", ["attnlrp", "cp"])
def test_marks_survive_the_taps(rules):
    class Shifted(Written):
        def forward(self, x):
            q, k = F.elu(x) + 1, x * 2  # q is a gate: 1 at x = 0
            return torch.matmul(torch.matmul(q, k.transpose(1, 2)).softmax(-1), x)

    layer, found = Shifted(""), []
    for sites in ([], [Site(name, 0, layer, "attention") for name in KINDS]):
        x = torch.randn(1, 4, 12, generator=torch.Generator().manual_seed(0)).requires_grad_()
        model = nn.Sequential(layer)  # the rules are in force before the layer is called
        with capture(sites, 1, 4), lxt.monkey_patch(model, rules):
            model(x).sum().backward()
        found.append(x.grad)
    assert torch.equal(*found)


def test_what_has_no_attention_weights_says_so():
    layer, x = nn.Sequential(nn.Sequential(nn.Linear(12, 12))), torch.randn(1, 3, 12, requires_grad=True)
    with (
        pytest.raises(ValueError, match=r"'flow' is not known for layer 0 \(Sequential\): no softmax of scores"),
        capture([Site("flow", 0, layer, "attention")], 1, 3),
    ):
        layer(x)
    attends = nn.Sequential(Written("einsum"), layer)
    with (
        pytest.raises(ValueError, match=r"name those that have: lxt.Keep\('flow', layers=\(0,\)\)"),
        capture([Site("flow", 0, attends[0], "attention"), Site("flow", 1, layer, "attention")], 1, 3),
    ):
        attends(torch.randn(1, 3, 12, requires_grad=True))


def test_two_attentions_in_a_layer_are_refused():
    class Twice(Written):
        def forward(self, x):
            return super().forward(super().forward(x))

    layer = Twice("einsum")
    with (
        pytest.raises(ValueError, match=r"layer 3 \(Twice\) attends more than once"),
        capture([Site("flow", 3, layer, "attention")], 1, 3),
    ):
        layer(torch.randn(1, 3, 12, requires_grad=True))


def test_attention_between_other_things_than_tokens_does_not_count():
    class Deep(Written):
        def forward(self, x):
            earlier = torch.stack((x, 2 * x), 2)  # [batch, token, depth, hidden]
            mixed = F.scaled_dot_product_attention(x.unsqueeze(2), earlier, earlier).squeeze(2)
            weights = torch.matmul(mixed.unsqueeze(2), earlier.transpose(2, 3)).softmax(-1)
            return super().forward(torch.matmul(weights, earlier).squeeze(2))

    found = []
    for layer in (Deep("torch").double(), Deep("einsum").double()):
        x = torch.randn(1, 3, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
        with capture([Site(name, 0, layer, "attention") for name in KINDS], 1, 3) as sink:
            layer(x).square().sum().backward()
        found.append({name: sink.stacked(name, torch.ones(1, 3, dtype=torch.bool)).tensor for name in KINDS})
    for name in KINDS:
        assert_same(*(one[name] for one in found))


def test_a_layer_that_runs_twice_is_refused():
    layer = Written("einsum")
    with capture([Site("flow", 3, layer, "attention")], 1, 3):
        output = layer(layer(torch.randn(1, 3, 12, requires_grad=True))).sum()
        with pytest.raises(ValueError, match=r"layer 3 \(Written\) runs more than once in a forward"):
            output.backward()


def test_implementations_without_weights_are_refused(monkeypatch):
    model = llama()
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flex_attention")
    explainer = Attributor(llama())
    with (
        pytest.raises(ValueError, match=r"'flex_attention' shows no queries.*set_attn_implementation\(\"eager\"\)"),
        capture([Site("flow", 0, model.model, "attention")], 1, 3),
    ):
        pass
    explainer.attribute(IDS, latents="flow")  # another model's choice is its own


def test_what_cannot_be_read_names_its_shape():
    class Compressed(Written):
        def forward(self, x):
            return F.scaled_dot_product_attention(x[:, None], x[:, None, ::2], x[:, None, ::2])[:, 0]

    for name, shape in (("key", r"\(1, 1, 2, 12\)"), ("flow", r"\[1, 1, 3, 2\]")):
        layer = Compressed("")
        with (
            pytest.raises(ValueError, match=rf"'{name}' can't be read in layer 0 \(Compressed\).*{shape}"),
            capture([Site(name, 0, layer, "attention")], 1, 3),
        ):
            layer(torch.randn(1, 3, 12, requires_grad=True))


def test_nothing_is_seen_without_gradients():
    model = llama()
    rows = prepare(read(IDS, model), model)
    layer = model.model.layers[0]
    with torch.no_grad(), lxt.monkey_patch(model), capture([Site("flow", 0, layer, "attention")], 1, len(IDS)) as sink:
        model(inputs_embeds=rows.embeds)
    assert not sink.values
