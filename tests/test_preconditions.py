"""Models that no rule can reach are refused before anything is touched, with the next step."""

import pytest
import torch
from models import build, inputs_of
from relevances import relevance, state
from torch import nn

import lxt


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return torch.nn.functional.silu(self.linear(x)) * x


@torch.jit.script
def scripted_gate(x: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(x) * up


@torch.jit.script
def scripted_product(x: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return x * up


@torch.jit.script
def scripted_norm(x: torch.Tensor) -> torch.Tensor:
    return x / (x**2).mean(-1, keepdim=True)


def through_a_function(x):
    return scripted_gate(x, x)


class Calls(nn.Module):
    def forward(self, x):
        return scripted_gate(x, x)


class CallsThroughAFunction(nn.Module):
    def forward(self, x):
        return through_a_function(x)


class Multiplies(nn.Module):
    def forward(self, x):
        return scripted_product(x, x)


class Normalises(nn.Module):
    def forward(self, x):
        return scripted_norm(x)


@torch.jit.script
def scripted_positions(distance: torch.Tensor, middle: int) -> torch.Tensor:
    beyond = torch.log(distance.abs() / middle).ceil() * middle * torch.sign(distance)
    return torch.where(distance.abs() < middle, distance, beyond).long()


class AsksForPositions(nn.Module):
    def forward(self, x):
        return x[..., scripted_positions(torch.arange(4), 8)]


def test_a_torchscript_function_of_positions_is_fine():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), AsksForPositions())
    x = torch.randn(2, 4, requires_grad=True)
    with lxt.monkey_patch(model):
        y = model(x)[0, 2]
    assert float((torch.autograd.grad(y, x)[0] * x).sum()) == pytest.approx(float(y), rel=1e-5)


class Holds(nn.Module):
    def __init__(self):
        super().__init__()
        self.scripted_gate = scripted_gate

    def forward(self, x):
        return self.scripted_gate(x, x)


@pytest.mark.parametrize("cls", [Calls, CallsThroughAFunction, Holds, Multiplies, Normalises])
def test_a_torchscript_function(cls):
    with pytest.raises(ValueError, match=rf"{cls.__name__} calls 'scripted_\w+'.*PYTORCH_JIT=0"):
        lxt.monkey_patch(nn.Sequential(nn.Linear(4, 4), cls()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("to_script", [torch.jit.script, lambda block: torch.jit.trace(block, torch.zeros(1, 4))])
@pytest.mark.parametrize("place", ["whole", "part"])
def test_torchscript(to_script, place):
    scripted = to_script(Block())
    model = scripted if place == "whole" else nn.Sequential(nn.Linear(4, 4), scripted)
    with pytest.raises(ValueError, match=r"TorchScript.*patch the module that torch\.jit\.trace"):
        lxt.monkey_patch(model)


def test_data_parallel():
    model = build("llama", dtype=torch.float32)
    before = state(model)
    with pytest.raises(ValueError, match=r"the model is a DataParallel.*patch its \.module"):
        lxt.monkey_patch(nn.DataParallel(model))
    assert state(model) == before
    lxt.monkey_patch(model).remove()


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        model = build("llama", dtype=torch.float32)
    with pytest.raises(ValueError, match=r"parameter 'model.embed_tokens.weight' .* outside of inference_mode"):
        lxt.monkey_patch(model)


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_training_mode_and_frozen_weights_make_no_difference(trainable, training):
    expected_model = build("llama")
    with lxt.monkey_patch(expected_model):
        expected = relevance(expected_model)
    model = build("llama").requires_grad_(trainable).train(training)
    before = state(model)
    with lxt.monkey_patch(model):
        assert torch.equal(relevance(model), expected)
    assert state(model) == before


def test_logits_without_gradient_take_the_same_kernels():
    """Whether weights require grad decides how torch folds a slice into a matrix product: they keep it then."""
    model = build("llama", dtype=torch.float32)
    embeds = inputs_of("llama", torch.float32)["inputs_embeds"].repeat(2, 1, 1).detach()
    with torch.no_grad():
        plain = model(inputs_embeds=embeds, logits_to_keep=1).logits
        with lxt.monkey_patch(model):
            assert torch.equal(model(inputs_embeds=embeds, logits_to_keep=1).logits, plain)
