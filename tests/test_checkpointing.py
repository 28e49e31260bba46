"""Gradient checkpointing: what is recomputed is recomputed under the rules, or refused."""

from __future__ import annotations

import functools

import pytest
import torch
from models import DECODERS, EXAMPLES, build, checkpointed, inputs_of
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.llama import modeling_llama

import lxt

NON_REENTRANT = {"use_reentrant": False}


def eager_or_sdpa(name):
    return "eager" if name == "gemma2" else "sdpa"


def relevance(model, name="llama"):
    inputs = inputs_of(name, next(model.parameters()).dtype)
    EXAMPLES[name].logit(model(**inputs, **({} if name in ("bert", "vit") else {"use_cache": False})).logits).backward()
    return torch.cat([x.grad.flatten() for x in inputs.values()])


def layers_of(model):
    return [
        module
        for module in model.modules()
        if hasattr(type(module), "_gradient_checkpointing_func")
        or any(cls.__name__ == "GradientCheckpointingLayer" for cls in type(module).__mro__)
    ]


@pytest.fixture
def recomputed(monkeypatch):
    """Counts forwards of nn.Linear: a test that checkpoints nothing proves nothing."""
    calls = []
    plain = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *args: calls.append(1) or plain(*args))
    return calls


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@pytest.mark.parametrize("rules", ["attnlrp", "cp", "gradient"])
@pytest.mark.parametrize("name", [*DECODERS, "qwen3_moe", "bert", "vit", "t5"])
def test_same_relevance_in_train_and_in_eval(name, rules, dtype):
    model = build(name, eager_or_sdpa(name), dtype)
    layers = layers_of(model)
    assert len(layers) >= 2
    with lxt.monkey_patch(model, rules):
        plain = relevance(model, name)
        # T5's decoder layers add up their gradients of the encoder's output in another order when they are recomputed,
        # patched or not; everywhere else nothing may differ.
        atol = 4 * torch.finfo(dtype).eps * plain.abs().max().item() if name == "t5" else 0.0
        close = functools.partial(torch.allclose, rtol=0.0, atol=atol)
        checkpointed(model, NON_REENTRANT)
        assert torch.equal(relevance(model, name), plain)  # eval(): transformers checkpoints nothing
        forwards = []
        hook = layers[0].register_forward_hook(lambda *_: forwards.append(1))
        model.train()
        assert close(relevance(model, name), plain)
        model.eval()
        for layer in layers:
            layer.training = True
        assert close(relevance(model, name), plain)
        hook.remove()
    model.gradient_checkpointing_disable()
    for layer in layers:
        layer.training = False


@pytest.mark.parametrize("when", ["before patching", "after patching"])
def test_layers_are_recomputed_and_the_users_function_comes_back(when, recomputed):
    model = build("llama")
    plain_count = None
    with lxt.monkey_patch(model):
        plain = relevance(model)
        plain_count = len(recomputed)
    if when == "before patching":
        checkpointed(model.train(), NON_REENTRANT)
    with lxt.monkey_patch(model):
        if when == "after patching":
            checkpointed(model.train(), NON_REENTRANT)
        functions = [layer._gradient_checkpointing_func for layer in model.model.layers]
        recomputed.clear()
        assert torch.equal(relevance(model), plain)
        assert len(recomputed) == 2 * plain_count - 1  # all but lm_head
        assert functions == [layer._gradient_checkpointing_func for layer in model.model.layers]
    assert functions == [layer._gradient_checkpointing_func for layer in model.model.layers]


def test_under_a_module_patch():
    model = build("llama")
    with lxt.monkey_patch(modeling_llama, "cp"):
        plain = relevance(model)
        checkpointed(model.train(), NON_REENTRANT)
        assert torch.equal(relevance(model), plain)


def test_removed_between_forward_and_backward_is_an_error():
    # The layers are recomputed in the backward, and without the patch they would be recomputed by other operations.
    model = build("llama").train()
    checkpointed(model, NON_REENTRANT)
    inputs = inputs_of("llama")
    with lxt.monkey_patch(model):
        logits = model(**inputs, use_cache=False).logits
    with pytest.raises(RuntimeError):
        logits[0, -1, 5].backward()
    assert inputs["inputs_embeds"].grad is None


