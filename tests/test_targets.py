"""Targets: what was asked for becomes ids, positions and one number per row; what can't be is named."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from lxt.inputs import Row
from lxt.targets import Goal, Target, evaluate, name_of, resolve

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
WORDS = [" dogs", " cats", " is", "My", "[MASK]", "[UNK]"]
LABELS = {0: "sad", 1: "happy", 2: "angry"}


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level: the 256 bytes and a few words with their spaces, so that ' dogs' is one token and 'dogs' is four."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary, merges = [*alphabet], []
    for word in ("Ġdogs", "Ġcats", "Ġis", "My"):
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                merges.append((word[: end - 1], word[end - 1]))
                vocabulary.append(word[:end])
    core = Tokenizer(models.BPE({piece: i for i, piece in enumerate(vocabulary)}, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, mask_token="[MASK]")


def causal():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=300, bos_token_id=1, eos_token_id=2, **SMALL))


@pytest.fixture(scope="module")
def model():
    return causal()


@pytest.fixture(scope="module")
def classifier():
    return BertForSequenceClassification(BertConfig(vocab_size=300, id2label=LABELS, **SMALL))


PROMPT = Row((3, 4, 5))


def one(target, model, tokenizer=None, contrast=None, row=PROMPT):
    rows, goals = resolve(target, contrast, [row], model, tokenizer)
    return rows[0], goals[0]


def id_of(word, tokenizer):
    (token,) = tokenizer(word, add_special_tokens=False)["input_ids"]
    return token


def test_a_string_of_one_token(model, tokenizer):
    row, goal = one(" dogs", model, tokenizer)
    assert goal == Goal((id_of(" dogs", tokenizer),), (2,), "logit")
    assert row == Row((3, 4, 5))


def test_the_default_is_the_predicted_token(model):
    _, goal = one(None, model)
    logits = torch.randn(1, 1, 300)
    values, (filled,) = evaluate(logits, [goal])
    assert filled.ids == (int(logits.argmax()),)
    assert float(values) == float(logits.max())


def test_a_string_of_several_tokens_is_a_sequence_appended_as_ids(model, tokenizer):
    row, goal = one(" cats is", model, tokenizer)
    cats, more = id_of(" cats", tokenizer), id_of(" is", tokenizer)
    assert row.ids == (3, 4, 5, cats)
    assert goal == Goal((cats, more), (2, 3), "logprob")


def test_a_sequence_is_its_summed_log_probability():
    logits = torch.randn(1, 2, 10, dtype=torch.float64)
    values, _ = evaluate(logits, [Goal((4, 7), (0, 1), "logprob")])
    expected = logits.log_softmax(-1)
    torch.testing.assert_close(values[0], expected[0, 0, 4] + expected[0, 1, 7])


def test_ids_in_sequence(model):
    row, goal = one(Target([7, 8, 9]), model)
    assert row.ids == (3, 4, 5, 7, 8)
    assert goal == Goal((7, 8, 9), (2, 3, 4), "logprob")


@pytest.mark.parametrize("position", [1, -2])
def test_a_position_counts_from_either_end(model, position):
    assert one(Target(7, position=position), model)[1].positions == (1,)


def test_a_list_is_one_target_per_row(model, tokenizer):
    rows = [Row((3,)), Row((4, 5)), Row((6,))]
    _, goals = resolve([" dogs", 7, Target(8, kind="prob")], None, rows, model, tokenizer)
    assert [goal.ids for goal in goals] == [(id_of(" dogs", tokenizer),), (7,), (8,)]
    assert [goal.kind for goal in goals] == ["logit", "logit", "prob"]
    with pytest.raises(ValueError, match="2 targets for 3"):
        resolve([1, 2], None, rows, model)


def test_kinds():
    logits = torch.randn(1, 1, 10, dtype=torch.float64)
    expected = {
        "logit": logits[0, 0, 4],
        "logprob": logits[0, 0].log_softmax(-1)[4],
        "prob": logits[0, 0].softmax(-1)[4],
        "centered": logits[0, 0, 4] - logits[0, 0].mean(),
    }
    for kind, value in expected.items():
        torch.testing.assert_close(evaluate(logits, [Goal((4,), (0,), kind)])[0][0], value)


def test_contrast_is_the_mean_of_several(model, tokenizer):
    _, goal = one(" dogs", model, tokenizer, contrast=[" cats", 7])
    assert goal.contrast == (id_of(" cats", tokenizer), 7)
    logits = torch.randn(1, 1, 300, dtype=torch.float64)
    expected = logits[0, 0, goal.ids[0]] - logits[0, 0, list(goal.contrast)].mean()
    torch.testing.assert_close(evaluate(logits, [goal])[0][0], expected)


def test_rows_with_fewer_positions_use_their_first_ones():
    logits = torch.randn(2, 3, 10)
    values, _ = evaluate(logits, [Goal((1, 2, 3), (0, 1, 2), "logprob"), Goal((4,), (5,), "logit")])
    assert float(values[1]) == float(logits[1, 0, 4])


@pytest.mark.parametrize("function", [lambda x: x[:, 0, :3].sum(-1), lambda x: x[..., :3].sum()])
def test_functions_give_a_number_per_row(model, function):
    logits = torch.randn(2, 1, 300, requires_grad=True)
    rows, goals = resolve(function, None, [Row((3,)), Row((4,))], model)
    values, _ = evaluate(logits, goals)
    torch.testing.assert_close(values, logits[:, 0, :3].sum(-1))
    assert [goal.kind for goal in goals] == ["custom", "custom"]
    assert len(rows) == 2


def test_functions_and_tokens_may_be_mixed():
    logits = torch.randn(2, 1, 10, requires_grad=True)
    goals = [Goal((4,), (0,), "logit"), Goal((), (0,), "custom", function=lambda x: x[:, 0, 1])]
    values, _ = evaluate(logits, goals)
    assert values.tolist() == [logits[0, 0, 4].tolist(), logits[1, 0, 1].tolist()]


def test_classes_by_index_and_label(classifier):
    assert one("happy", classifier)[1] == Goal((1,), (0,), "logit")
    assert one(2, classifier, contrast="sad")[1] == Goal((2,), (0,), "logit", (0,))
    assert name_of(1, classifier) == "happy"


def test_token_classes_need_a_position():
    tagger = BertForTokenClassification(BertConfig(vocab_size=300, id2label=LABELS, **SMALL))
    assert one(Target("happy", position=1), tagger)[1] == Goal((1,), (1,), "logit")
    with pytest.raises(ValueError, match="an output for every token; say which"):
        one("happy", tagger)


def test_masked_models_are_explained_at_their_mask(tokenizer):
    masked = BertForMaskedLM(BertConfig(vocab_size=300, **SMALL))
    mask = tokenizer.mask_token_id
    assert one(" dogs", masked, tokenizer, row=Row((3, mask, 5)))[1].positions == (1,)
    assert one(Target(" dogs", position=0), masked, tokenizer)[1].positions == (0,)
    with pytest.raises(ValueError, match=r"the prompt has 0 of them; write \[MASK\] once"):
        one(" dogs", masked, tokenizer)
    with pytest.raises(ValueError, match="has 2 of them at positions 0, 2"):
        one(" dogs", masked, tokenizer, row=Row((mask, 3, mask)))
    with pytest.raises(ValueError, match="BertForMaskedLM does not continue text"):
        one("dogs", masked, tokenizer, row=Row((3, mask, 5)))


def test_encoder_decoders_continue_in_the_decoder():
    config = {"vocab_size": 300, "d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2}
    t5 = T5ForConditionalGeneration(T5Config(**config, decoder_start_token_id=0))
    row, goal = one(Target([7, 8]), t5)
    assert row == Row((3, 4, 5), decoder=(0, 7))
    assert goal.positions == (0, 1)
    with pytest.raises(ValueError, match="a position is not supported for encoder-decoders"):
        one(Target(7, position=1), t5)


# Bad targets


@pytest.mark.parametrize(
    ("target", "contrast", "message"),
    [
        ("", None, "the target is an empty string"),
        (300, None, "the target 300 is out of range: LlamaForCausalLM has token ids 0 to 299"),
        (-1, None, "the target -1 is out of range"),
        (" dogs", " dogs", "the contrast ' dogs' is the target itself"),
        (" dogs", [" cats", " dogs"], "the contrast ' dogs' is the target itself"),
        ("dogs", " cats", r"the target 'dogs' is 4 tokens \('d', 'o', 'g', 's'\) where one .* ' dogs' is one token"),
        (" dogs", "cats", r"the contrast 'cats' is 4 tokens \('c', 'a', 't', 's'\) where one .* ' cats' is one token"),
        (Target("dogs", kind="prob"), None, r"kind='prob' is of a single token"),
        (Target(" dogs is", position=1), None, "a sequence continues the prompt"),
        (Target(7, position=3), None, "position 3 is not in the prompt, which has 3 tokens: allowed are -3 to 2"),
        (Target(7, contrast=8), 9, "the contrast is given twice"),
        (lambda logits: logits, 9, "a target that is a function takes no token, kind or contrast"),
    ],
)
def test_bad_targets_are_named(model, tokenizer, target, contrast, message):
    with pytest.raises(ValueError, match=message):
        one(target, model, tokenizer, contrast)


@pytest.mark.parametrize("target", [1.5, True, {"a": 1}, Target([1.5]), Target(True)])
def test_other_kinds_of_target_are_refused(model, target):
    with pytest.raises(TypeError, match="must be"):
        one(target, model)


def test_target_checks_itself():
    with pytest.raises(ValueError, match="unknown kind 'logits' of target; allowed: logit, logprob, prob, centered"):
        Target(3, kind="logits")
    with pytest.raises(TypeError, match="position must be a whole number"):
        Target(3, position=1.0)


def test_a_missing_space_is_pointed_out(model, tokenizer):
    with pytest.warns(UserWarning, match="'dogs' is 4 tokens .* ' dogs' is one token"):
        one("dogs", model, tokenizer)


def test_unknown_labels_and_words(classifier, model):
    with pytest.raises(ValueError, match=r"'hapy' is no class .* 'sad', 'happy', 'angry'; did you mean 'happy'"):
        one("hapy", classifier)
    with pytest.raises(
        ValueError, match="the target 3 is out of range: BertForSequenceClassification has classes 0 to 2"
    ):
        one(3, classifier)
    with pytest.raises(ValueError, match="one output for the whole prompt"):
        one(Target(1, position=0), classifier)
    core = Tokenizer(models.WordLevel({"[UNK]": 0, "dogs": 1}, unk_token="[UNK]"))
    words = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")
    with pytest.raises(ValueError, match="'cows' is not in the tokenizer's vocabulary"):
        one("cows", model, words)
    with pytest.raises(ValueError, match="'dogs' needs a tokenizer"):
        one("dogs", model)


def test_sentencepiece_targets_ignore_the_space_that_the_tokenizer_adds(model):
    core = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁a", -1.0), ("▁dogs", -1.0), ("▁", -5.0)], unk_id=0))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    pieces = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    assert one(" dogs", model, pieces)[1].ids == one("dogs", model, pieces)[1].ids == (2,)


def test_predicting_the_contrast_is_an_error(model):
    logits = torch.zeros(1, 1, 300)
    logits[0, 0, 9] = 1
    with pytest.raises(ValueError, match="the contrast, id 9, is the token that the model predicts"):
        evaluate(logits, [one(None, model, contrast=9)[1]])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x[:, 0], r"shape \(2, 300\); it must return \[2\]"),
        (lambda x: 3.0, "returned float"),
        (lambda x: x[:, 0, 0].detach(), "does not depend differentiably on the logits"),
    ],
)
def test_functions_that_give_something_else(model, function, message):
    logits = torch.randn(2, 1, 300, requires_grad=True)
    _, goals = resolve(function, None, [Row((3,)), Row((4,))], model)
    with pytest.raises(ValueError, match=message):
        evaluate(logits, goals)
