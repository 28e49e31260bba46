"""What entries are made of: token ids and normally distributed numbers, the same each time, and zeroed constants."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["normal", "token_ids", "without"]


def token_ids(count: int, seed: int = 0) -> Tensor:
    """[1, count] ordinary tokens: special ones have ids above and below these."""
    return torch.randint(8, 72, (1, count), generator=torch.Generator().manual_seed(seed))


def normal(*shape: int, seed: int = 2) -> Tensor:
    """Normally distributed numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def without(*names: str) -> Callable[[nn.Module], None]:
    """Zeroes what adds a constant to the stream, as a bias does: computed positions, or the weights of a softmax.

    Args:
        names: how the names of the buffers and parameters end.
    """

    def prepare(model: nn.Module) -> None:
        for name, tensor in (*model.named_buffers(), *model.named_parameters()):
            if name.endswith(names):
                tensor.zero_()

    return prepare
