"""A subject's model: tiny, seeded, in float64, with random weights and zero biases."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from lxt.coverage.shrink import shrunk
from lxt.coverage.sizes import Tiny, tiny_of
from lxt.coverage.subjects import Subject

__all__ = ["MOST_PARAMETERS", "built"]

MOST_PARAMETERS = 20_000_000  # more means that some width was not shrunk


def built(subject: Subject, biases: bool = False) -> Any:
    """The model in eval mode.

    Args:
        subject: what to build.
        biases: keep biases, at random values.

    Raises:
        ValueError: the tiny model is not tiny.
    """
    import transformers
    from transformers import CONFIG_MAPPING

    tiny = tiny_of(subject.type, subject.task)
    architecture = getattr(transformers, subject.architecture)
    # a class for one task may take a sub-configuration of the type's own
    config = shrunk(architecture.config_class or CONFIG_MAPPING[subject.type], tiny.config)
    torch.manual_seed(0)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in architecture(config).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"the tiny {subject.architecture} has {count / 1e6:.0f} million parameters")
    model = architecture(config)
    model = model.double().eval().requires_grad_(False)  # or embeddings would be no constants
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped_mm takes no float64
    _randomise(model, tiny, biases)
    if tiny.prepare is not None:
        with torch.no_grad():
            tiny.prepare(model)
    return model


@torch.no_grad()
def _randomise(model: nn.Module, tiny: Tiny, biases: bool) -> None:
    """Every weight at random, none at 0 or 1, which would hide mistakes; biases and running means at 0."""
    generator = torch.Generator().manual_seed(1)

    def normal(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)

    for name, parameter in model.named_parameters():
        last = name.rpartition(".")[2]
        if not parameter.is_floating_point() or any(kept in name for kept in (*_OWN_INITIALISATION, *tiny.weights)):
            continue
        if "bias" in last:
            parameter.copy_(normal(parameter) * 0.2 if biases else torch.zeros_like(parameter))
        elif parameter.dim() < 2:
            parameter.add_(normal(parameter) * 0.2)
        else:
            fan_in = parameter[0].numel() if "embed" not in name else 1
            parameter.copy_(normal(parameter) / math.sqrt(max(fan_in, 1)))
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.zero_()
        elif name.endswith("running_var"):
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator, dtype=buffer.dtype))


# Decay rates and time steps of recurrences, whose values have a meaning.
_OWN_INITIALISATION = ("A_log", "a_log", "time_decay", "time_first", "dt_proj", "recurrent_param", "inv_freq")
