"""Made-up inputs: token ids and normally distributed numbers, the same each time."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["normal", "token_ids"]


def token_ids(count: int, seed: int = 0) -> Tensor:
    """[1, count] ordinary tokens: special ones have ids above and below these."""
    return torch.randint(8, 72, (1, count), generator=torch.Generator().manual_seed(seed))


def normal(*shape: int, seed: int = 2) -> Tensor:
    """Normally distributed numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
