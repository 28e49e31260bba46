"""Prompts and pictures for the models that take special ones: single lines in the tables of `lxt.coverage.sizes`."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["normal"]


def normal(*shape: int, seed: int = 2) -> Tensor:
    """Normally distributed numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
