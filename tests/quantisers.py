"""Quantise a model's linear layers with the libraries that there are; what isn't installed is skipped."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

__all__ = [
    "WEIGHTS_ONLY",
    "bitsandbytes_4bit",
    "bitsandbytes_8bit",
    "exchanged",
    "is_quantised",
    "quanto",
    "torchao_4bit",
    "torchao_8bit",
    "torchao_8bit_activations",
]


def is_quantised(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and "lm_head" not in name


def exchanged(model: nn.Module, quantise: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    for name, module in list(model.named_modules()):
        if is_quantised(module, name):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, quantise(module))
    return model


def bitsandbytes_8bit(model: nn.Module) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes", exc_type=ImportError)

    def quantise(linear: nn.Linear) -> nn.Module:
        layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(linear.weight.data.clone(), has_fp16_weights=False, requires_grad=False)
        return layer.to("cpu")

    return exchanged(model, quantise)


def bitsandbytes_4bit(model: nn.Module) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes", exc_type=ImportError)

    def quantise(linear: nn.Linear) -> nn.Module:
        shape = linear.in_features, linear.out_features
        layer = bnb.nn.Linear4bit(*shape, bias=False, quant_type="nf4", compute_dtype=linear.weight.dtype)
        layer.weight = bnb.nn.Params4bit(linear.weight.data.clone(), requires_grad=False, quant_type="nf4")
        return layer.to("cpu")

    return exchanged(model, quantise)


def torchao(model: nn.Module, make_config: Callable) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization", exc_type=ImportError)
    quantization.quantize_(model, make_config(quantization), filter_fn=is_quantised)
    return model


def torchao_8bit(model: nn.Module) -> nn.Module:
    return torchao(model, lambda q: q.Int8WeightOnlyConfig())


def torchao_4bit(model: nn.Module) -> nn.Module:
    return torchao(model, lambda q: q.IntxWeightOnlyConfig(torch.int4, q.granularity.PerGroup(32)))


def torchao_8bit_activations(model: nn.Module) -> nn.Module:
    return torchao(model, lambda q: q.Int8DynamicActivationInt8WeightConfig())


def quanto(bits: int) -> Callable[[nn.Module], nn.Module]:
    def quantise(model: nn.Module) -> nn.Module:
        library = pytest.importorskip("optimum.quanto", exc_type=ImportError)
        library.quantize(model, weights={8: library.qint8, 4: library.qint4}[bits], exclude="lm_head")
        library.freeze(model)
        return model

    return quantise


# Name -> (how, bits).
WEIGHTS_ONLY = {
    "bitsandbytes 4": (bitsandbytes_4bit, 4),
    "torchao 8": (torchao_8bit, 8),
    "torchao 4": (torchao_4bit, 4),
    "quanto 8": (quanto(8), 8),
    "quanto 4": (quanto(4), 4),
}
