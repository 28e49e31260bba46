"""The k best windows of every neuron, in a total order, so that merging gives the same whatever came first.

Order: the higher score first, then the window with the lower number. A window competes once for each neuron, with the
token where the neuron's score is most extreme (the first of these), so no two candidates are equal in this order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Top", "merged", "top_of"]


@dataclass(frozen=True, eq=False)
class Top:
    """The best windows of every neuron, best first; fewer than k have window -1 and score 0 at the end.

    Attributes:
        score: [neuron, k], all above zero, or (for the negative ones) all below.
        window: [neuron, k], the windows' numbers.
        position: [neuron, k], where in the window, special tokens counted.
    """

    score: Tensor
    window: Tensor
    position: Tensor

    def cpu(self) -> Top:
        """The same on the CPU."""
        return Top(self.score.cpu(), self.window.cpu(), self.position.cpu())

    def tensors(self) -> dict[str, Tensor]:
        """By name."""
        return {"score": self.score, "window": self.window, "position": self.position}


def top_of(score: Tensor, position: Tensor, numbers: Sequence[int], k: int, sign: int) -> Top:
    """The best of some windows.

    Args:
        score: [window, neuron].
        position: [window, neuron].
        numbers: the windows', ascending.
        k: how many to keep.
        sign: 1 for the highest scores above zero, -1 for the lowest below.
    """
    window = torch.tensor(numbers, device=score.device).expand(score.shape[1], -1)
    return _best(score.T.contiguous(), window, position.T, k, sign)


def merged(one: Top, other: Top, k: int, sign: int) -> Top:
    """The best of both; which is first makes no difference."""
    window = torch.cat([one.window, other.window], 1)
    window, order = window.sort(dim=1, stable=True)
    score = torch.cat([one.score, other.score], 1).gather(1, order)
    position = torch.cat([one.position, other.position], 1).gather(1, order)
    return _best(score, window, position, k, sign)


def _best(score: Tensor, window: Tensor, position: Tensor, k: int, sign: int) -> Top:
    # Columns are in the windows' order, and a stable sort leaves equal scores in it.
    candidate = (score * sign > 0) & (window >= 0)
    key = torch.where(candidate, score * sign, -torch.inf)
    key, order = key.sort(dim=1, descending=True, stable=True)
    key, order = key[:, :k], order[:, :k]
    found = key > 0
    kept = Top(
        torch.where(found, key * sign, 0),
        torch.where(found, window.gather(1, order), -1),
        torch.where(found, position.gather(1, order), 0).to(torch.int32),
    )
    missing = k - kept.score.shape[1]
    if missing <= 0:
        return kept
    rows = kept.score.shape[0]
    return Top(
        torch.cat([kept.score, kept.score.new_zeros(rows, missing)], 1),
        torch.cat([kept.window, kept.window.new_full((rows, missing), -1)], 1),
        torch.cat([kept.position, kept.position.new_zeros(rows, missing)], 1),
    )
