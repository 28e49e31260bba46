"""Narrowing: only explained positions reach the head, and nothing else changes."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lxt.narrow import narrowed

PLACES = torch.tensor([[1, 3], [2, 4]])


@pytest.fixture(params=["llama", "gpt2"])
def model(request):
    torch.manual_seed(0)
    if request.param == "gpt2":
        small = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 8}
        return GPT2LMHeadModel(GPT2Config(vocab_size=50, bos_token_id=0, eos_token_id=1, **small)).double().eval()
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, **small)).double().eval()


def embeds_of(model):
    return model.get_input_embeddings()(torch.arange(10).view(2, 5)).detach().requires_grad_()


def explained(logits):
    return logits[torch.arange(2)[:, None], PLACES]


def test_logits_and_gradients_are_those_of_the_whole_forward(model):
    embeds, seen = embeds_of(model), []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: seen.append(tuple(args[0].shape[:-1])))
    with narrowed(model.lm_head, PLACES) as finish:
        logits = finish(model(inputs_embeds=embeds).logits)
        (gradient,) = torch.autograd.grad(logits.sin().sum(), embeds)
    handle.remove()
    assert seen == [(4,)]
    full = explained(model(inputs_embeds=embeds).logits)
    assert logits.shape == (2, 2, 50)
    # LlamaRMSNorm computes in float32 whatever the model's dtype.
    torch.testing.assert_close(logits, full, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(gradient, torch.autograd.grad(full.sin().sum(), embeds)[0], rtol=1e-6, atol=1e-8)


def test_without_a_head_the_logits_are_selected_afterwards(model):
    embeds = embeds_of(model)
    with narrowed(None, PLACES) as finish:
        assert torch.equal(finish(model(inputs_embeds=embeds).logits), explained(model(inputs_embeds=embeds).logits))
        assert finish(torch.zeros(2, 3)).shape == (2, 1, 3)


def test_who_generates_meanwhile_gets_all_of_it(model):
    ids = torch.arange(10).view(2, 5)
    expected = model(ids).logits
    with narrowed(model.lm_head, PLACES), torch.no_grad():
        assert torch.equal(model(ids).logits, expected)


def test_the_model_is_as_it_was_afterwards(model):
    def fail():
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), narrowed(model.lm_head, PLACES):
        fail()
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
