"""Nothing but the patched model changes: other models, torch.nn and transformers stay what they are."""

from __future__ import annotations

import importlib

import pytest
import torch
import transformers.activations
from models import EXAMPLES, build
from relevances import relevance
from torch import nn
from transformers import modeling_utils
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.llama import modeling_llama
from transformers.models.qwen2 import modeling_qwen2

import lxt


def shared_by_all_models(modules):
    """Everything in torch.nn and transformers that a patch could reach, name -> object."""
    found = {}
    for module in (nn, nn.functional, torch, torch.Tensor, transformers.activations, modeling_utils, *modules):
        found |= {(module.__name__, key): value for key, value in vars(module).items()}
        for cls in list(vars(module).values()):
            if isinstance(cls, type) and issubclass(cls, nn.Module):
                found |= {(cls.__module__, cls.__qualname__, key): value for key, value in vars(cls).items()}
    found |= {("ACT2FN", key): value for key, value in dict.items(transformers.activations.ACT2FN)}
    functions = modeling_utils.ALL_ATTENTION_FUNCTIONS
    found |= {("ALL_ATTENTION_FUNCTIONS", key): functions[key] for key in functions}
    found |= {("ALL_ATTENTION_FUNCTIONS", "local"): dict(functions._local_mapping)}
    return found


def changed(before, after):
    # The annotations of classes are made when first asked for, which dataclasses and signatures do.
    lazy = ("__annotations__", "__annotations_cache__", "__static_attributes__", "__abstractmethods__", "_abc_impl")
    return {
        key
        for key in before.keys() | after.keys()
        if before.get(key) is not after.get(key) and key[-1] not in lazy and before.get(key) != after.get(key)
    }


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_instance_patch_changes_nothing_shared(name):
    model, other = build(name, "eager"), build(name, "eager")
    modeling = importlib.import_module(type(model).__module__)
    relevance(model, name)
    before, others = shared_by_all_models([modeling]), relevance(other, name)
    dicts = [(module, dict(module.__dict__)) for module in other.modules()]
    with lxt.monkey_patch(model):
        assert not changed(before, shared_by_all_models([modeling]))
        during = []
        inside = next(
            module for module in model.modules() if isinstance(module, nn.LayerNorm) or "Norm" in type(module).__name__
        )
        hook = inside.register_forward_hook(lambda *_: during.append(changed(before, shared_by_all_models([modeling]))))
        relevance(model, name)
        hook.remove()
        assert all(module.__dict__ == saved for module, saved in dicts)
        assert torch.equal(relevance(other, name), others)
    assert not changed(before, shared_by_all_models([modeling]))
    assert during
    assert not set().union(*during)


def test_a_module_patch_changes_the_forwards_of_its_own_model_classes_only():
    modules = [modeling_llama, modeling_qwen2, modeling_gpt2]
    model = build("llama")
    before = shared_by_all_models(modules)
    with lxt.monkey_patch(modeling_llama):
        relevance(model)
        changes = changed(before, shared_by_all_models(modules))
        assert {key[0] for key in changes} == {modeling_llama.__name__}
        assert {key[-1] for key in changes} <= {"forward", "__call__"}
        assert ("LlamaForCausalLM", "forward") in {key[1:] for key in changes}
    assert not changed(before, shared_by_all_models(modules))


def test_qwen2_keeps_its_gradient_while_llama_is_patched():
    # Upstream 2.1 patches torch.nn.Dropout and shared attention functions: this gradient changed by 30 %.
    qwen, gpt2 = build("qwen2"), build("gpt2")
    gradients = relevance(qwen, "qwen2"), relevance(gpt2, "gpt2")
    with lxt.monkey_patch(modeling_llama):
        relevance(build("llama"))
        assert torch.equal(relevance(qwen, "qwen2"), gradients[0])
        assert torch.equal(relevance(gpt2, "gpt2"), gradients[1])
        assert nn.Dropout(0.5)(torch.ones(1000)).eq(0).any()


def test_dropout_of_another_model_still_drops():
    model, other = build("gpt2"), build("gpt2").train()
    with lxt.monkey_patch(model):
        relevance(model, "gpt2")
        assert not torch.equal(relevance(other, "gpt2"), relevance(other, "gpt2"))


def test_an_unpatched_model_that_a_hook_of_the_patched_one_asks_runs_under_the_rules():
    # What runs inside the patched forward is part of what it computes.
    model, other = build("llama"), build("qwen2").requires_grad_(False)
    seen = []
    with lxt.monkey_patch(other, "cp"):
        expected = relevance(other, "qwen2")
    with lxt.monkey_patch(model, "cp"):
        hook = model.lm_head.register_forward_hook(lambda *_: seen.append(relevance(other, "qwen2")))
        relevance(model)
        hook.remove()
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=1e-5 * expected.abs().max().item())