def test_backward_twice_through_a_checkpoint():
    model = build("llama").train()
    with lxt.monkey_patch(model):
        expected = relevance(model)
        checkpointed(model, NON_REENTRANT)
        inputs = inputs_of("llama")
        logits = model(**inputs, use_cache=False).logits[0, -1]
        for _ in range(2):
            (gradient,) = torch.autograd.grad(logits[5], inputs["inputs_embeds"], retain_graph=True)
            assert torch.equal(gradient.flatten(), expected)


def test_parameters_require_grad_and_get_none():
    model = build("llama").train()
    checkpointed(model, NON_REENTRANT)
    with lxt.monkey_patch(model):
        relevance(model)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


class Custom(nn.Module):
    """A user's model that checkpoints by itself."""

    def __init__(self, reentrant):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8)) for _ in range(3)
        )
        self.reentrant = reentrant

    def forward(self, x):
        for layer in self.layers:
            if self.reentrant is None:
                x = x + layer(x) * torch.tanh(x)
            else:
                x = checkpoint(lambda x, layer=layer: x + layer(x) * torch.tanh(x), x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("rules", ["attnlrp", "cp", "gradient"])
def test_raw_checkpoint_of_a_users_own_function_is_refused(rules):
    """Only modules enter the rules again when they are recomputed; a bare function would be silently wrong."""
    torch.manual_seed(0)
    model = Custom(reentrant=False).double()
    x = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    with lxt.monkey_patch(model, rules), pytest.raises(ValueError, match=r"'tanh' in Custom .* checkpointed"):
        model(x)


@pytest.mark.parametrize("rules", ["attnlrp", "cp"])
def test_raw_checkpoint_of_a_transformers_layer(rules):
    class Outer(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.checkpointed = inner, False

        def forward(self, x):
            rotary = self.inner.model.rotary_emb(x, torch.arange(x.shape[1])[None])
            for layer in self.inner.model.layers:
                if self.checkpointed:
                    x = checkpoint(layer, x, position_embeddings=rotary, use_reentrant=False)
                else:
                    x = layer(x, position_embeddings=rotary)
            return self.inner.lm_head(self.inner.model.norm(x))

    model, x = Outer(build("llama")), inputs_of("llama")["inputs_embeds"]
    with lxt.monkey_patch(model, rules):
        (plain,) = torch.autograd.grad(model(x)[0, -1, 5], x)
        model.checkpointed = True
        assert torch.equal(torch.autograd.grad(model(x)[0, -1, 5], x)[0], plain)


def test_reentrant_is_refused():
    message = "reentrant gradient checkpointing recomputes outside the rules and is silently wrong.*use_reentrant"
    model = build("llama").train()
    checkpointed(model, {"use_reentrant": True})
    functions = [layer._gradient_checkpointing_func for layer in model.model.layers]
    with lxt.monkey_patch(model):
        with pytest.raises(ValueError, match=message):
            relevance(model)
        assert functions == [layer._gradient_checkpointing_func for layer in model.model.layers]
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert not torch.overrides._get_current_function_mode_stack()
        model.eval()  # transformers checkpoints nothing then, but will once train() is called
        with torch.no_grad():
            model(**inputs_of("llama"))
    custom = Custom(reentrant=True)
    with lxt.monkey_patch(custom), pytest.raises(ValueError, match=message):
        custom(torch.randn(2, 8, requires_grad=True))


def test_reentrant_that_hides_behind_a_wrapper_is_refused():
    model = build("llama").train()

    def users_checkpoint(function, *args, **kwargs):
        return checkpoint(function, *args, use_reentrant=True, **kwargs)

    checkpointed(model, NON_REENTRANT)
    for layer in model.model.layers:
        layer._gradient_checkpointing_func = users_checkpoint
    with lxt.monkey_patch(model), pytest.raises(ValueError, match="reentrant"):
        relevance(model)
