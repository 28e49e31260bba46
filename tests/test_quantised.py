"""Quantised weights are constants: a model has the relevance that it has with the same weights written out.

Libraries that aren't installed are skipped; the stand-ins at the end run everywhere.
"""

import pytest
import torch
import torch.nn.functional as F
from quantisers import (
    WEIGHTS_ONLY,
    bitsandbytes_4bit,
    bitsandbytes_8bit,
    exchanged,
    is_quantised,
    quanto,
    torchao_4bit,
    torchao_8bit,
    torchao_8bit_activations,
)
from small import assert_close, by_hand, llama
from torch import Tensor, nn

import lxt
from lxt.composites import ATTN_LRP, Gamma

IDS = [0, 5, 6, 7, 8, 40, 41, 42]
# How far 8 and 4 bits move a model's relevance is the library's affair; measured 0.9996 and 0.91 to 0.98 at worst.
SIMILAR = {8: 0.995, 4: 0.85}


def a_model() -> nn.Module:
    """Wide enough for the group sizes of the quantisation libraries."""
    sizes = {"vocab_size": 60, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
    return llama(**sizes, initializer_range=0.08)


def written_out(quantised: nn.Module) -> nn.Module:
    """A plain model with the weights that the quantised one has: what its layers make of the identity matrix."""
    model = a_model()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            layer = quantised.get_submodule(name)
            with torch.no_grad():
                module.weight.copy_(layer(torch.eye(module.in_features, dtype=layer_dtype(quantised))).T)
    return model


def layer_dtype(model: nn.Module) -> torch.dtype:
    return model.get_input_embeddings().weight.dtype


def score(logits: Tensor) -> Tensor:
    return logits[0, -1, 7].float()


def relevance(model: nn.Module, rules: str = "attnlrp") -> Tensor:
    return by_hand(model, IDS, score, rules).float()


def value(model: nn.Module) -> float:
    with torch.no_grad():
        return float(score(model(input_ids=torch.tensor([IDS])).logits))


def similarity(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a, b, dim=0))


@pytest.mark.parametrize("rules", ["attnlrp", "cp"])
@pytest.mark.parametrize("name", WEIGHTS_ONLY)
def test_as_with_the_same_weights_written_out(name, rules):
    quantise, bits = WEIGHTS_ONLY[name]
    model = quantise(a_model())
    found = relevance(model, rules)
    assert_close(found, relevance(written_out(model), rules), 1e-5)
    assert similarity(found, relevance(a_model(), rules)) > SIMILAR[bits]
    if rules == "cp":  # no biases, and the softmax a constant: what it kept is nothing
        assert float(found.sum()) == pytest.approx(value(model), rel=1e-4)


@pytest.mark.parametrize("name", WEIGHTS_ONLY)
def test_in_bfloat16(name):
    quantise, bits = WEIGHTS_ONLY[name]
    found = relevance(quantise(a_model().to(torch.bfloat16)))
    assert found.isfinite().all()
    assert similarity(found, relevance(a_model())) > SIMILAR[bits]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitsandbytes_8bit_rounds_activations_too_which_count_as_unrounded(dtype):
    model = bitsandbytes_8bit(a_model().to(dtype))
    found = relevance(model, "cp")
    assert found.isfinite().all()
    assert similarity(found, relevance(a_model(), "cp")) > SIMILAR[8]
    assert float(found.sum()) == pytest.approx(value(model), rel=0.1)  # the rounding is not in the sum; measured 3 %


@pytest.mark.parametrize("name", WEIGHTS_ONLY)
def test_weights_stay_constants_and_the_attributor_works(name):
    quantise, _ = WEIGHTS_ONLY[name]
    model, other = quantise(a_model()), quantise(a_model())
    value(model)  # bitsandbytes packs its weights anew for forwards without gradient
    out = lxt.load(model).attribute([IDS], target=7)
    assert_close(out.relevance[0], relevance(other), 1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert out.check().ok


PROMPTS = ["I have 5 cats and 3 dogs. My cats love to play with my", "One day, a little girl named Lily found a"]
# Cosine between the tokens' relevance in the bundled model quantised and in bfloat16: tests/bench/quantised.py has all
# the figures. 4 bits are what they are, on 128 dimensions.
SAME_TOKENS = {8: 0.995, 4: 0.9}


@pytest.mark.parametrize("name", [*WEIGHTS_ONLY, "bitsandbytes 8"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_bundled_models_relevance_stays(name, prompt):
    quantise, bits = (WEIGHTS_ONLY | {"bitsandbytes 8": (bitsandbytes_8bit, 8)})[name]
    plain = lxt.load("tiny", dtype="bfloat16")
    expected = plain.attribute(prompt)
    found = lxt.load(quantise(lxt.load("tiny", dtype="bfloat16").model), plain.tokenizer).attribute(
        prompt, target=expected.predictions[0].id
    )
    assert found.relevance.isfinite().all()
    assert similarity(found.relevance[0], expected.relevance[0]) > SAME_TOKENS[bits]


def test_torchao_with_quantised_activations_is_refused():
    with pytest.raises(ValueError, match=r"lost its input's gradient.*quantise the weights only"):
        relevance(torchao_8bit_activations(a_model()))


@pytest.mark.parametrize("quantise", [bitsandbytes_8bit, bitsandbytes_4bit, torchao_8bit, torchao_4bit, quanto(8)])
def test_gamma_cannot_read_quantised_weights(quantise):
    model = quantise(a_model())
    with pytest.raises(ValueError, match=r"can't reach the quantised linear layers .* use linear=Epsilon\(\)"):
        relevance(model, ATTN_LRP.but(linear=Gamma(0.25)))


class Packed(Tensor):
    """A quantised weight as torchao has it: a tensor subclass that computes the layer by itself."""

    rounds_activations = False

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            with torch._C.DisableTorchFunctionSubclass():
                x = args[0].detach().round() if cls.rounds_activations else args[0]
                return F.linear(x, args[1].as_subclass(Tensor), *args[2:], **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


class Rounding(Packed):
    rounds_activations = True


class MatMul4Bit(torch.autograd.Function):
    """bitsandbytes' name for a linear layer that the mode never sees."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.saved_tensors[0], None


class InvisibleLinear(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.weight = linear.weight

    def forward(self, x):
        return MatMul4Bit.apply(x, self.weight)


def packed(model, cls=Packed):
    for name, module in model.named_modules():
        if is_quantised(module, name):
            module.weight = nn.Parameter(module.weight.detach().as_subclass(cls), requires_grad=False)
    return model


@pytest.mark.parametrize("rules", ["attnlrp", "cp"])
@pytest.mark.parametrize(
    "stand_in", [packed, lambda model: exchanged(model, InvisibleLinear)], ids=["class", "function"]
)
def test_stand_ins(stand_in, rules):
    model = stand_in(a_model())
    assert_close(relevance(model, rules), relevance(a_model(), rules), 1e-5)
    with pytest.raises(ValueError, match="can't reach the quantised linear layers"):
        relevance(model, ATTN_LRP.but(linear=Gamma(0.25)))


def test_a_stand_in_that_rounds_activations_is_refused():
    with pytest.raises(ValueError, match="lost its input's gradient"):
        relevance(packed(a_model(), Rounding))
