"""BERT and its kin: classifiers of texts, pairs and tokens, masked tokens, and answers, each conserving and audited."""

import pytest
import torch
import transformers as tf
from equations import Float64
from models import absorbs_relevance
from small import a_tokenizer, assert_close
from torch import nn

import lxt
from lxt.attributor import Attributor
from lxt.inputs import Row
from lxt.targets import resolve

_SIZE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
    "pad_token_id": 3,
    "num_labels": 3,
}
FAMILIES = {
    "Bert": _SIZE,
    "Roberta": _SIZE,
    "DistilBert": {
        **{k: v for k, v in _SIZE.items() if k not in ("hidden_size", "num_hidden_layers", "num_attention_heads")},
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 40,
    },
    "Electra": {**_SIZE, "embedding_size": 16},
    "DebertaV2": {**_SIZE, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8},
}
PROMPT = [1, 40, 41, 2, 42, 43, 5]  # 2 is the mask of the tests' tokenizer
TARGETS = {
    "SequenceClassification": 1,
    "TokenClassification": lxt.Target(2, position=4),
    "MaskedLM": 50,
    "QuestionAnswering": lxt.Target([4, 5]),
}
# float64 sums over 7 tokens, 32 dimensions and 2 layers
EXACT = 1e-9

each_head = pytest.mark.parametrize("head", TARGETS)
each_family = pytest.mark.parametrize("family", FAMILIES)


