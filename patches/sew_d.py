"""SEW-D: DeBERTa's attention behind convolutions; its softmax is an autograd function of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from lxt.patches._forwards import rebound
from lxt.patchmap import PatchMap

__all__ = ["SEW_D"]


class _MaskedSoftmax:
    """In place of XSoftmax: the same numbers, with a backward that the operator mode sees."""

    @staticmethod
    def apply(input: Tensor, mask: Tensor, dim: int) -> Tensor:
        """Softmax over `dim` where `mask` isn't 0; 0 elsewhere."""
        hidden = ~mask.to(torch.bool)
        return torch.softmax(input.masked_fill(hidden, torch.finfo(input.dtype).min), dim).masked_fill(hidden, 0)


SEW_D = PatchMap(
    architectures=("sew-d",),
    forwards={"DisentangledSelfAttention": rebound(XSoftmax=lambda function: _MaskedSoftmax)},
    layers=("SEWDLayer",),
    head="attention.output.dense",
    neuron="output.dense",
)
