"""Ranks and statistics against a slow reference: a prediction at a time, every latent kept, sorted in plain Python.

The reference goes through `attribute`, which explains one prediction of one prefix. That their sum is what one backward
for all predictions gives follows from the linearity of the backward, and is what is tested here.
"""

import itertools
import random

import pytest
import torch
from equations import Float64
from small import a_tokenizer, gpt2, llama

import lxt
from lxt.inputs import Row, pads_left
from lxt.neurons.measuring import KINDS, SIGNS
from lxt.neurons.running import label
from lxt.neurons.scoring import _CPU_BATCH, _groups

TEXTS = [
    "I have 5 cats",
    "My dogs love my cats. My cats love",
    "play",
    "cats and 3 dogs. My cats love to play with my dogs and 5 cats and 3 dogs",
    "I have 5 cats",  # equal to the first to the last bit: a tie
]
LENGTH = 14
K = 3
# Sums of at most 14 predictions through 3 layers of 32 dimensions in float64, in another order.
CLOSE = 1e-9


def reference(explainer, layers, targets=None):
    """By layer, kind, window: [token][neuron], for the tokens that count; and the windows' ids with their prefix."""
    tokenizer, values, windows = explainer.tokenizer, {}, []
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        start, rest = ids[:1], ids[1:]
        room = LENGTH - 1
        windows += [start + rest[at : at + room] for at in range(0, len(rest), room)]
    for number, ids in enumerate(windows):
        relevance, activation = 0, {}

        def keep(layer, activation=activation):
            return lambda module, args: activation.update({layer: args[0][0]})

        modules = [explainer.model.get_submodule(path) for path in PATHS[type(explainer.model).__name__]]
        hooks = [module.register_forward_pre_hook(keep(layer)) for layer, module in enumerate(modules)]
        with Float64(), torch.no_grad():
            explainer.model(torch.tensor([ids]))
        for hook in hooks:
            hook.remove()
        for place in range(len(ids) - 1):
            if targets is not None and ids[place + 1] not in targets:
                continue
            with Float64():
                out = explainer.attribute(ids[: place + 1], target=ids[place + 1], latents=("neuron",))
            found = out.latents["neuron"][:, 0]
            relevance = relevance + torch.nn.functional.pad(found, [0, 0, 0, len(ids) - found.shape[1]])
        for layer in layers:
            zero = torch.zeros_like(activation[layer])
            values["relevance", layer, number] = (relevance[layer] if torch.is_tensor(relevance) else zero)[1:].tolist()
            values["activation", layer, number] = activation[layer][1:].tolist()
    return values, windows


PATHS = {
    "LlamaForCausalLM": [f"model.layers.{n}.mlp.down_proj" for n in range(3)],
    "GPT2LMHeadModel": [f"transformer.h.{n}.mlp.c_proj" for n in range(3)],
}


def best(values, kind, layer, count, neuron, sign):
    """[(score, window, position)], the most extreme token of each window, best first."""
    rows = []
    for window in range(count):
        column = [row[neuron] * sign for row in values[kind, layer, window]]
        place = max(range(len(column)), key=lambda at: (column[at], -at))
        if column[place] > 0:
            rows.append((-column[place], window, place + 1))  # after the special token
    return [(-score * sign, window, place) for score, window, place in sorted(rows)[:K]]


@pytest.mark.parametrize(
    ("build", "layers", "targets"),
    [(llama, [0, 1, 2], None), (llama, [1], [" cats", " dogs"]), (gpt2, [0, 2], None)],
    ids=["llama", "llama, one layer, two targets", "gpt2"],
)
def test_ranks_and_moments_are_those_of_the_reference(build, layers, targets):
    explainer = lxt.load(build().double(), a_tokenizer())
    ids = targets and [explainer.tokenizer(t, add_special_tokens=False)["input_ids"][0] for t in targets]
    values, windows = reference(explainer, layers, ids)
    with Float64():
        found = label(
            explainer, TEXTS, layers=layers, top=K, targets=targets, length=LENGTH, batch_size=2, block_size=3
        )
    assert found.layers == layers
    ties = 0
    for layer, kind, sign in itertools.product(layers, KINDS, SIGNS):
        top = found.tally.tops[layer, kind, sign]
        for neuron in range(found.count(layer)):
            expected = best(values, kind, layer, len(windows), neuron, SIGNS[sign])
            columns = (top.score, top.window, top.position)
            got = list(zip(*(column[neuron].tolist() for column in columns), strict=True))
            assert [row for row in got if row[1] < 0] == [(0.0, -1, 0)] * (K - len(expected))
            for (score, window, place), (wanted, *where) in zip(got, expected, strict=False):
                assert score == pytest.approx(wanted, rel=CLOSE, abs=1e-12)
                assert [window, place] == where or is_tie(values[kind, layer, window], place, neuron, wanted)
            ties += [row[1] for row in got[:2]] == [0, len(windows) - 1]
        rows = [row for window in range(len(windows)) for row in values[kind, layer, window]]
        columns = torch.tensor(rows, dtype=torch.float64)
        moments = torch.stack([columns.sum(0), columns.square().sum(0), (columns > 0).double().sum(0)])
        assert torch.allclose(found.tally.moments[layer, kind][:2], moments[:2], rtol=1e-7, atol=1e-10)
        above = (found.tally.moments[layer, kind][2] - moments[2]).abs()
        assert above.max() <= 2  # what is 0 but for rounding may fall on either side
    assert ties or targets  # the equal texts are first and last of some neuron, in this order
    assert found.tally.tokens == sum(len(window) - 1 for window in windows)


