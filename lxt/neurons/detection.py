"""How good a name is: whether it tells where the neuron matters from where it doesn't (detection scoring).

Half of a neuron's contexts, every other one, make its name. The other half, which the name has never seen, stand
against places drawn at random from the corpus: how well the name fits each of them gives the area under the ROC curve.
0.5 is chance, 1 a name that always tells. It says how well a name predicts the neuron's best contexts, not that the
neuron stands for nothing else.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence

__all__ = ["auroc", "fit_of_tokens", "fit_of_words", "held_out", "naming_part"]


def naming_part(count: int) -> list[int]:
    """Which of so many contexts, best first, make the name."""
    return list(range(0, count, 2))


def held_out(count: int) -> list[int]:
    """Which of so many contexts test the name."""
    return list(range(1, count, 2))


def fit_of_tokens(name: Mapping[int, float], tokens: Sequence[int]) -> float:
    """How well a name of distinctive tokens fits a context: the sum of their z, each counted once."""
    return sum(name[token] for token in sorted(set(tokens) & set(name)))


def fit_of_words(name: str, text: str) -> float:
    """How well a written name fits a context, for want of a better judge: the share of its words that occur there."""
    words = set(re.findall(r"\w+", name.casefold()))
    return len(words & set(re.findall(r"\w+", text.casefold()))) / max(len(words), 1)


def auroc(positive: Sequence[float], negative: Sequence[float]) -> float | None:
    """The probability that a positive scores above a negative, ties counting half; None where either is missing."""
    if not positive or not negative:
        return None
    ordered = sorted(negative)
    wins = sum(bisect_left(ordered, score) + bisect_right(ordered, score) for score in positive)
    return wins / (2 * len(positive) * len(negative))
