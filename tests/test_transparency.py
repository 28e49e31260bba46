"""A patched model is the model: the same logits, ids and outputs, whatever its parameters and flags are."""

from __future__ import annotations

import pytest
import torch
from models import DECODERS, EXAMPLES, build, inputs_of
from relevances import relevance
from torch import nn

import lxt

RULES = ("attnlrp", "cp", "gradient")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_logits_are_those_of_the_unpatched_model(name, attention, dtype):
    if (name, attention) == ("gemma2", "sdpa"):
        pytest.skip("Gemma2 softcaps its attention scores, which sdpa can't")
    model = build(name, attention, dtype)
    inputs = inputs_of(name, dtype)
    trainable = model(**inputs).logits
    model.requires_grad_(False)
    frozen = model(**inputs).logits
    model.requires_grad_(True)
    with torch.no_grad():
        without_gradient = model(**inputs).logits
    # T5's position bias is a parameter that sdpa gets as its mask. Where the mask requires grad torch takes its
    # unfused kernel, which rounds otherwise; under the patch parameters are constants and it takes the fused one.
    unfused = (name, attention) == ("t5", "sdpa")
    for rules in RULES:
        with lxt.monkey_patch(model, rules):
            patched = model(**inputs).logits
            with torch.no_grad():
                assert torch.equal(model(**inputs).logits, without_gradient)
        assert torch.equal(patched, frozen)
        assert torch.equal(patched, trainable) or unfused


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "bert", "t5"])
def test_gradient_rules_are_the_plain_gradient(name):
    model = build(name, "eager")
    plain = relevance(model, name)
    with lxt.monkey_patch(model, "gradient"):
        torch.testing.assert_close(relevance(model, name), plain, rtol=1e-6, atol=1e-7)  # norms: float32 inside


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "opt", "bert", "vit"])
def test_eager_and_sdpa_give_the_same_relevance(name):
    for rules in ("attnlrp", "cp"):
        eager, sdpa = build(name, "eager"), build(name, "sdpa")
        with lxt.monkey_patch(eager, rules), lxt.monkey_patch(sdpa, rules):
            first, second = relevance(eager, name), relevance(sdpa, name)
        # Eager attention takes its softmax in float32.
        torch.testing.assert_close(first, second, rtol=0, atol=1e-5 * second.abs().max().item())


@pytest.mark.parametrize("name", DECODERS)
def test_generate_gives_the_same_ids(name):
    model = build(name, "eager" if name == "gemma2" else "sdpa", torch.float32)
    ids = torch.tensor([[3, 17, 4, 42]])
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    plain = model.generate(ids, **options)
    for rules in RULES:
        with lxt.monkey_patch(model, rules):
            assert torch.equal(model.generate(ids, **options), plain)


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_parameters_are_constants_trainable_or_not(name, attention):
    if (name, attention) == ("gemma2", "sdpa"):
        pytest.skip("Gemma2 has no sdpa")
    model = build(name, attention)
    with lxt.monkey_patch(model):
        inputs = inputs_of(name)
        EXAMPLES[name].logit(model(**inputs).logits).backward()
        assert all(parameter.grad is None for parameter in model.parameters())
        trainable = [x.grad for x in inputs.values()]
        model.requires_grad_(False)
        inputs = inputs_of(name)
        EXAMPLES[name].logit(model(**inputs).logits).backward()
    for frozen, ours in zip(inputs.values(), trainable, strict=True):
        assert torch.equal(frozen.grad, ours)


@pytest.mark.parametrize("rules", RULES)
def test_backward_twice_on_one_graph(rules):
    llama = build("llama")

    def gradients(*targets):
        inputs = inputs_of("llama")["inputs_embeds"]
        logits = llama(inputs_embeds=inputs).logits[0, -1]
        return [torch.autograd.grad(logits[target], inputs, retain_graph=True)[0] for target in targets]

    with lxt.monkey_patch(llama, rules):
        first, second, again = gradients(5, 9, 5)
        assert torch.equal(first, again)
        assert torch.equal(second, gradients(9)[0])
        assert not torch.equal(first, second)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_dropout_is_inactive(name):
    model = build(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
        for key in ("attention_dropout", "dropout_prob"):
            if isinstance(getattr(module, key, None), float):
                setattr(module, key, 0.5)
    with lxt.monkey_patch(model):
        quiet = relevance(model, name)
        model.train()
        assert torch.equal(relevance(model, name), quiet)
    assert not torch.equal(relevance(model, name), relevance(model, name)), "nothing would have been dropped"


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_dropout_is_inactive_without_gradients(name):
    model = build(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.5
    with torch.no_grad():
        expected = model(**inputs_of(name)).logits
        with lxt.monkey_patch(model.train()):
            assert torch.equal(model(**inputs_of(name)).logits, expected)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "bert"])
def test_autocast_and_inference_mode(name):
    model = build(name, dtype=torch.float32).requires_grad_(False)
    inputs = inputs_of(name, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = model(**inputs).logits
    with torch.inference_mode():
        without = model(**inputs).logits
    for rules in RULES:
        with lxt.monkey_patch(model, rules):
            full = relevance(model, name)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert torch.equal(model(**inputs).logits, narrow)
                rounded = relevance(model, name)
            with torch.inference_mode():
                assert torch.equal(model(**inputs).logits, without)
        # bfloat16 keeps 8 bits: each of some ten matrix products in a row rounds by up to 2^-8.
        assert (rounded - full).norm() < 10 * 2**-8 * full.norm()


@pytest.mark.parametrize(
    "options",
    [{"return_dict": False}, {"output_hidden_states": True}, {"output_attentions": True}, {"use_cache": False}],
    ids=lambda options: next(iter(options)),
)
def test_what_else_the_model_returns_changes_nothing(options):
    model = build("llama", "eager")
    with lxt.monkey_patch(model, "cp"):
        assert torch.equal(relevance(model, **options), relevance(model))


def test_a_loss_is_explained_as_the_logits_it_is_made_of():
    model, labels = build("llama"), torch.tensor([[1, 2, 3, 4, 5, 6, 7]])
    with lxt.monkey_patch(model, "cp"):
        inside, outside = inputs_of("llama")["inputs_embeds"], inputs_of("llama")["inputs_embeds"]
        model(inputs_embeds=inside, labels=labels).loss.backward()
        logits = model(inputs_embeds=outside).logits[0, :-1]
        nn.functional.cross_entropy(logits, labels[0, 1:]).backward()
    # transformers takes the loss in float32.
    torch.testing.assert_close(inside.grad, outside.grad, rtol=0, atol=1e-6 * outside.grad.abs().max().item())
