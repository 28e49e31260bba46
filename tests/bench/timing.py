"""For cpu.py: time of several methods in one process, interleaved, so that all meet the same machine.

1. A first round warms up, and says how many rounds the time allows.
2. In each round every method runs once; where a round begins changes from round to round.
3. A ratio is taken to the baseline of the same round; reported are its median, lowest and highest.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

__all__ = ["Case", "Timing", "interleaved", "median_seconds"]

# Makes ready outside of the clock what is then called inside it.
Case = Callable[[], AbstractContextManager[Callable[[], object]]]


@dataclass(frozen=True)
class Timing:
    """One method's rounds.

    Attributes:
        seconds: of each round.
        ratios: of each round, to the baseline's seconds in the same round.
    """

    name: str
    seconds: tuple[float, ...]
    ratios: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """The median over the rounds."""
        return statistics.median(self.ratios)

    @property
    def median(self) -> float:
        """Seconds, the median over the rounds."""
        return statistics.median(self.seconds)


def interleaved(
    cases: Mapping[str, Case],
    baseline: str,
    seconds: float,
    rounds: tuple[int, int] = (2, 9),
    clock: Callable[[], float] = time.perf_counter,
) -> list[Timing]:
    """Time the cases against the baseline, which is one of them.

    Args:
        cases: by name.
        baseline: the name that ratios are taken to.
        seconds: what all rounds together should take; the least number of rounds runs in any case.
        rounds: the least and the largest number of rounds.
        clock: gives seconds.
    """
    names = list(cases)
    start = clock()
    for name in names:
        _once(cases[name], clock)
    took = max(clock() - start, 1e-9)
    count = max(rounds[0], min(rounds[1], int((seconds - took) / took)))
    measured: dict[str, list[float]] = {name: [] for name in names}
    for number in range(count):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            measured[name].append(_once(cases[name], clock))
    return [
        Timing(
            name,
            tuple(measured[name]),
            tuple(mine / base for mine, base in zip(measured[name], measured[baseline], strict=True)),
        )
        for name in names
    ]


def median_seconds(run: Callable[[], float], times: int) -> tuple[float, float, float]:
    """Median, lowest and highest of what `run` says it took."""
    found = sorted(run() for _ in range(times))
    return statistics.median(found), found[0], found[-1]


def _once(case: Case, clock: Callable[[], float]) -> float:
    with case() as run:
        start = clock()
        run()
        return clock() - start
