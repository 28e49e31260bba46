"""Names and how good they are: the paper's equations, brute force, and planted neurons of which the answer is known."""

import math
import random
from collections import Counter

import pytest
import torch
from small import a_tokenizer, llama

import lxt
from lxt.neurons.detection import auroc, fit_of_tokens, fit_of_words, held_out, naming_part
from lxt.neurons.naming import distinctive, log_odds, near
from lxt.neurons.results import Context
from lxt.neurons.running import label


def test_log_odds_are_those_of_the_paper():
    near_peaks, corpus = {1: 6, 2: 3, 3: 1}, {1: 10, 2: 400, 3: 30, 4: 560}
    n, total = 10, 1000
    found = log_odds(near_peaks, corpus, total)
    for token, y in near_peaks.items():
        a0 = n
        a = a0 * corpus[token] / total
        big = corpus[token]
        delta = math.log((y + a) / (n + a0 - y - a)) - math.log((big + a) / (total + a0 - big - a))  # equation 16
        variance = 1 / (y + a) + 1 / (big + a)  # equation 20
        assert found[token] == pytest.approx(delta / math.sqrt(variance), rel=1e-12)
    assert found[1] > found[3] > 0 > found[2] - 1.0


def test_one_token_alone_has_finite_odds():
    assert math.isfinite(log_odds({1: 4}, {1: 4}, 4)[1])


def test_distinctive_tokens_are_shared_frequent_and_in_a_fixed_order():
    corpus = Counter({token: 100 for token in range(20)})
    contexts = [[1, 2, 7], [2, 1, 7], [1, 2, 9], [8, 8, 8]]
    found = distinctive(contexts, corpus, 2000)
    assert [token for token, _ in found] == [1, 2]  # equal; 8 is one context's own, 7 no more than chance
    assert found[0][1] == found[1][1] > 1.96
    assert log_odds(Counter({8: 3, 1: 9}), corpus, 2000)[8] > 1.96  # though it is not chance
    assert distinctive(contexts[::-1], corpus, 2000) == found
    assert distinctive([], corpus, 2000) == []


def test_near_keeps_one_token_on_either_side():
    assert near([0, 5, 6, 7, 8], 2, frozenset({0})) == [5, 6, 7]
    assert near([0, 5, 6, 7, 8], 1, frozenset({0})) == [5, 6]
    assert near([0, 5, 6, 7, 8], 4, frozenset({0})) == [7, 8]


@pytest.mark.parametrize("seed", range(5))
def test_auroc_counts_pairs(seed):
    rng = random.Random(seed)
    positive, negative = ([rng.randint(0, 4) for _ in range(rng.randint(1, 9))] for _ in range(2))
    pairs = [1.0 if p > n else 0.5 if p == n else 0.0 for p in positive for n in negative]
    assert auroc(positive, negative) == pytest.approx(sum(pairs) / len(pairs), rel=1e-12)
    assert auroc(positive, []) is auroc([], negative) is None


def test_fits():
    assert fit_of_tokens({1: 2.0, 2: 3.0}, [1, 1, 5, 2]) == 5.0
    assert fit_of_words("Cats, dogs", "my cats' food") == 0.5
    assert fit_of_words("", "x") == 0


def test_contexts_that_name_never_test():
    for count in range(9):
        assert sorted(naming_part(count) + held_out(count)) == list(range(count))


TEXTS = [
    " ".join(random.Random(seed).choices("I have 5 cats and 3 dogs . My cats love to play with my".split(), k=12))
    for seed in range(60)
]


@pytest.fixture(scope="module")
def planted():
    """A model whose neuron 7 of layer 1 is active at one token, and nowhere else."""
    model, tokenizer = llama(), a_tokenizer()
    (token,) = tokenizer(" cats", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()  # so that the residual stream is the token's embedding
        found = model.model.embed_tokens.weight[token].clone()
        table = model.model.embed_tokens.weight
        table -= (table @ found / found.square().sum()).unsqueeze(1) * found
        table[token] = found  # nothing else has its direction
        layer = model.model.layers[1].mlp
        layer.gate_proj.weight[7] = layer.up_proj.weight[7] = found
        layer.down_proj.weight[:, 7] = model.lm_head.weight[token + 1]
    return label(lxt.load(model, tokenizer), TEXTS, layers=[1], by="activation", top=10, length=16)


def test_a_planted_neuron_gets_its_token_as_name(planted):
    found = planted
    neuron = found[1, 7]
    assert {context.peak for context in neuron.contexts["activation", "positive"]} == {" cats"}
    assert len(neuron.contexts["activation", "positive"]) == 10
    assert neuron.words[0][0] == " cats"
    assert neuron.label.split(", ")[0] == "cats"
    assert neuron.auroc > 0.85
    assert found.find(["cats"], top=1)[0][1].number == 7
    assert found.best(1, 1)[0].number == 7
    assert "L1N7  cats" in str(neuron)
    assert " cats" in str(neuron.contexts["activation", "positive"][0])


def test_finding_takes_a_word_and_gives_no_neuron_without_one(planted):
    assert [neuron.number for _, neuron in planted.find("cats")] == [n.number for _, n in planted.find(["cats"])]
    assert all(share > 0 for share, _ in planted.find(" cats", top=100))
    assert planted.find("cats", top=1)[0][0] == 1.0
    for nothing in (["zzz"], "zzz", []):
        assert planted.find(nothing) == []


def test_printed_it_is_a_line(planted):
    tokens = f"{planted.tally.tokens:,}"
    assert repr(planted) == str(planted) == f"Neurons(layers 1; 48 neurons; {tokens} tokens)"


def test_contexts_say_where_they_stand(planted):
    found = planted
    context = found[1, 7].contexts["activation", "positive"][0]
    text = TEXTS[int(context.document)]
    pieces = a_tokenizer().tokenize(text)
    assert pieces[context.token] == "Ġcats"
    assert context.text.strip() in text


def test_a_callable_names_and_a_callable_tests(planted):
    found = planted
    seen = []

    def explain(contexts):
        seen.append(contexts)
        return "cats"

    found.name_all(explain)
    neuron = found[1, 7]
    shown = neuron.contexts["activation", "positive"]
    assert neuron.label == "cats"
    assert list(shown[::2]) in seen  # half of them: the other half tests the name
    assert neuron.auroc > 0.8
    found.name_all(explain, lambda name, contexts: [float(context.score > 0) for context in contexts])
    assert found[1, 7].auroc == 1.0
    found.name_all(explain, lambda name, contexts: [0.0] * len(contexts))
    assert found[1, 7].auroc == 0.5
    assert isinstance(seen[0][0], Context)
    found.name_all()
    assert found[1, 7].label.startswith("cats")


def test_what_was_not_labelled_is_said(planted):
    found = planted
    with pytest.raises(ValueError, match="layer 0 was not labelled; those are 1"):
        found[0, 0]
    with pytest.raises(IndexError, match="no neuron 48 in layer 1, which has 0 to 47"):
        found[1, 48]
    with pytest.raises(ValueError, match=r"have no folder; give label\(\.\.\., out="):
        lxt.neurons.Neurons(found.tally, found.manifest, found.pieces, found.special).save()
