"""What is asked of a model: prompts, the goals of each, and what runs together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lxt.checkpointing import Checkpoint
from lxt.inputs import Model, Row, batches, check
from lxt.latents import Keep
from lxt.targets import Goal, Target

__all__ = ["Request", "request_of", "targets_of"]


@dataclass(frozen=True, eq=False)
class Request:
    """What `attribute` was asked for, ready to run again: under other rules, or on the bare model.

    Attributes:
        rows: what the model reads: the prompts, with a sequence target's tokens appended.
        goals: one or several for each of the rows.
        groups: which rows run together.
        places: for each of the goals, which row of the result it is.
        latents: the wanted ones.
        checkpoint: how the layers are checkpointed.
    """

    rows: list[Row]
    goals: list[list[Goal]]
    groups: list[list[int]]
    places: list[list[int]]
    latents: tuple[Keep, ...] = ()
    checkpoint: Checkpoint = "off"


def request_of(
    rows: Sequence[Row],
    goals: Sequence[Goal],
    prompts: Sequence[int],
    model: Model,
    batch_size: int | None = None,
    latents: tuple[Keep, ...] = (),
) -> Request:
    """One row of the result for each goal; goals that need the same tokens of the same prompt share its forward.

    Args:
        rows: the prompt of each goal, with a sequence target's tokens appended.
        goals: what is explained.
        prompts: which prompt each of the rows is, ascending.
        model: decides which rows can run together.
        batch_size: how many rows run at once, at most.
        latents: the wanted ones.

    Raises:
        ValueError: a prompt is too long with its target.
    """
    longest: dict[int, Row] = {}
    shared: dict[tuple[Any, ...], list[int]] = {}
    for place, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        longest[prompt] = max(row, longest.get(prompt, row), key=len)
        shared.setdefault((prompt, row.ids, row.decoder), []).append(place)
    check(list(longest.values()), model, " with its target")
    places = list(shared.values())
    own = [rows[several[0]] for several in places]
    groups = batches(own, model, batch_size, square=not latents)
    return Request(own, [[goals[i] for i in several] for several in places], groups, places, latents)


def targets_of(targets: object, top: object, count: int) -> list[list[Any]]:
    """The targets of each of `count` prompts, as `Attributor.attribute_targets` takes them.

    Raises:
        TypeError: not a list of targets, or lists among targets.
        ValueError: none at all, or lists for another number of prompts.
    """
    if (targets is None) == (top is None):
        raise ValueError(
            "attribute_targets needs either targets, a list such as [' dogs', ' cats'], or top, how many of the most "
            f"probable tokens; got {'neither' if top is None else 'both'}"
        )
    if top is not None:
        if type(top) is not int or top < 1:
            raise ValueError(f"top must be a whole number >= 1, got {top!r}")
        return [[Target(rank=rank) for rank in range(top)] for _ in range(count)]
    given = targets.tolist() if isinstance(targets, Tensor) and not targets.dtype.is_floating_point else targets
    if not isinstance(given, (list, tuple)):
        raise TypeError(
            "targets must be a list of what attribute() takes as its target, or a list with such a list for each "
            f"prompt; got {type(targets).__name__}. For one target call attribute()"
        )
    nested = [isinstance(one, (list, tuple)) for one in given]
    if any(nested) and not all(nested):
        raise TypeError(
            "targets must be a list of targets for every prompt, or a list with one list of targets for each prompt, "
            "and not a mixture; a sequence of ids is lxt.Target([...])"
        )
    if nested and all(nested) and len(given) != count:
        raise ValueError(
            f"targets are {len(given)} lists for {count} prompt{'s' if count > 1 else ''}; give one list of targets "
            "for each prompt, or a single one for all of them; a sequence of ids is lxt.Target([...])"
        )
    lists = [list(one) for one in given] if nested and all(nested) else [list(given)] * count
    if not all(lists):
        raise ValueError("targets hold no target; give at least one for each prompt, or top=5 for the likeliest tokens")
    return lists
