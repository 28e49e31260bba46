"""attribute(): equal to the gradient × input that one would write by hand, in batches, with latents, and tidy."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from small import (
    CLOSE,
    LAYERS,
    PROMPTS,
    TEXT,
    a_tokenizer,
    assert_close,
    bert,
    by_hand,
    gpt2,
    llama,
    opt,
    t5,
)
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaForSequenceClassification,
    ViTConfig,
    ViTModel,
)

import lxt
from lxt.attributor import Attributor, Request, _progress
from lxt.inputs import read
from lxt.patching import monkey_patch
from lxt.targets import resolve


@pytest.fixture(scope="module")
def tokenizer():
    return a_tokenizer()


CAUSAL = pytest.mark.parametrize("build", [llama, gpt2, opt])


# The numbers


@CAUSAL
@pytest.mark.parametrize("rules", ["attnlrp", "cp", "gradient"])
def test_equals_gradient_times_input_by_hand(build, rules):
    model = build().double()
    out = Attributor(model, rules=rules).attribute(PROMPTS[0], target=42)
    assert_close(out.relevance[0], by_hand(model, PROMPTS[0], lambda logits: logits[0, -1, 42], rules))
    assert out.explained[0].value == pytest.approx(
        model(torch.tensor([PROMPTS[0]])).logits[0, -1, 42].tolist(), rel=1e-4
    )


def test_the_default_target_is_the_prediction(tokenizer):
    model = llama()
    out = Attributor(model, tokenizer).attribute(TEXT)
    logits = model(torch.tensor([tokenizer(TEXT)["input_ids"]])).logits[0, -1]
    assert out.predictions[0].id == int(logits.argmax())
    assert out.predictions[0].logit == pytest.approx(logits.max().tolist(), rel=1e-5)
    assert out.predictions[0].probability == pytest.approx(logits.softmax(-1).max().tolist(), rel=1e-4)
    assert out.explained[0].label == repr(out.predictions[0].token)
    assert out.explained[0].value == out.predictions[0].logit
    assert out.tokens[0][0] == "<s>"
    assert "".join(out.tokens[0][1:]) == TEXT
    assert out.special[0].tolist() == [True] + [False] * (len(out.tokens[0]) - 1)


@CAUSAL
def test_a_batch_gives_what_single_calls_give(build):
    explainer = Attributor(build())
    targets = [42, None, lxt.Target([7, 8])]
    latents = ("residual", "head", "neuron")
    out = explainer.attribute(PROMPTS, targets, latents=latents)
    assert out.relevance.shape == (3, 8)  # the last row's target appends a token
    for row, (prompt, target) in enumerate(zip(PROMPTS, targets, strict=True)):
        single = explainer.attribute(prompt, target, latents=latents)
        assert_close(out[row].relevance, single.relevance)
        for name in latents:
            assert_close(out[row].latents[name], single.latents[name])
        assert out[row].tokens == single.tokens
        assert out.explained[row].value == pytest.approx(single.explained[0].value, rel=CLOSE)
        assert out.predictions[row].id == single.predictions[0].id


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_batch_size_changes_nothing_but_the_memory(size):
    explainer = Attributor(llama())
    expected = explainer.attribute(PROMPTS, latents="head")
    out = explainer.attribute(PROMPTS, latents="head", batch_size=size)
    assert out.tokens == expected.tokens
    assert torch.equal(out.token_ids, expected.token_ids)
    assert torch.equal(out.mask, expected.mask)
    assert_close(out.relevance, expected.relevance)
    assert_close(out.latents["head"], expected.latents["head"])
    assert [e.label for e in out.explained] == [e.label for e in expected.explained]


def test_one_backward_for_the_whole_batch(monkeypatch):
    calls = []
    real = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kw: calls.append(1) or real(*args, **kw))
    Attributor(llama()).attribute(PROMPTS)
    assert len(calls) == 1


def test_only_explained_positions_reach_the_head():
    model, seen = llama(), []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(args[0].shape))
    Attributor(model).attribute(PROMPTS)
    Attributor(model).attribute(PROMPTS[0], lxt.Target([7, 8, 9]))
    assert seen == [(3, 32), (3, 32)]


@pytest.mark.parametrize("rules", ["attnlrp", "cp"])
def test_contrast_is_the_difference_of_two_attributions(rules):
    explainer = Attributor(llama(), rules=rules)
    a, b, c = (explainer.attribute(PROMPTS[0], target).relevance for target in (42, 43, 44))
    # Linear in the coefficients that enter the backward; float32 rounding of differences of like numbers.
    assert_close(explainer.attribute(PROMPTS[0], 42, contrast=43).relevance, a - b, 1e-5)
    assert_close(explainer.attribute(PROMPTS[0], 42, contrast=[43, 44]).relevance, a - (b + c) / 2, 1e-5)


def test_a_sequence_is_its_summed_log_probability(tokenizer):
    model = llama()
    out = Attributor(model, tokenizer).attribute("My cats", target=" love to play")
    words = tokenizer(" love to play", add_special_tokens=False)["input_ids"]
    assert len(words) > 2
    prompt = tokenizer("My cats")["input_ids"]
    ids = prompt + words[:-1]
    assert out.token_ids[0].tolist() == ids
    assert out.explained[0].kind == "logprob"
    assert out.explained[0].label == "' love to play'"
    table = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    value = sum(table[len(prompt) - 1 + step, word] for step, word in enumerate(words))
    assert out.explained[0].value == pytest.approx(value.tolist(), rel=1e-5)

    def score(logits):
        return sum(logits[0, len(prompt) - 1 + step].log_softmax(-1)[word] for step, word in enumerate(words))

    assert_close(out.relevance[0], by_hand(model, ids, score))


@pytest.mark.parametrize("kind", ["logit", "logprob", "prob", "centered"])
def test_kinds_and_positions(kind):
    model = llama()
    scores = {
        "logit": lambda x: x[7],
        "logprob": lambda x: x.log_softmax(-1)[7],
        "prob": lambda x: x.softmax(-1)[7],
        "centered": lambda x: x[7] - x.mean(),
    }
    out = Attributor(model).attribute(PROMPTS[0], lxt.Target(7, position=-2, kind=kind))
    assert out.explained[0].position == 3
    assert out.explained[0].kind == kind
    assert_close(out.relevance[0], by_hand(model, PROMPTS[0], lambda logits: scores[kind](logits[0, 3])), 1e-5)
    assert out.relevance[0, 4] == 0  # a causal model has not read it yet


def test_functions_of_the_logits():
    def first_ten(logits):
        return logits[:, 0, :10].sum(-1)

    model = llama()
    out = Attributor(model).attribute(PROMPTS[0], first_ten)
    assert out.explained[0].label == "first_ten"
    assert out.explained[0].kind == "custom"
    assert_close(out.relevance[0], by_hand(model, PROMPTS[0], lambda logits: logits[0, -1, :10].sum()))


def test_embeddings_give_what_their_ids_give():
    model = llama()
    embeds = model.get_input_embeddings()(torch.tensor(PROMPTS[0]))
    out = Attributor(model).attribute(embeds, target=42)
    assert out.token_ids is None
    assert out.tokens == [["0", "1", "2", "3", "4"]]
    assert torch.equal(out.relevance, Attributor(model).attribute(PROMPTS[0], target=42).relevance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_follows_float32(dtype):
    model = llama()
    expected = Attributor(model).attribute(PROMPTS, target=42, latents="head")
    out = Attributor(model.to(dtype)).attribute(PROMPTS, target=42, latents="head")
    assert out.relevance.dtype == torch.float32
    # Three layers of about ten roundings each, at random; measured 2.1 eps (bfloat16) and 2.2 eps (float16).
    assert_close(out.relevance, expected.relevance, 4 * torch.finfo(dtype).eps)
    assert_close(out.latents["head"], expected.latents["head"], 4 * torch.finfo(dtype).eps)


def test_threads_on_one_model_take_turns():
    model = llama()
    explainers = [Attributor(model, rules=rules) for rules in ("attnlrp", "cp")]
    serial = [explainer.attribute(PROMPTS).relevance for explainer in explainers]
    with ThreadPoolExecutor(4) as pool:
        runs = list(pool.map(lambda i: explainers[i % 2].attribute(PROMPTS).relevance, range(12)))
    assert all(torch.equal(run, serial[i % 2]) for i, run in enumerate(runs))


def test_no_grad_and_inference_mode_outside_do_not_matter():
    explainer = Attributor(llama())
    expected = explainer.attribute(PROMPTS[0]).relevance
    for outside in (torch.no_grad, torch.inference_mode):
        with outside():
            assert torch.equal(explainer.attribute(PROMPTS[0]).relevance, expected)


@CAUSAL
def test_the_auditor_agrees_on_the_same_request(build):
    explainer = Attributor(build().double())
    rows, goals = resolve([lxt.Target([7, 8]), None, 9], None, read(PROMPTS, explainer.model), explainer.model)
    request = Request(rows, [[goal] for goal in goals], groups=[[1, 0], [2]], places=[[0], [1], [2]])
    for result, (relevance, unknown) in zip(explainer.results(request), explainer.audited(request), strict=True):
        assert_close(result.relevance, relevance)
        assert not unknown


# Classifiers, masked models, encoder-decoders


@pytest.mark.parametrize("padding", [None, 2])
def test_a_causal_classifier_reads_the_last_token(padding):
    model = llama(LlamaForSequenceClassification, num_labels=3, pad_token_id=padding).double()
    out = Attributor(model).attribute(PROMPTS, target="LABEL_2")
    for row, prompt in enumerate(PROMPTS):
        value = model(torch.tensor([prompt])).logits[0, 2]
        assert out.explained[row].value == pytest.approx(value.tolist(), rel=1e-4)
        assert_close(out[row].relevance[0], by_hand(model, prompt, lambda logits: logits[0, 2]))
    assert out.explained[0].label == "'LABEL_2'"
    assert out.explained[0].position is None


def test_an_encoder_classifier_needs_no_padding():
    model = bert(BertForSequenceClassification, num_labels=3).double()
    prompts = [*PROMPTS, [1, 7, 7]]
    out = Attributor(model).attribute(prompts, latents="residual")
    for row, prompt in enumerate(prompts):
        predicted = int(model(torch.tensor([prompt])).logits[0].argmax())
        assert out.predictions[row].id == predicted
        assert_close(out[row].relevance[0], by_hand(model, prompt, lambda logits, i=predicted: logits[0, i]))
    assert out.latents["residual"].shape == (LAYERS, 4, 7)


def test_a_token_classifier():
    model = bert(BertForTokenClassification, num_labels=3)
    out = Attributor(model).attribute(PROMPTS[0], lxt.Target(1, position=2))
    assert_close(out.relevance[0], by_hand(model, PROMPTS[0], lambda logits: logits[0, 2, 1]))


def test_a_masked_model_at_its_mask(tokenizer):
    model = bert(BertForMaskedLM)
    out = Attributor(model, tokenizer).attribute("My[MASK] love")
    ids = tokenizer("My[MASK] love")["input_ids"]
    place = ids.index(tokenizer.mask_token_id)
    assert out.explained[0].position == place
    best = int(model(torch.tensor([ids])).logits[0, place].argmax())
    assert_close(out.relevance[0], by_hand(model, ids, lambda logits: logits[0, place, best]))


def test_an_encoder_decoder_is_explained_by_its_source():
    model = t5()
    explainer = Attributor(model)
    out = explainer.attribute(PROMPTS, target=[lxt.Target([7, 8])] * 3, latents="residual")
    assert out.relevance.shape == (3, 7)
    assert out.latents["residual"].shape == (LAYERS, 3, 7)
    for row, prompt in enumerate(PROMPTS):
        embeds = model.get_input_embeddings()(torch.tensor([prompt])).detach().requires_grad_()
        prefix = model.get_input_embeddings()(torch.tensor([[0, 7]])).detach().requires_grad_()
        with monkey_patch(model):
            logits = model(inputs_embeds=embeds, decoder_inputs_embeds=prefix).logits
            (logits[0, 0].log_softmax(-1)[7] + logits[0, 1].log_softmax(-1)[8]).backward()
        assert_close(out[row].relevance[0], (embeds.grad * embeds.detach()).sum(-1)[0])
        assert out.explained[row].prefix == pytest.approx(float((prefix.grad * prefix.detach()).sum()), rel=1e-4)


# The model stays what it was


def state(model):
    modules = [
        (name, type(m), set(m.__dict__), m.training, len(m._forward_hooks), len(m._forward_pre_hooks))
        for name, m in model.named_modules()
    ]
    parameters = [(name, p.requires_grad, p.grad is None, p.clone()) for name, p in model.named_parameters()]
    return modules, parameters


def assert_same(before, after):
    assert before[0] == after[0]
    for (name, *flags, value), (other, *other_flags, now) in zip(before[1], after[1], strict=True):
        assert (name, flags) == (other, other_flags)
        assert torch.equal(value, now)


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was(training):
    model = llama().train(training)
    model.model.norm.weight.requires_grad_(False)
    before = state(model)
    ids = torch.tensor([PROMPTS[0]])
    logits = model(ids).logits
    Attributor(model).attribute(PROMPTS, latents=("residual", "head", "neuron"))
    assert_same(before, state(model))
    assert torch.equal(model(ids).logits, logits)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("when", ["forward", "target", "backward"])
def test_the_model_is_left_as_it_was_after_an_error(error, when):
    model = llama()
    before = state(model)

    def fails(*args):
        raise error("on purpose")

    def fails_later(logits):
        value = logits[:, 0, 0]
        value.register_hook(fails)
        return value * 1

    handle = model.model.norm.register_forward_hook(fails) if when == "forward" else None
    target = {"forward": None, "target": fails, "backward": fails_later}[when]
    with pytest.raises(error, match="on purpose"):
        Attributor(model).attribute(PROMPTS, target, latents=("residual", "neuron"))
    if handle is not None:
        handle.remove()
    assert_same(before, state(model))


def test_a_model_that_is_already_patched():
    model = llama()
    expected = Attributor(model, rules="cp").attribute(PROMPTS[0]).relevance
    with monkey_patch(model, "cp") as handle:
        assert torch.equal(Attributor(model, rules="cp").attribute(PROMPTS[0]).relevance, expected)
        assert handle.active
        with pytest.raises(
            ValueError, match="already patched with the rules 'cp', and this Attributor's are 'attnlrp'"
        ):
            Attributor(model).attribute(PROMPTS[0])
        assert handle.active


# Bad input, from the outside


def test_bad_models_are_named():
    with pytest.raises(TypeError, match="an Attributor needs a transformers model instance, got str"):
        Attributor("tiny")
    with pytest.raises(ValueError, match="LlamaModel has no head"):
        Attributor(llama().model)
    with pytest.raises(ValueError, match="unknown rules 'lrp'"):
        Attributor(llama(), rules="lrp")
    with pytest.raises(ValueError, match="ViTModel takes no inputs_embeds"):
        Attributor(ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)))
    with torch.device("meta"):
        empty = llama()
    with pytest.raises(ValueError, match=r"parameter 'model\.embed_tokens\.weight' is on the meta device"):
        Attributor(empty)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(number):
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = number
    before = state(model)
    with pytest.raises(
        ValueError, match=r"logits .* not finite: the weight model\.layers\.1\.mlp\.up_proj\.weight holds"
    ):
        Attributor(model).attribute(PROMPTS[0])
    assert before[0] == state(model)[0]


def test_too_long_with_its_target():
    with pytest.raises(ValueError, match=r"the prompt with its target has 65 tokens, and the context .* is 64"):
        Attributor(llama()).attribute(list(range(2, 62)), lxt.Target([7] * 6))


def test_a_contrast_that_is_predicted():
    explainer = Attributor(llama())
    best = explainer.attribute(PROMPTS[0]).predictions[0].id
    with pytest.raises(ValueError, match="is the token that the model predicts"):
        explainer.attribute(PROMPTS[0], contrast=best)


def test_progress_is_silent_without_a_terminal(capsys):
    with _progress(5) as advance:
        advance()
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
