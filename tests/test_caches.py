"""Caches: writing keys and values changes no relevance, and a past that comes without a graph is a constant.

Under a causal mask, what a later token is to the logit doesn't depend on where earlier keys came from. So the relevance
of new tokens after a past is, token for token, what they have in the one forward over everything.
"""

import pytest
import torch
from equations import Float64
from models import build
from small import assert_close
from torch import Tensor, nn
from transformers import DynamicCache, QuantizedCache, StaticCache

import lxt

IDS = [5, 6, 7, 8, 40, 41, 42, 9]
PAST = 5  # more than the sliding window of the small mistral
CLOSE = 1e-9  # float64, in another order where the cache is longer than the text


def dynamic(model):
    return DynamicCache(config=model.config)


def without_layers(model):
    return DynamicCache()


def static(model):
    return StaticCache(config=model.config, max_cache_len=16)


MODELS = ("llama", "mistral", "gemma3", "gpt2", "phi3")
over_models = pytest.mark.parametrize("name", MODELS)
over_caches = pytest.mark.parametrize("cache", [dynamic, without_layers, static])
over_rules = pytest.mark.parametrize("rules", ["attnlrp", "cp"])


def embedded(model: nn.Module, ids: list[int]) -> Tensor:
    return model.get_input_embeddings()(torch.tensor([ids])).detach().requires_grad_()


def forward(model: nn.Module, embeds: Tensor, **options: object) -> Tensor:
    with Float64():
        return model(inputs_embeds=embeds, **options).logits[0, -1, 7]


def relevance(model: nn.Module, ids: list[int], rules: str, **options: object) -> Tensor:
    embeds = embedded(model, ids)
    with lxt.monkey_patch(model, rules):
        forward(model, embeds, **options).backward()
    return (embeds * embeds.grad).detach().sum(-1)[0]


@over_models
@over_caches
@over_rules
def test_filling_a_cache_changes_nothing(name, cache, rules):
    model = build(name)
    expected = relevance(model, IDS, rules, use_cache=False)
    assert_close(relevance(model, IDS, rules, past_key_values=cache(model), use_cache=True), expected, CLOSE)
    assert_close(relevance(model, IDS, rules, use_cache=True), expected, CLOSE)


@over_models
@over_caches
@over_rules
def test_new_tokens_after_a_past_have_what_they_have_in_one_forward(name, cache, rules):
    model = build(name)
    expected = relevance(model, IDS, rules, use_cache=False)
    past = cache(model)
    with torch.no_grad(), Float64():
        model(input_ids=torch.tensor([IDS[:PAST]]), past_key_values=past, use_cache=True)
    found = relevance(model, IDS[PAST:], rules, past_key_values=past, use_cache=True)
    assert_close(found, expected[PAST:], CLOSE)


@pytest.mark.parametrize("cache", [dynamic, without_layers])  # torch refuses a backward through an overwritten one
@over_rules
def test_a_past_with_its_graph_is_explained_too(cache, rules):
    model = build("llama")
    expected = relevance(model, IDS, rules, use_cache=False)
    first, second, past = embedded(model, IDS[:PAST]), embedded(model, IDS[PAST:]), cache(model)
    with lxt.monkey_patch(model, rules):
        forward(model, first, past_key_values=past, use_cache=True)
        forward(model, second, past_key_values=past, use_cache=True).backward()
    found = torch.cat([(x * x.grad).detach().sum(-1)[0] for x in (first, second)])
    assert_close(found, expected, CLOSE)


def test_a_past_that_was_made_under_the_rules_without_gradient():
    model = build("llama")
    expected = relevance(model, IDS, "cp", use_cache=False)
    past = dynamic(model)
    with lxt.monkey_patch(model, "cp"):
        with torch.no_grad(), Float64():
            model(input_ids=torch.tensor([IDS[:PAST]]), past_key_values=past, use_cache=True)
        embeds = embedded(model, IDS[PAST:])
        forward(model, embeds, past_key_values=past, use_cache=True).backward()
    assert not any(layer.keys.requires_grad and layer.keys.is_leaf for layer in past.layers)
    assert_close((embeds * embeds.grad).detach().sum(-1)[0], expected[PAST:], CLOSE)


def quantised(model):
    pytest.importorskip("optimum.quanto", exc_type=ImportError)
    return QuantizedCache("quanto", config=model.config, q_group_size=16)


@over_rules
def test_a_quantised_cache(rules):
    """What it quantises is the past; the keys and values of the running forward are used as they are."""
    model = build("llama", dtype=torch.float32)
    expected = relevance(model, IDS, rules, use_cache=False)
    assert_close(relevance(model, IDS, rules, past_key_values=quantised(model), use_cache=True), expected, 1e-5)
    past = quantised(model)
    with torch.no_grad():
        model(input_ids=torch.tensor([IDS[:PAST]]), past_key_values=past, use_cache=True)
    found = relevance(model, IDS[PAST:], rules, past_key_values=past, use_cache=True)
    assert_close(found, expected[PAST:], 0.2)  # 4 bits; measured 5 % on GPT-2
