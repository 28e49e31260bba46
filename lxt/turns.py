"""Several targets of one forward: which logits it computes, which backward explains which goals, and what that gives.

1. `places` are the positions whose logits the forward computes: for each row the union of its goals' positions.
2. Rows don't see each other, so the backward of a sum explains one goal of every row at once: `turns` deals them out.
3. `backward` is one of these; it may leave the graph for the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lxt import rules
from lxt.inputs import Row
from lxt.targets import Goal

__all__ = ["Turn", "backward", "places", "turns"]


@dataclass(frozen=True, eq=False)
class Turn:
    """What one backward explains: at most one goal of each row.

    Attributes:
        rows: [goal], which rows these are.
        columns: [goal, K], where the goal's logits are among the row's computed ones; fewer repeat their last one.
        goals: one for each of `rows`.
        alone: there is no other turn, so that the computed logits are just those that it reads.
    """

    rows: Tensor
    columns: Tensor
    goals: list[Goal]
    alone: bool

    def of(self, logits: Tensor) -> Tensor:
        """The goals' logits, [goal, K, vocabulary], out of all computed ones, [row, position, vocabulary]."""
        if self.alone:
            return logits
        return logits[self.rows.to(logits.device)[:, None], self.columns.to(logits.device)]


def turns(goals: Sequence[Sequence[Goal]]) -> list[Turn]:
    """The backwards that explain all goals: as many as the row with most goals has.

    Args:
        goals: at least one for each row.
    """
    known = [_positions(several) for several in goals]
    count = max(len(several) for several in goals)
    dealt = []
    for turn in range(count):
        rows = [row for row, several in enumerate(goals) if turn < len(several)]
        own = [goals[row][turn] for row in rows]
        columns = [[known[row].index(p) for p in goal.positions] for row, goal in zip(rows, own, strict=True)]
        width = max(len(line) for line in columns)
        columns = [line + line[-1:] * (width - len(line)) for line in columns]
        dealt.append(Turn(torch.tensor(rows), torch.tensor(columns), own, alone=count == 1))
    return dealt


def places(rows: Sequence[Row], goals: Sequence[Sequence[Goal]], kind: str) -> Tensor:
    """[row, position]: where in the padded batch the logits are that any goal reads, those of `turns` first.

    Rows with fewer than others compute further positions of theirs that nothing reads, as long as they have some, and
    then their last one again.

    Args:
        rows: the prompts.
        goals: those of each.
        kind: the model's task.
    """
    known = [_positions(several) for several in goals]
    width, count = max(len(row) for row in rows), max(map(len, known))
    where = []
    for row, own in zip(rows, known, strict=True):
        spare = [place for place in reversed(range(len(row))) if place not in own] if kind == "causal" else []
        own = [*own, *spare[: count - len(own)]]
        own += own[-1:] * (count - len(own))
        left = 0 if kind in ("seq2seq", "question") else width - len(row)
        where.append([left + place for place in own])
    return torch.tensor(where)


def _positions(goals: Sequence[Goal]) -> list[int]:
    return list(dict.fromkeys(place for goal in goals for place in goal.positions))


def backward(values: Tensor, leaves: Sequence[Tensor], again: bool) -> list[Tensor]:
    """The relevance of every leaf's tokens, [..., token] on the CPU, for the sum of `values`.

    Args:
        values: explained numbers, of one row each.
        leaves: [..., token, hidden], what is explained by.
        again: whether another backward through the same graph will follow.
    """
    gradients = torch.autograd.grad(values.sum(), leaves, retain_graph=again)
    return [rules.relevance(leaf.detach(), c).cpu() for leaf, c in zip(leaves, gradients, strict=True)]
