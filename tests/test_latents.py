"""Latents: the relevance of layers, heads and neurons is their activation × gradient, and nothing is kept alive."""

import pytest
import torch
from models import checkpointed
from small import HEADS, LAYERS, PROMPTS, assert_close, by_hand, gpt2, llama
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from lxt.attributor import Attributor
from lxt.latents import Site, capture


def test_residual_latents_are_gradient_times_layer_output():
    model = llama()
    out = Attributor(model).attribute(PROMPTS[0], target=42, latents="residual")
    outputs = []

    def keep(module, args, output):
        output.retain_grad()
        outputs.append(output)

    handles = [layer.register_forward_hook(keep) for layer in model.model.layers]
    by_hand(model, PROMPTS[0], lambda logits: logits[0, -1, 42])
    for handle in handles:
        handle.remove()
    expected = torch.stack([(output.grad * output).sum(-1)[0] for output in outputs]).detach()
    assert_close(out.latents["residual"][:, 0], expected)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_heads_and_neurons_are_gradient_times_projection_input(build):
    model = build()
    out = Attributor(model).attribute(PROMPTS[0], target=42, latents=("head", "neuron"))
    layers = model.model.layers if build is llama else model.transformer.h
    inputs = {"head": [], "neuron": []}
    handles = []
    for layer in layers:
        head = layer.self_attn.o_proj if build is llama else layer.attn.c_proj
        neuron = layer.mlp.down_proj if build is llama else layer.mlp.c_proj
        for name, module in (("head", head), ("neuron", neuron)):

            def keep(module, args, name=name):
                args[0].retain_grad()
                inputs[name].append(args[0])

            handles.append(module.register_forward_pre_hook(keep))
    by_hand(model, PROMPTS[0], lambda logits: logits[0, -1, 42])
    for handle in handles:
        handle.remove()
    relevance = {name: torch.stack([(x.grad * x)[0] for x in xs]).detach() for name, xs in inputs.items()}
    assert out.latents["head"].shape == (LAYERS, 1, 5, HEADS)
    assert_close(out.latents["head"][:, 0], relevance["head"].unflatten(-1, (HEADS, -1)).sum(-1))
    assert_close(out.latents["neuron"][:, 0], relevance["neuron"])


def test_every_layer_conserves_under_cp():
    # No biases: all that remains is linear in the input, but LlamaRMSNorm rounds to float32 whatever the model's dtype.
    model = llama().double()
    out = Attributor(model, rules="cp").attribute(PROMPTS, latents=("residual", "head", "neuron"))
    values = torch.tensor([explained.value for explained in out.explained], dtype=torch.float64)
    torch.testing.assert_close(out.relevance.sum(-1), values, rtol=1e-6, atol=0)
    torch.testing.assert_close(out.latents["residual"].sum(-1), values.expand(LAYERS, 3), rtol=1e-6, atol=0)


def test_what_heads_and_neurons_add_is_what_the_residual_stream_gains():
    # The output projections are linear and have no bias, so what enters them leaves them.
    model = llama().double()
    out = Attributor(model, rules="cp").attribute(PROMPTS[0], target=42, latents=("residual", "head", "neuron"))
    parts = {}

    def keep(name):
        def hook(module, args, output):
            output = output[0] if isinstance(output, tuple) else output
            output.retain_grad()
            parts[name] = output

        return hook

    last = model.model.layers[-1]
    handles = [last.self_attn.register_forward_hook(keep("head")), last.mlp.register_forward_hook(keep("neuron"))]
    by_hand(model, PROMPTS[0], lambda logits: logits[0, -1, 42], "cp")
    for handle in handles:
        handle.remove()
    for name, part in parts.items():
        expected = (part.grad * part).sum(-1)[0].detach()
        torch.testing.assert_close(out.latents[name][-1, 0].sum(-1), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_checkpointing_gives_the_same_latents(build):
    model = build()
    if build is gpt2:
        for module in model.modules():  # off by the patch whatever the mode; the reference below is in eval()
            if isinstance(module, nn.Dropout):
                module.p = 0.1
    latents = ("residual", "head", "neuron")
    expected = Attributor(model).attribute(PROMPTS, latents=latents)
    checkpointed(model)
    model.train()
    out = Attributor(model).attribute(PROMPTS, latents=latents)
    assert torch.equal(out.relevance, expected.relevance)
    for name in latents:
        assert torch.equal(out.latents[name], expected.latents[name])
    assert model.training


@pytest.mark.parametrize("checkpointed", [True, False])
def test_taps_keep_no_activation_of_a_checkpointed_layer(checkpointed):
    inner, outer = nn.Linear(4, 4), nn.Linear(4, 4)
    x = torch.randn(1, 2, 4, requires_grad=True)
    activations = []

    def layer(x):
        hidden = x.tanh()
        activations.append(StorageWeakRef(hidden.untyped_storage()))
        return inner(hidden)

    with capture([Site("neuron", 0, inner, "input")], 1, 2) as sink:
        output = outer(checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x))
        assert activations[0].expired() is checkpointed  # without a checkpoint the graph holds it
        output.sum().backward()
    (gradient,) = torch.autograd.grad(outer(inner(x.tanh())).sum(), x)
    expected = x.tanh() * gradient / (1 - x.tanh() ** 2)
    torch.testing.assert_close(sink.stacked("neuron", torch.ones(1, 2, dtype=torch.bool)).values[0], expected.detach())


def test_a_second_backward_overwrites_and_padding_is_zero():
    layer = nn.Linear(4, 4)
    x = torch.randn(1, 3, 4, requires_grad=True)
    mask = torch.tensor([[False, True, True]])
    with capture([Site("residual", 0, layer)], 1, 3) as sink:
        y = layer(x)
        y.sum().backward(retain_graph=True)
        (2 * y).sum().backward()
    expected = 2 * y.detach().sum(-1)
    expected[0, 0] = 0
    torch.testing.assert_close(sink.stacked("residual", mask).values[0], expected)


def test_taps_leave_the_relevance_alone():
    explainer = Attributor(llama())
    plain = explainer.attribute(PROMPTS[0])
    assert torch.equal(plain.relevance, explainer.attribute(PROMPTS[0], latents="residual").relevance)


def test_shared_layers_are_refused():
    layer = nn.Linear(4, 4)
    x = torch.randn(1, 3, 4, requires_grad=True)
    with (
        capture([Site("residual", 0, layer)], 1, 3),
        pytest.raises(ValueError, match="runs more than once in a forward"),
    ):
        layer(layer(x)).sum().backward()


def test_a_write_into_what_was_read_is_an_error():
    """The relevance would be that of another activation."""
    layer = nn.Linear(4, 4)
    with capture([Site("residual", 0, layer)], 1, 3):
        y = layer(torch.randn(1, 3, 4, requires_grad=True))
        y.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
