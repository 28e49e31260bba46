"""What the tests of steering share: models with their projections, prompts, and some changes."""

import torch
from models import EXAMPLES

from lxt.steering import Ablate, Add, Set

# By hand, and not from the patch maps: where heads and neurons end.
ENDS = {
    "llama": ("model.layers", "self_attn.o_proj", "mlp.down_proj"),
    "gemma3": ("model.layers", "self_attn.o_proj", "mlp.down_proj"),
    "phi3": ("model.layers", "self_attn.o_proj", "mlp.down_proj"),
    "gpt2": ("transformer.h", "attn.c_proj", "mlp.c_proj"),
    "gpt_neox": ("gpt_neox.layers", "attention.dense", "mlp.dense_4h_to_h"),
    "opt": ("model.decoder.layers", "self_attn.out_proj", "fc2"),
    "bert": ("bert.encoder.layer", "attention.output.dense", "output.dense"),
}


def built(name):
    torch.manual_seed(0)
    return EXAMPLES[name].build("eager").eval()


def projection(model, name, layer, kind):
    layers, head, neuron = ENDS[name]
    return model.get_submodule(f"{layers}.{layer}.{head if kind == 'head' else neuron}")


def columns_of(module):
    """The weights by which each number of the input goes on, [input, output], to be written to."""
    return module.weight.data if hasattr(module, "nx") else module.weight.data.T


def logits(model, ids, **arguments):
    with torch.no_grad():
        return model(torch.as_tensor(ids).view(len(ids) if isinstance(ids[0], list) else 1, -1), **arguments).logits


IDS = [1, 5, 6, 7, 8, 9, 3]


def padded(prompts, side="left"):
    width = max(map(len, prompts))
    blank = [[0] * (width - len(ids)) for ids in prompts]
    pairs = list(zip(blank, prompts, strict=True))
    ids = [b + p if side == "left" else p + b for b, p in pairs]
    mask = [[0] * len(b) + [1] * len(p) if side == "left" else [1] * len(p) + [0] * len(b) for b, p in pairs]
    return torch.tensor(ids), torch.tensor(mask)


SOME = {
    ("residual", 1): Add(torch.linspace(-2, 2, 32), positions=[1, 6]),
    ("neuron", 0, 5): Set(3.0, positions=-1),
    ("head", 2, 3): Ablate(positions=slice(2, None)),
}


def failing(model, layer):
    def fail(module, args, output):
        raise KeyError("mine")

    handle = layer.register_forward_hook(fail)
    try:
        model(torch.tensor([[1, 2, 3], [4, 5, 6]]))
    finally:
        handle.remove()
