"""attribute_targets(): what attribute() gives for each target, out of one forward and one backward for each."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import transformers as tf
from equations import Float64
from models import build as example
from models import checkpointed
from PIL import Image
from small import CLOSE, LAYERS, PROMPTS, TEXT, a_tokenizer, assert_close, bert, gpt2, llama, opt, t5
from torch import nn

import lxt
from lxt.attribution import Attribution
from lxt.attributor import Attributor
from lxt.targets import Goal, evaluate
from lxt.turns import places

# The same float64 sums in one backward and in another; a batch or another set of positions sums in another order.
EXACT = 1e-12
PROMPT = [1, 40, 41, 2, 42, 43, 5]  # 2 is the mask of the tests' tokenizer


def spread(logits):
    return logits[:, -1].var(-1)


MANY = [
    42,
    lxt.Target(43, contrast=[44, 45]),
    None,
    lxt.Target(7, position=2, kind="logprob"),
    lxt.Target(7, position=-4, kind="centered"),
    lxt.Target(function=spread, position=1),
    lxt.Target(rank=3),
    spread,
]


def classifier() -> nn.Module:
    return bert(tf.BertForSequenceClassification, num_labels=5)


def bart() -> nn.Module:
    torch.manual_seed(0)
    size = {f"{side}_{name}": number for side in ("encoder", "decoder") for name, number in
            (("layers", 2), ("attention_heads", 4), ("ffn_dim", 40))}  # fmt: skip
    size |= {"vocab_size": 60, "d_model": 32, "max_position_embeddings": 32, "num_labels": 3, "eos_token_id": 5}
    return tf.BartForSequenceClassification(tf.BartConfig(init_std=0.2, **size)).eval()


WORDS = [50, lxt.Target(51, kind="prob"), lxt.Target(rank=1), lxt.Target(50, contrast=51)]
CASES: dict[str, tuple[Callable[[], nn.Module], list]] = {
    "llama": (llama, MANY),
    "gpt2": (gpt2, MANY),
    "opt": (opt, MANY),
    "gemma3": (lambda: example("gemma3"), [7, lxt.Target(8, position=2), None, lxt.Target([9, 3])]),
    "qwen3_moe": (lambda: example("qwen3_moe"), [7, lxt.Target(8, position=2), None]),
    "masked": (lambda: bert(tf.BertForMaskedLM), [*WORDS, lxt.Target(5, position=1), spread]),
    "classes": (classifier, [0, "LABEL_1", None, lxt.Target(2, contrast=[0, 1]), spread]),
    "tokens": (
        lambda: bert(tf.BertForTokenClassification, num_labels=3),
        [lxt.Target("LABEL_1", position=3), lxt.Target(position=5), lxt.Target(position=5, rank=2)],
    ),
    "answers": (
        lambda: bert(tf.BertForQuestionAnswering),
        [None, "start", lxt.Target([4, 5]), "end", lxt.Target(kind="logprob")],
    ),
    "t5": (t5, [*WORDS, spread, lxt.Target([50, 51]), lxt.Target([50, 52, 53]), lxt.Target([50, 54, 53])]),
    "bart classifier": (bart, [0, 1, lxt.Target(rank=1)]),
}


@contextmanager
def counted(model: nn.Module) -> Iterator[dict[str, int]]:
    """Forwards of the model, calls of autograd, and those that kept the graph."""
    calls = {"forwards": 0, "backwards": 0, "kept": 0}
    real = torch.autograd.grad

    def grad(*args, **options):
        calls["backwards"] += 1
        calls["kept"] += options["retain_graph"]
        return real(*args, **options)

    def forward(*args):
        calls["forwards"] += 1

    handle = model.register_forward_hook(forward)
    torch.autograd.grad = grad
    try:
        yield calls
    finally:
        handle.remove()
        torch.autograd.grad = real


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rules", ["attnlrp", "cp"])
def test_every_row_is_an_attribution_of_its_own(name, rules):
    make, targets = CASES[name]
    explainer = Attributor(make().double(), a_tokenizer(), rules)
    prompt = [40 if token == 2 and name != "masked" else token for token in PROMPT]
    with Float64():
        out = explainer.attribute_targets(prompt, targets)
        singles = [explainer.attribute(prompt, target) for target in targets]
    assert len(out) == len(targets)
    for row, single in zip(out, singles, strict=True):
        assert_close(row.relevance, single.relevance, EXACT)
        assert row.tokens == single.tokens
        assert (row.token_ids is None) == (single.token_ids is None)
        assert row.token_ids is None or torch.equal(row.token_ids, single.token_ids)
        assert torch.equal(row.special, single.special)
        (got,), (expected,) = row.explained, single.explained
        assert (got.label, got.kind, got.position) == (expected.label, expected.kind, expected.position)
        assert got.value == pytest.approx(expected.value, rel=EXACT)
        assert (got.prefix is None) == (expected.prefix is None)
        assert got.prefix is None or got.prefix == pytest.approx(expected.prefix, rel=1e-9, abs=EXACT)
        assert row.predictions[0].token == single.predictions[0].token
        assert row.predictions[0].logit == pytest.approx(single.predictions[0].logit, rel=EXACT)


@pytest.mark.parametrize("latents", [("residual",), ("residual", "head", "neuron")])
def test_latents_are_those_of_each_target(latents):
    explainer = Attributor(llama().double())
    out = explainer.attribute_targets(PROMPT, MANY, latents=latents)
    for row, target in zip(out, MANY, strict=True):
        single = explainer.attribute(PROMPT, target, latents=latents)
        for name in latents:
            assert row.latents[name].shape[:3] == (LAYERS, 1, len(PROMPT))
            assert_close(row.latents[name], single.latents[name], EXACT)


def test_one_forward_and_a_backward_for_each_target():
    model = llama()
    explainer = Attributor(model)
    with counted(model) as calls:
        explainer.attribute_targets(PROMPT, MANY, latents="head")
    assert calls == {"forwards": 1, "backwards": len(MANY), "kept": len(MANY) - 1}
    with counted(model) as calls:
        explainer.attribute_targets(PROMPTS, [[1, 2, 3], [4], [5, 6]])
    assert calls == {"forwards": 1, "backwards": 3, "kept": 2}
    with counted(model) as calls:
        explainer.attribute_targets(PROMPT, top=5)
    assert calls == {"forwards": 1, "backwards": 5, "kept": 4}


def test_the_head_and_the_last_layer_run_at_the_union_of_the_positions():
    model, seen = llama(), {}
    model.lm_head.register_forward_hook(lambda module, args, output: seen.update(head=args[0].shape))
    plain = nn.functional.linear
    down = model.model.layers[-1].mlp.down_proj.weight
    targets = [lxt.Target(7, position=2), lxt.Target(8, position=4), lxt.Target(9, position=2), lxt.Target(9)]

    def linear(x, weight, *bias):
        if weight is down:
            seen["last layer"] = x.shape
        return plain(x, weight, *bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "linear", linear)
        Attributor(model).attribute_targets(PROMPT, targets)
        assert seen == {"head": (3, 32), "last layer": (1, 3, 48)}
        Attributor(model).attribute_targets([PROMPT, PROMPT[:5]], [targets, [7]])  # filled up, none twice
    assert seen == {"head": (6, 32), "last layer": (2, 3, 48)}


def test_fewer_positions_are_filled_up_by_others_and_else_by_the_last():
    goals = [[Goal((), (0,), "logit"), Goal((), (2,), "logit"), Goal((), (0,), "logit")], [Goal((), (1,), "logit")]]
    rows = [lxt.inputs.Row((1, 2, 3)), lxt.inputs.Row((1, 2))]
    assert places(rows, goals, "causal").tolist() == [[0, 2], [2, 1]]
    assert places(rows, goals, "masked").tolist() == [[0, 2], [2, 2]]
    assert places(rows, goals, "seq2seq").tolist() == [[0, 2], [1, 1]]


# Several prompts, several tokens


@pytest.mark.parametrize("build", [llama, opt])  # padded; by length
@pytest.mark.parametrize("size", [None, 1, 2])
def test_prompts_follow_each_other_with_all_of_their_targets(build, size):
    explainer = Attributor(build().double())
    lists = [[42, lxt.Target(9, position=1)], [None], [lxt.Target([7, 8]), 7, lxt.Target([7, 8, 9])]]
    for targets in (lists, [42, lxt.Target([7, 8]), lxt.Target(9, position=1)]):
        out = explainer.attribute_targets(PROMPTS, targets, latents="residual", batch_size=size)
        each = targets if targets is lists else [targets] * 3
        flat = [(prompt, target) for prompt, own in zip(PROMPTS, each, strict=True) for target in own]
        assert len(out) == len(flat)
        for row, (prompt, target) in zip(out, flat, strict=True):
            single = explainer.attribute(prompt, target, latents="residual")
            assert row.token_ids[0].tolist() == single.token_ids[0].tolist()
            assert_close(row.relevance, single.relevance, 1e-6)  # norms' statistics are float32, and rows are padded
            assert_close(row.latents["residual"], single.latents["residual"], 1e-6)
            assert row.explained[0].label == single.explained[0].label


def test_only_a_target_of_several_tokens_takes_a_row_of_its_own():
    model = llama()
    shapes = []
    model.model.layers[0].register_forward_hook(lambda module, args, output: shapes.append(args[0].shape[:2]))
    Attributor(model).attribute_targets(PROMPT, [4, lxt.Target([7, 8]), 5, lxt.Target([7, 9]), lxt.Target([6, 9, 9])])
    assert shapes == [(3, len(PROMPT) + 2)]  # the prompt; with 7; with 6 and 9


def test_the_decoders_share_goes_to_its_own_target():
    explainer = Attributor(t5().double())
    prompts, lists = [PROMPT, PROMPT[::-1]], [[50, 51], [lxt.Target([52, 53])]]
    with Float64():
        out = explainer.attribute_targets(prompts, lists)
        for row, prompt, target in zip(out, (0, 0, 1), (50, 51, lxt.Target([52, 53])), strict=True):
            (expected,) = explainer.attribute(prompts[prompt], target).explained
            assert row.explained[0].prefix == pytest.approx(expected.prefix, rel=1e-9)


def test_prompts_of_embeddings():
    model = llama()
    embeds = model.get_input_embeddings()(torch.tensor([PROMPT, PROMPT[::-1]])).detach()
    out = Attributor(model).attribute_targets(embeds, [4, lxt.Target([5, 6])])
    by_ids = Attributor(model).attribute_targets([PROMPT, PROMPT[::-1]], [4, lxt.Target([5, 6])])
    assert_close(out.relevance, by_ids.relevance)


def test_strings_are_named_and_one_contrast_is_for_all():
    tokenizer = a_tokenizer()
    explainer = Attributor(llama(), tokenizer)
    out = explainer.attribute_targets(TEXT, [" dogs", " cats"], contrast=" have")
    assert [one.label for one in out.explained] == ["' dogs' − ' have'", "' cats' − ' have'"]
    assert out.tokens[0] == out.tokens[1]
    assert "".join(out.tokens[0]).endswith(TEXT)
    assert_close(out[0].relevance, explainer.attribute(TEXT, " dogs", contrast=" have").relevance)


# The most probable ones


def test_top_is_the_most_probable_tokens():
    model = llama().double()
    explainer = Attributor(model)
    out = explainer.attribute_targets(PROMPTS, top=4)
    for number, prompt in enumerate(PROMPTS):
        best = model(torch.tensor([prompt])).logits[0, -1].topk(4).indices.tolist()
        rows = [out[4 * number + rank] for rank in range(4)]
        assert [row.explained[0].label for row in rows] == [repr(str(token)) for token in best]
        values = [row.explained[0].value for row in rows]
        assert values == sorted(values, reverse=True)
        assert {row.predictions[0].id for row in rows} == {best[0]}
        assert_close(rows[2].relevance, explainer.attribute(prompt, best[2]).relevance, 1e-6)
        assert_close(rows[2].relevance, explainer.attribute(prompt, lxt.Target(rank=2)).relevance, 1e-6)
    best = model(torch.tensor([PROMPTS[0]])).logits[0, -1].topk(4).indices
    by_ids = explainer.attribute_targets(PROMPTS[0], best)
    assert_close(by_ids.relevance, torch.cat([out[rank].relevance for rank in range(4)]), 1e-6)


def test_top_of_classes_and_of_a_masked_token():
    out = Attributor(classifier()).attribute_targets(PROMPT, top=5)
    assert {one.label for one in out.explained} == {f"'LABEL_{number}'" for number in range(5)}
    explainer = Attributor(bert(tf.BertForMaskedLM), a_tokenizer())
    assert len({one.label for one in explainer.attribute_targets(PROMPT, top=3).explained}) == 3
    with pytest.raises(ValueError, match="no prediction number 6: BertForSequenceClassification has 5 classes"):
        Attributor(classifier()).attribute_targets(PROMPT, top=6)
    with pytest.raises(ValueError, match="has 2 masks, and a rank is of the predictions at one"):
        explainer.attribute_targets([1, 2, 40, 2], top=2)
    with pytest.raises(ValueError, match="two positions of the prompt, which have no common rank"):
        Attributor(bert(tf.BertForQuestionAnswering)).attribute_targets(PROMPT, top=2)


def test_equal_logits_have_one_order():
    logits = torch.zeros(1, 1, 9)
    logits[..., [2, 5, 6]] = 1.0
    ids = [evaluate(logits, [Goal((), (0,), "logit", rank=rank)])[1][0].ids[0] for rank in range(9)]
    assert sorted(ids) == list(range(9))
    assert set(ids[:3]) == {2, 5, 6}


@pytest.mark.parametrize("rank", [-1, True, 1.5])
def test_a_rank_is_a_number_of_a_prediction(rank):
    with pytest.raises(ValueError, match="rank must be a whole number >= 0"):
        lxt.Target(rank=rank)
    with pytest.raises(ValueError, match="without a token and a function"):
        lxt.Target(4, rank=1)


def test_a_contrast_that_is_one_of_the_predictions():
    explainer = Attributor(llama())
    third = explainer.attribute_targets(PROMPT, top=3).explained[2].label.strip("'")
    with pytest.raises(ValueError, match=rf"id {third}, is the model's prediction number 3, and their difference is 0"):
        explainer.attribute_targets(PROMPT, top=3, contrast=int(third))


# What is done with it


def test_it_is_an_attribution_like_any_other(tmp_path, capsys):
    explainer = Attributor(llama(), a_tokenizer())
    out = explainer.attribute_targets(TEXT, top=3, latents="residual")
    assert isinstance(out, Attribution)
    out.save(tmp_path / "out.safetensors")
    again = Attribution.load(tmp_path / "out.safetensors")
    assert torch.equal(again.relevance, out.relevance)
    assert torch.equal(again.latents["residual"], out.latents["residual"])
    assert again.explained == out.explained
    assert again.predictions == out.predictions
    out.show()
    assert capsys.readouterr().out.count("What speaks for") == 3
    out.to_html(tmp_path / "out.html")
    assert (tmp_path / "out.html").read_text(encoding="utf-8").count("<section") == 3
    out.plot(tmp_path / "out.png")
    assert (tmp_path / "out.png").stat().st_size > 5000
    assert len(json.loads(json.dumps(out.to_dict()))["rows"]) == 3


@pytest.mark.parametrize("name", ["llama", "classes", "answers", "t5", "bart classifier"])
def test_check_judges_all_targets(name):
    make, targets = CASES[name]
    explainer = Attributor(make().double())
    with Float64():
        out = explainer.attribute_targets([PROMPT, [*PROMPT[:5], 5]], targets)
        report = out.check()
    assert report.ok
    assert report.audit_difference is not None
    assert report.audit_difference < 1e-9
    assert report.value == pytest.approx(sum(one.value for one in out.explained), rel=1e-6)
    assert report.total == pytest.approx(float(out.total.sum()), rel=1e-9)


def test_the_ledger_adds_up_over_all_targets():
    """Nothing is left over: what the prompts did not get stands in the report."""
    out = Attributor(gpt2().double()).attribute_targets(PROMPTS, [[3, 4], [5], [7, lxt.Target(8, position=2)]])
    report = out.check()
    assert report.ok
    assert report.leaks
    assert abs(report.rest) < 1e-5 * abs(report.value)  # norms' statistics are float32


# Memory


@pytest.mark.parametrize("rules", ["attnlrp", "cp"])
def test_checkpointing_recomputes_for_each_backward(rules):
    model = llama().double()
    explainer = Attributor(model, rules=rules)
    targets = [3, lxt.Target(4, position=2), lxt.Target(rank=1)]
    expected = explainer.attribute_targets(PROMPT, targets, latents="head")
    seen = []
    model.model.layers[0].input_layernorm.register_forward_hook(lambda *args: seen.append(1))
    checkpointed(model.train())
    out = explainer.attribute_targets(PROMPT, targets, latents="head")
    assert len(seen) == 1 + len(targets)
    assert_close(out.relevance, expected.relevance, EXACT)
    assert_close(out.latents["head"], expected.latents["head"], EXACT)


@pytest.mark.parametrize("checkpoints", [False, True])
def test_what_lives_during_a_backward_does_not_grow(checkpoints, monkeypatch):
    """Tensors that Python holds before the second backward and before the last: the results of those between."""
    model, living = llama(), []
    if checkpoints:
        checkpointed(model.train())
    real = torch.autograd.grad

    def grad(*args, **options):
        gc.collect()
        tensors = (x for x in gc.get_objects() if type(x) in (torch.Tensor, nn.Parameter))
        storages = {x.untyped_storage().data_ptr(): x for x in tensors}
        living.append(sum(x.untyped_storage().nbytes() for x in storages.values()))
        return real(*args, **options)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    prompt = list(range(1, 61))
    Attributor(model).attribute_targets(prompt, list(range(20)))
    assert len(living) == 20
    relevance = 4 * len(prompt)
    assert living[-1] - living[1] <= 18 * 2 * relevance  # a prompt's relevance for each, and its value; not a layer


# What can't be


@pytest.mark.parametrize(
    ("inputs", "given", "error", "message"),
    [
        (PROMPT, {}, ValueError, "either targets, .* or top.* got neither"),
        (PROMPT, {"targets": [1], "top": 2}, ValueError, "got both"),
        (PROMPT, {"targets": " dogs"}, TypeError, "targets must be a list .* got str. For one target call attribute"),
        (PROMPT, {"targets": 5}, TypeError, "got int"),
        (PROMPT, {"targets": []}, ValueError, "targets hold no target"),
        (PROMPTS, {"targets": [[1], [], [2]]}, ValueError, "at least one for each prompt"),
        (PROMPTS, {"targets": [[1], [2]]}, ValueError, "2 lists for 3 prompts"),
        (PROMPT, {"targets": [[1, 2], [3, 4]]}, ValueError, r"2 lists for 1 prompt; .*lxt.Target\(\[...\]\)"),
        (PROMPT, {"targets": [1, [2, 3]]}, TypeError, "not a mixture"),
        (PROMPT, {"targets": [1.5]}, TypeError, "a target must be"),
        (PROMPT, {"targets": [1, 999]}, ValueError, "the target 999 is out of range"),
        (PROMPT, {"targets": [1, 2], "contrast": [3, 4]}, ValueError, "read in two ways; give each target its own"),
        (PROMPT, {"top": 0}, ValueError, "top must be a whole number >= 1, got 0"),
        (PROMPT, {"top": True}, ValueError, "top must be a whole number >= 1, got True"),
        (PROMPT, {"top": 301}, ValueError, "no prediction number 301: LlamaForCausalLM has 300 tokens"),
        ([[1] * 64, [1]], {"targets": [1, lxt.Target([2, 3])]}, ValueError, "prompt 0 with its target has 65 tokens"),
        (PROMPT, {"targets": [1], "latents": "heads"}, ValueError, "did you mean 'head'"),
        (Image.new("RGB", (8, 8)), {"targets": [1]}, ValueError, r"explains text; .* call attribute\(\) for each"),
    ],
)
def test_bad_input_is_named(inputs, given, error, message):
    model = llama()
    with pytest.raises(error, match=message):
        Attributor(model).attribute_targets(inputs, **given)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("rules", ["attnlrp", "cp"])
def test_a_position_that_stands_twice_in_a_row_counts_once(rules):
    """A row with fewer positions than its neighbours has one again, and the last layer runs at all of them."""
    explainer = Attributor(llama(), rules=rules)
    prompts = [[1], [1, 9, 10, 4, 5, 6]]  # the first has no other position to fill its place with
    targets = [[5, 6], [lxt.Target(3, position=1), lxt.Target(4, position=3), 2]]
    out = explainer.attribute_targets(prompts, targets)
    each = [(prompt, target) for prompt, own in zip(prompts, targets, strict=True) for target in own]
    for found, (prompt, target) in zip(out.relevance, each, strict=True):
        # of one token there is one number, in which 32 others cancel
        assert_close(found[-len(prompt) :], explainer.attribute(prompt, target).relevance[0], 10 * CLOSE)


def test_a_function_that_reads_other_positions_is_told_of_the_one_that_there_is():
    explainer = Attributor(llama())

    def third(logits):
        return logits[:, 3, 7]

    message = r"outside of its logits, whose shape is \[1, 1, 300\] = \[batch, position, vocabulary\].*position=\.\.\."
    with pytest.raises(ValueError, match=message):
        explainer.attribute(PROMPT, third)
    with pytest.raises(ValueError, match=message):
        explainer.attribute_targets(PROMPT, [5, third])
    with pytest.raises(ValueError, match=r"outside of its logits, whose shape is \[3, 1, 300\]"):
        explainer.attribute(PROMPTS, third)


def test_a_function_beside_a_sequence_gets_its_own_position_alone():
    shapes = []

    def score(logits):
        shapes.append(tuple(logits.shape))
        return logits[:, -1, 7]

    out = Attributor(llama()).attribute([PROMPT, PROMPT], [score, lxt.Target([7, 8, 9])])
    assert shapes == [(1, 1, 300)]
    assert_close(out[0].relevance, Attributor(llama()).attribute(PROMPT, 7).relevance)


def test_a_function_gets_the_masks_of_each_prompt():
    shapes = []

    def score(logits):
        shapes.append(tuple(logits.shape))
        return logits[:, :, 7].sum(-1)

    prompts = [[1, 2, 40, 41], [1, 2, 40, 2]]
    explainer = Attributor(bert(tf.BertForMaskedLM), a_tokenizer())
    out = explainer.attribute(prompts, score)
    assert shapes == [(1, 1, 300), (1, 2, 300)]
    assert_close(out[0].relevance, explainer.attribute(prompts[0], score).relevance)
