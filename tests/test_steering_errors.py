"""What can't be steered is refused, with what there is instead."""

import pytest
import torch
import transformers
from small import PROMPTS, llama
from steered import IDS, built, logits

import lxt
from lxt.attributor import Attributor
from lxt.steering import Ablate, Add, activations

VECTOR = torch.ones(32)


BAD = {
    "unknown latent": ({("neurons", 0, 1): 1.0}, ValueError, "'neurons' is no latent; did you mean 'neuron'"),
    "what can be steered": (
        {("haed", 1, 2): 0},
        ValueError,
        r"Steered can be residual, residual_pre, .*, neuron, each",
    ),
    "pattern": ({("pattern", 1): 0}, ValueError, "'pattern' can be read but not steered"),
    "path": ({"model.layers.1.mpl": 0}, ValueError, "did you mean 'model.layers.1.mlp'"),
    "path's vector": ({"model.layers.1.mlp.up_proj": VECTOR}, ValueError, "up_proj' has 48 numbers, .* for it 32"),
    "part of what is added": ({("attn_out", 1, 32): 0}, ValueError, "has the dimensions 0 to 31, and 32 is none"),
    "no key": ({"neuron": 1.0}, TypeError, r"\('residual', 6\)"),
    "no layer": ({("neuron",): 1.0}, TypeError, "named by"),
    "layer": ({("neuron", 3, 1): 1.0}, ValueError, "the model has the layers 0 to 2, and 3 is none"),
    "negative layer": ({("residual", -1): VECTOR}, ValueError, "layers 0 to 2, and -1 is none"),
    "head": ({("head", 0, 4): 0.0}, ValueError, r"\('head', 0, 4\): layer 0 has the heads 0 to 3, and 4 is none"),
    "neuron": ({("neuron", 1, (2, 48)): 0.0}, ValueError, "layer 1 has the neurons 0 to 47, and 48 is none"),
    "dimension": ({("residual", 1, 32): 0.0}, ValueError, "has the dimensions 0 to 31, and 32 is none"),
    "twice": ({("neuron", 1, (2, 2)): 0.0}, ValueError, "names no neuron, or one twice"),
    "not whole": ({("neuron", 1, 2.0): 0.0}, TypeError, "whole numbers"),
    "vector": ({("residual", 0): torch.ones(31)}, ValueError, r"\('residual', 0\) has 32 numbers, and .* 31"),
    "head's vector": ({("head", 0, 1): Add(VECTOR)}, ValueError, r"\('head', 0, 1\) has 8 numbers, and .* 32"),
    "matrix": ({("residual", 0): torch.ones(2, 32)}, ValueError, r"got the shape \(2, 32\)"),
    "nan": ({("neuron", 0, 1): float("nan")}, ValueError, "can't be steered by nan"),
    "inf": ({("residual", 0): VECTOR / 0}, ValueError, "NaN or inf"),
    "too large": ({("neuron", 0, 1): 1e39}, ValueError, "torch.float32, which can't hold 1e\\+39"),
    "no value": ({("neuron", 0, 1): "3"}, TypeError, "Set, Add, Scale or Ablate .* got str"),
    "flag": ({("neuron", 0, 1): True}, TypeError, "got bool"),
    "empty": ({}, TypeError, r"\{\('neuron', 7, 1234\): 3.0\}"),
}


def test_tokens_before_rows_are_not_taken_for_rows():
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 40}
    model = transformers.XLNetLMHeadModel(transformers.XLNetConfig(**sizes)).eval()
    rows = [IDS, list(reversed(IDS))]
    with Attributor(model).steer({("residual", 0): Add(1.0, positions=2)}):
        logits(model, rows[:1])  # the order of one row's is clear
        with pytest.raises(ValueError, match=r"\(7, 2, 32\) has not one place .* in this order.* one row at a time"):
            logits(model, rows)


@pytest.mark.parametrize(("changes", "error", "message"), BAD.values(), ids=BAD)
def test_bad_requests_are_refused_before_anything_runs(changes, error, message):
    with pytest.raises(error, match=message):
        Attributor(llama()).steer(changes)


def test_bad_interventions_are_refused():
    model = llama()
    explainer = Attributor(model)
    with pytest.raises(ValueError, match="take no step"):
        Add(1.0, positions=slice(0, 4, 2))
    with pytest.raises(ValueError, match="hold no token"):
        Add(1.0, positions=[])
    with pytest.raises(ValueError, match="hold no token"):
        Add(1.0, positions=slice(4, 4))
    with pytest.raises(TypeError, match="positions must be"):
        Add(1.0, positions="last")
    with pytest.raises(ValueError, match="Ablate to 'median' is unknown; allowed: zero, mean, resample"):
        Ablate("median")
    with pytest.raises(TypeError, match=r"needs reference=lxt\.steering\.activations"):
        Ablate("mean")
    reference = activations(explainer, PROMPTS, [("head", 1, 0)])
    with pytest.raises(ValueError, match="takes no reference"):
        Ablate("zero", reference)
    with pytest.raises(ValueError, match=r"the reference has no \('head', 1, 2\); it has \('head', 1, 0\)"):
        explainer.steer({("head", 1, 2): Ablate("mean", reference)})
    with pytest.raises(ValueError, match="'pattern' can be read but not steered"):
        activations(explainer, PROMPTS, ["pattern"])
    with pytest.raises(TypeError, match="latents must be a list"):
        activations(explainer, PROMPTS, "head")
    other = activations(Attributor(built("gemma3")), [IDS], [("neuron", 0)])
    with pytest.raises(ValueError, match="has 48 numbers, and the vector for it 40"):
        explainer.steer({("neuron", 0): Ablate("mean", other)})


def test_positions_that_no_row_has_are_refused():
    model = llama()
    explainer = Attributor(model)
    with (
        pytest.raises(ValueError, match=r"\('residual', 0\) was to be steered at position 7, .* longest row had 7"),
        explainer.steer({("residual", 0): Add(VECTOR, positions=7)}),
    ):
        logits(model, IDS)
    with (
        pytest.raises(ValueError, match="position -8 is before the beginning of a prompt of 7 tokens"),
        explainer.steer({("residual", 0): Add(VECTOR, positions=-8)}),
    ):
        logits(model, IDS)
    past = model(torch.tensor([IDS]), use_cache=True).past_key_values
    with (
        pytest.raises(ValueError, match="which the model read before it was steered"),
        explainer.steer({("residual", 0): Add(VECTOR, positions=-1)}),
    ):
        model(torch.tensor([[3]]), past_key_values=past)
    with explainer.steer({("residual", 0): Add(VECTOR, positions=70)}):
        pass  # nothing ran
    model.config.num_hidden_layers = 2  # of the three it has
    with (
        pytest.raises(ValueError, match=r"no forward of LlamaForCausalLM ran that layer \(LlamaDecoderLayer\)"),
        explainer.steer({("residual", 2): 0.0}),
    ):
        logits(model, IDS)


def test_what_an_architecture_lacks_is_named():
    message = r"'neuron' is not known for layer 0 of Qwen3MoeForCausalLM.* each of its experts .* Steer 'mlp_out'"
    with pytest.raises(ValueError, match=message):
        Attributor(built("qwen3_moe")).steer({("neuron", 0, 1): 0.0})
    with pytest.raises(ValueError, match=r"'head' is not known .* give the Attributor a PatchMap with the head path"):
        Attributor(llama(), patch_map=lxt.PatchMap(head="attention.out")).steer({("head", 0, 1): 0.0})
