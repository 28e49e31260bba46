"""generate() under the patch: the tokens of the unpatched model, and no graph kept."""

import gc

import pytest
import torch
import transformers.models.llama.modeling_llama as modeling_llama
from models import build
from small import t5

import lxt

PROMPT = torch.tensor([[3, 17, 4, 42], [5, 6, 7, 8]])
STRATEGIES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "beams that are sampled": {"do_sample": True, "num_beams": 2},
    "static cache": {"do_sample": False, "cache_implementation": "static", "disable_compile": True},
    "no cache": {"do_sample": False, "use_cache": False},
    "repetition penalty": {"do_sample": False, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "prefill in chunks": {"do_sample": False, "prefill_chunk_size": 2},
}


def generated(model, ids=PROMPT, **options):
    torch.manual_seed(0)
    mask = torch.ones_like(ids)
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=6, pad_token_id=0, return_dict_in_generate=True, **options
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2"])
def test_the_same_tokens(name, strategy):
    model = build(name, dtype=torch.float32)
    plain = generated(model, **STRATEGIES[strategy]).sequences
    with lxt.monkey_patch(model):
        assert torch.equal(generated(model, **STRATEGIES[strategy]).sequences, plain)
    assert torch.equal(generated(model, **STRATEGIES[strategy]).sequences, plain)


def of_graphs():
    gc.collect()
    return [x for x in gc.get_objects() if type(x) is torch.Tensor and x.grad_fn is not None]


def test_the_same_scores_and_no_graph():
    model = build("llama", dtype=torch.float32)
    options = {"do_sample": False, "output_scores": True, "output_hidden_states": True}
    plain = generated(model, **options)
    before = {id(x) for x in of_graphs()}
    with lxt.monkey_patch(model):
        patched = generated(model, **options)
        held = [x for x in of_graphs() if id(x) not in before]
    for unpatched, under_rules in zip(plain.scores, patched.scores, strict=True):
        assert torch.equal(unpatched, under_rules)
    assert not any(x.requires_grad for step in patched.hidden_states for x in step)
    assert not any(layer.keys.requires_grad for layer in patched.past_key_values.layers)
    assert held == []
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_under_a_module_patch():
    model = build("llama", dtype=torch.float32)
    plain = generated(model, do_sample=False).sequences
    with lxt.monkey_patch(modeling_llama):
        assert torch.equal(generated(model, do_sample=False).sequences, plain)


def test_an_encoder_decoder():
    model = t5()
    plain = generated(model, do_sample=False).sequences
    with lxt.monkey_patch(model):
        assert torch.equal(generated(model, do_sample=False).sequences, plain)


def test_assisted_by_a_model_that_is_not_patched():
    model, assistant = build("llama", dtype=torch.float32), build("llama", dtype=torch.float32)
    ids = PROMPT[:1]
    plain = generated(model, ids, do_sample=False).sequences
    with lxt.monkey_patch(model):
        assert torch.equal(generated(model, ids, do_sample=False, assistant_model=assistant).sequences, plain)


def test_what_was_generated_is_then_explained():
    model = build("llama", dtype=torch.float32)
    expected = lxt.load(model).attribute(PROMPT, target=[5, 9])
    with lxt.monkey_patch(model):
        generated(model, do_sample=False)
        assert torch.equal(lxt.load(model).attribute(PROMPT, target=[5, 9]).relevance, expected.relevance)