def build(family: str, head: str, zero_biases: bool = True) -> nn.Module:
    torch.manual_seed(0)
    options = dict(FAMILIES[family])
    options["num_labels"] = 2 if head == "QuestionAnswering" else 3
    model = getattr(tf, f"{family}For{head}")(getattr(tf, f"{family}Config")(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            if zero_biases and (absorbs_relevance(name) or "rel_embeddings" in name):
                parameter.zero_()
    return model.double().eval()


@pytest.fixture(scope="module")
def tokenizer():
    return a_tokenizer()


@each_family
@each_head
def test_heads_conserve_and_the_auditor_agrees(family, head, tokenizer):
    for rules in ("cp", lxt.ATTN_LRP.but(attention="value_only")):
        explainer = Attributor(build(family, head), tokenizer, rules)
        with Float64():
            out = explainer.attribute(PROMPT, TARGETS[head])
        assert out.conservation.item() == pytest.approx(1, abs=EXACT)
        assert out.relevance.abs().min() > 0
    for rules in ("attnlrp", "cp"):
        explainer = Attributor(build(family, head, zero_biases=False), tokenizer, rules)
        with Float64():
            out = explainer.attribute(PROMPT, TARGETS[head])
            report = out.check()
        assert report.audit_difference is not None
        assert report.audit_difference < EXACT
        assert report.ok


@each_family
def test_a_batch_gives_what_single_prompts_give(family, tokenizer):
    explainer = Attributor(build(family, "QuestionAnswering", zero_biases=False), tokenizer)
    prompts = [PROMPT, [1, 40, 41], [1, 44, 45, 2, 46, 43, 5]]
    out = explainer.attribute(prompts)
    for row, prompt in enumerate(prompts):
        alone = explainer.attribute(prompt)
        assert_close(out[row].relevance[0], alone.relevance[0], 1e-6)  # norms' statistics are float32
        assert out.explained[row].label == alone.explained[0].label


# Masks


def test_several_masks_are_explained_by_their_predictions(tokenizer):
    model = build("Bert", "MaskedLM", zero_biases=False)
    explainer = Attributor(model, tokenizer)
    prompt = [1, 2, 41, 2, 42]
    out = explainer.attribute(prompt)
    logits = model(torch.tensor([prompt])).logits[0, [1, 3]]
    best = logits.argmax(-1)
    value = logits.log_softmax(-1)[[0, 1], best].sum()
    assert out.explained[0].kind == "logprob"
    assert out.explained[0].value == pytest.approx(float(value), rel=1e-5)
    given = explainer.attribute(prompt, lxt.Target(best.tolist()))
    assert_close(given.relevance, out.relevance, 1e-9)
    one = explainer.attribute(prompt, lxt.Target(7, position=3))
    assert one.explained[0].value == pytest.approx(float(logits[1, 7]), rel=1e-5)
    ours = explainer.attribute(prompt, lambda logits: logits[:, 0, 5] + 2 * logits[:, 1, 6])
    assert ours.explained[0].value == pytest.approx(float(logits[0, 5] + 2 * logits[1, 6]), rel=1e-5)


@pytest.mark.parametrize(
    ("prompt", "target", "message"),
    [
        ([1, 41], None, r"the prompt has 0 of them; write \[MASK\] once, .*or give lxt.Target\(token, position"),
        ([1, 2, 2], 7, r"has 2 of them at positions 1, 2; write \[MASK\] once"),
        ([2, 2, 2], lxt.Target([7, 8]), r"one for each mask, and the prompt has 3 masks at positions 0, 1, 2; write"),
        ([1, 2, 41], lxt.Target([7, 8]), "BertForMaskedLM does not continue text"),
        ([1, 2, 2], lxt.Target(kind="prob"), "2 masks, explained together by their predictions' log-probability"),
    ],
)
def test_masks_that_do_not_fit_are_named(prompt, target, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        Attributor(build("Bert", "MaskedLM"), tokenizer).attribute(prompt, target)


# Answers


@pytest.fixture(scope="module")
def answering():
    return build("Bert", "QuestionAnswering", zero_biases=False)


def test_the_predicted_answer_is_the_best_span(answering, tokenizer):
    out = Attributor(answering, tokenizer).attribute(PROMPT)
    output = answering(torch.tensor([PROMPT]))
    start, end = output.start_logits[0], output.end_logits[0]
    spans = {(s, e): float(start[s] + end[e]) for s in range(7) for e in range(s, 7)}
    best = max(spans, key=lambda span: spans[span])
    assert out.explained[0].value == pytest.approx(spans[best], rel=1e-5)
    words = out.tokens[0][best[0] : best[1] + 1]
    assert out.explained[0].label == repr("".join(words).strip())
    assert out.predictions[0].token == out.tokens[0][int(start.argmax())]


def test_start_end_and_span_are_targets(answering, tokenizer):
    explainer = Attributor(answering, tokenizer)
    output = answering(torch.tensor([PROMPT]))
    start, end = output.start_logits[0], output.end_logits[0]
    both = explainer.attribute(PROMPT, lxt.Target([-3, 5]))
    assert both.explained[0].value == pytest.approx(float(start[4] + end[5]), rel=1e-5)
    first = explainer.attribute(PROMPT, "start")
    assert first.explained[0].value == pytest.approx(float(start.max()), rel=1e-5)
    assert first.explained[0].label.startswith("start ")
    assert first.explained[0].position is None
    last = explainer.attribute(PROMPT, lxt.Target("end", kind="logprob"))
    assert last.explained[0].value == pytest.approx(float(end.log_softmax(-1).max()), rel=1e-5)
    ours = explainer.attribute(PROMPT, lambda logits: logits[:, 0, 4] + logits[:, 1, 5])
    assert_close(ours.relevance, both.relevance, 1e-9)


def test_an_answer_is_found_by_its_text(answering, tokenizer):
    explainer = Attributor(answering, tokenizer)
    text = "I have 5 cats and 3 dogs"
    ids = tokenizer(text)["input_ids"]
    place = ids.index(tokenizer(" cats", add_special_tokens=False)["input_ids"][0])
    out = explainer.attribute(text, "cats")
    expected = explainer.attribute(text, lxt.Target([place, place]))
    assert out.explained[0].value == expected.explained[0].value
    assert out.explained[0].label == "'cats'"
    with pytest.raises(ValueError, match="'love' is not in the prompt"):
        explainer.attribute(text, "love")
    with pytest.raises(ValueError, match="'cats' is 2 times in the prompt"):
        explainer.attribute("5 cats and 3 cats", "cats")


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (lxt.Target([5, 4]), ValueError, r"\[5, 4\] is no span of the prompt, which has tokens 0 to 6"),
        (lxt.Target([4, 7]), ValueError, "is no span"),
        (4, TypeError, "the target of question answering is None"),
        (lxt.Target([4, 5], kind="prob"), ValueError, "use 'logprob'"),
        (lxt.Target("start", position=1), ValueError, "its target has no contrast and no position"),
    ],
)
def test_answers_that_do_not_fit_are_named(target, error, message, answering):
    with pytest.raises(error, match=message):
        Attributor(answering).attribute(PROMPT, target)


# Pairs of texts


def test_what_a_tokenizer_returns_keeps_its_token_types():
    model = build("Bert", "SequenceClassification", zero_biases=False)
    encoded = {
        "input_ids": torch.tensor([[1, 40, 5, 41, 42], [1, 40, 5, 3, 3]]),
        "token_type_ids": torch.tensor([[0, 0, 0, 1, 1], [0, 0, 1, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
    }
    out = Attributor(model).attribute(encoded, target=1)
    logits = model(**encoded).logits
    assert [one.value for one in out.explained] == pytest.approx(logits[:, 1].tolist(), rel=1e-5)
    assert out.tokens[1] == ["", "", "1", "40", "5"]
    plain = Attributor(model).attribute([[1, 40, 5, 41, 42]], target=1)
    assert abs(plain.explained[0].value - out.explained[0].value) > 1e-3
    single = {name: values[0].tolist() for name, values in encoded.items()}
    again = Attributor(model).attribute(single, target=1)
    assert_close(again.relevance[0], out[0].relevance[0], 1e-6)
    with Float64():
        assert Attributor(model).attribute(encoded, target=1).check().ok


def test_a_target_keeps_token_types_in_step():
    row = Row((1, 2), types=(0, 1))
    assert row.extended([3, 4]).types == (0, 1, 1, 1)
    assert Row((1, 2)).extended([3]).types == ()


def test_questions_resolve_to_two_positions(answering):
    (row,), (goal,) = resolve(None, None, [Row(tuple(PROMPT))], answering)
    assert (goal.ids, goal.positions, goal.kind, goal.span) == ((), (0, 1), "logit", True)
    assert row.ids == tuple(PROMPT)
