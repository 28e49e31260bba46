"""What the passes gave, as one Attribution: rows in the order that was asked for, with their targets' names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lxt.attribution import Explained, Prediction
from lxt.inputs import Model, Row, task
from lxt.latents import joined as joined_latents
from lxt.passes import Result
from lxt.requesting import Request
from lxt.spans import named
from lxt.targets import Goal, name_of
from lxt.tokens import display

__all__ = ["Standing", "assembled", "explained", "prediction", "predictions", "standing", "standings"]

Standing = tuple[int, float]  # how many tokens are more probable than the explained one, and its probability


def assembled(
    request: Request,
    results: Sequence[Result],
    predicted: Sequence[Prediction],
    stands: Sequence[Standing | None],
    model: Model,
    tokenizer: Any,
) -> dict[str, Any]:
    """The fields of an Attribution that the passes decide.

    Args:
        request: what was asked for.
        results: those of its groups.
        predicted: for each goal of the results.
        stands: for each goal of the results.
        model: for the names of classes.
        tokenizer: for the names of tokens; may be None.
    """
    order = torch.tensor([place for group in request.groups for i in group for place in request.places[i]]).argsort()
    width = max(result.mask.shape[1] for result in results)

    as_given = order.tolist() == list(range(len(order)))

    def joined(parts: Sequence[Tensor], batch: int, token: int) -> Tensor:
        if len(parts) == 1 and as_given:  # the common case, without a copy: latents may fill the memory
            return parts[0]
        wide = [pad(part, [0, 0] * (part.dim() - 1 - token) + [width - part.shape[token], 0]) for part in parts]
        return torch.cat(wide, batch).index_select(batch, order)

    tokens = [[""] * (width - len(row)) + row for result in results for row in result.tokens]
    targets = [
        explained(goal, float(value), row, prefix, model, tokenizer, stand)
        for goal, value, row, prefix, stand in zip(
            [goal for result in results for goal in result.goals],
            torch.cat([result.values for result in results]),
            [request.rows[i] for group in request.groups for i in group for _ in request.goals[i]],
            [prefix for result in results for prefix in _each(result.prefix, len(result.goals))],
            stands,
            strict=True,
        )
    ]
    ids = [result.token_ids for result in results if result.token_ids is not None]
    return {
        "tokens": [tokens[i] for i in order.tolist()],
        "token_ids": joined(ids, 0, 1) if len(ids) == len(results) else None,
        "relevance": joined([result.relevance for result in results], 0, 1),
        "mask": joined([result.mask for result in results], 0, 1),
        "special": joined([result.special for result in results], 0, 1),
        "explained": [targets[i] for i in order.tolist()],
        "predictions": [predicted[i] for i in order.tolist()],
        "latents": {
            name: joined_latents([result.latents[name] for result in results], order, width)
            for keep in request.latents
            for name in keep.names
        },
    }


def _each(values: Tensor | None, count: int) -> Sequence[float | None]:
    return [None] * count if values is None else values.tolist()


def explained(
    goal: Goal,
    value: float,
    row: Row,
    prefix: float | None,
    model: Model,
    tokenizer: Any = None,
    stand: Standing | None = None,
) -> Explained:
    """What one row explains, with its name."""

    def names(ids: Sequence[int]) -> str:
        return ", ".join(repr(name_of(token, model, tokenizer)) for token in ids)

    if goal.function is not None:
        label = getattr(goal.function, "__name__", type(goal.function).__name__)
    elif goal.span:
        words = display(row.ids, tokenizer)[0] if row.embeds is None else list(map(str, range(len(row))))
        label = repr(named(goal.ids, words))
        label = label if len(goal.positions) > 1 else f"{'end' if 1 in goal.positions else 'start'} {label}"
    elif len(goal.ids) > 1 and tokenizer is not None:
        label = repr("".join(display(goal.ids, tokenizer)[0]))
    else:
        label = names(goal.ids)
    foils = names(goal.contrast)
    if foils:
        label += f" − {foils}" if len(goal.contrast) == 1 else f" − mean({foils})"
    positions = () if task(model) in ("sequence", "seq2seq", "image", "question") else goal.positions
    single = positions[0] if len(positions) == 1 else None
    return Explained(label, goal.kind, value, single, prefix, tuple(positions), *(stand or (None, None)))


def predictions(result: Result, model: Model, tokenizer: Any = None) -> list[Prediction]:
    """What the model predicts where each goal of a pass is explained."""
    spots = zip(result.spots.tolist(), result.tokens, strict=True)
    return [prediction(result.logits[row, column], model, tokenizer, tokens) for (row, column), tokens in spots]


def standings(result: Result) -> list[Standing | None]:
    """How what each goal of a pass explains stands among what could be predicted there."""
    both = zip(result.goals, result.spots.tolist(), strict=True)
    return [standing(goal, result.logits[row, column]) for goal, (row, column) in both]


def standing(goal: Goal, logits: Tensor) -> Standing | None:
    """The same for one goal, by the logits where it is explained, [vocabulary]; None where it is not one token."""
    if goal.function is not None or goal.span or len(goal.ids) != 1:
        return None
    own = goal.ids[0]
    return int((logits > logits[own]).sum()), float(logits.softmax(-1)[own])


def prediction(logits: Tensor, model: Model, tokenizer: Any = None, tokens: Sequence[str] = ()) -> Prediction:
    """What the model predicts by these logits, [vocabulary]; `tokens` are the prompt's, which answers are read from."""
    token = int(logits.argmax())
    name = tokens[token] if task(model) == "question" else name_of(token, model, tokenizer)
    return Prediction(name, token, float(logits[token]), float(logits.softmax(-1)[token]))