def is_tie(rows, place, neuron, wanted):
    """Within rounding another place of the same score: the order of equals is settled by the last bits."""
    return rows[place - 1][neuron] == pytest.approx(wanted, rel=CLOSE, abs=1e-12)


def test_contexts_name_the_token_of_their_document():
    """Also where a window begins with a special token that the text itself holds."""
    explainer = lxt.load(llama(), a_tokenizer())
    text = "I have 5 cats and 3 dogs.</s>My cats love to play</s></s>"
    ids = explainer.tokenizer(text)["input_ids"][1:]
    found = label(explainer, [text], layers=[0], length=ids.index(explainer.tokenizer.eos_token_id) + 1)
    starts = [window.ids[window.prefix] for window in found.tally.windows]
    assert starts.count(explainer.tokenizer.eos_token_id) == 1
    for context in (context for neuron in found for contexts in neuron.contexts.values() for context in contexts):
        assert found.pieces[ids[context.token]] == context.peak


def test_batches_and_padding_make_no_difference():
    explainer = lxt.load(llama().double(), a_tokenizer())
    with Float64():
        one, other = (label(explainer, TEXTS, length=LENGTH, batch_size=size, top=K) for size in (1, 4))
    for key, top in one.tally.tops.items():
        torch.testing.assert_close(top.score, other.tally.tops[key].score, rtol=CLOSE, atol=1e-12)


def padded(groups, lengths):
    return sum(len(group) * max(lengths[i] for i in group) for group in groups)


@pytest.mark.parametrize("seed", range(5))
def test_batches_have_the_least_padding_for_their_number(seed):
    rng = random.Random(seed)
    lengths = [rng.choice([3, 4, 5, 9, 20, 40]) for _ in range(9)]
    groups = _groups([Row((1,) * length) for length in lengths], llama(), 20, 3)
    assert sorted(i for group in groups for i in group) == list(range(9))
    assert all(len(group) == 1 or padded([group], lengths) <= 60 for group in groups)
    cost = padded(groups, lengths) + _CPU_BATCH * len(groups)
    order = sorted(range(9), key=lambda i: lengths[i])
    for cuts in itertools.product([False, True], repeat=8):  # every other way to split the sorted rows
        ends = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), 9]
        other = [order[a:b] for a, b in itertools.pairwise(ends)]
        if all(len(group) == 1 or padded([group], lengths) <= 60 for group in other):
            assert cost <= padded(other, lengths) + _CPU_BATCH * len(other)


def test_models_that_cannot_pad_get_rows_of_one_length():
    rows = [Row((1,) * length) for length in (3, 5, 3, 5, 5)]
    model = llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    assert not pads_left(model)
    assert [sorted(group) for group in _groups(rows, model, 20, 3)] == [[0, 2], [1, 3, 4]]


def test_checkpointing_gives_the_same():
    model, tokenizer = llama(), a_tokenizer()
    plain, checkpointed = (
        label(lxt.Attributor(model, tokenizer, checkpoint=how), TEXTS, length=LENGTH, top=K) for how in ("off", "layer")
    )
    for key, top in plain.tally.tops.items():
        assert torch.equal(top.score, checkpointed.tally.tops[key].score)


def test_the_model_is_left_as_it_was():
    model = llama()
    before = {name: module.__dict__.copy() for name, module in model.named_modules()}
    explainer = lxt.load(model, a_tokenizer())
    label(explainer, TEXTS, length=LENGTH)
    for name, module in model.named_modules():
        assert not module._forward_pre_hooks
        assert module.__dict__.keys() == before[name].keys()
