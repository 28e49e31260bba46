"""Answers of question answering: where in the prompt the answer starts and where it ends.

Such a model gives two rows of logits over the prompt's tokens. Here they are the two explained positions, 0 for the
start and 1 for the end, over a vocabulary of tokens, so that the rest of lxt treats them as it treats any logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from lxt.inputs import Row

__all__ = ["best", "named", "stacked", "wanted"]

BOTH = (0, 1)


def stacked(output: Any) -> Tensor:
    """[batch, 2, token]: the logits of the start and of the end.

    Raises:
        ValueError: a head that searches for answers by itself, as XLNet's.
    """
    if getattr(output, "start_logits", None) is None:
        raise ValueError(
            f"the output, a {type(output).__name__}, has no start_logits and end_logits over the tokens; use "
            "lxt.monkey_patch(model) and a backward of your own"
        )
    return torch.stack([output.start_logits, output.end_logits], dim=1)


def wanted(token: object, row: Row, tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What a target means: the token positions, none where they are predicted; and which of start and end.

    Args:
        token: None for the predicted span, "start" or "end" for one of its ends, an answer's text, or its first and
            last position.
        row: the prompt.
        tokenizer: for an answer's text.

    Raises:
        ValueError: the answer is not in the prompt, or there more than once.
        TypeError: none of these.
    """
    if token is None:
        return (), BOTH
    if token in ("start", "end"):
        return (), (BOTH[token == "end"],)
    if isinstance(token, str):
        return _found(token, row, tokenizer), BOTH
    pair = isinstance(token, (list, tuple)) and len(token) == 2
    if not pair or not all(isinstance(i, Integral) and not isinstance(i, bool) for i in token):  # type: ignore[union-attr]
        raise TypeError(
            "the target of question answering is None (the predicted answer), 'start', 'end', the answer's text, or "
            f"lxt.Target([first, last]) with the positions of its tokens; got {token!r}"
        )
    first, last = (int(place) + (len(row) if place < 0 else 0) for place in token)  # type: ignore[union-attr]
    if not 0 <= first <= last < len(row):
        raise ValueError(f"the answer {list(token)!r} is no span of the prompt, which has tokens 0 to {len(row) - 1}")  # type: ignore[call-overload]
    return (first, last), BOTH


def _found(answer: str, row: Row, tokenizer: Any) -> tuple[int, int]:
    if tokenizer is None:
        raise ValueError(f"the answer {answer!r} needs a tokenizer; or give its positions: lxt.Target([first, last])")
    spellings = {tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (answer, f" {answer}")}
    places = {
        (start, start + len(ids) - 1)
        for ids in spellings
        for start in range(len(row.ids) - len(ids) + 1)
        if ids and row.ids[start : start + len(ids)] == ids
    }
    if len(places) != 1:
        where = (
            f"{len(places)} times in the prompt: {sorted(places)}" if places else "not in the prompt, token by token"
        )
        raise ValueError(
            f"the answer {answer!r} is {where}; give the positions of its tokens: lxt.Target([first, last]), or None "
            "for what the model answers"
        )
    return places.pop()


def best(scores: Tensor) -> tuple[int, int]:
    """The span with the largest sum of start and end, out of [2, token], the end not before the start."""
    sums = scores[0, :, None] + scores[1, None, :]
    ahead = torch.ones_like(sums, dtype=torch.bool).tril(-1)
    first, last = divmod(int(sums.masked_fill(ahead, -torch.inf).argmax()), scores.shape[1])
    return first, last


def named(ids: Sequence[int], tokens: Sequence[str]) -> str:
    """The text from the first to the last of these positions."""
    return "".join(tokens[ids[0] : ids[-1] + 1]).strip(" ") or tokens[ids[0]]
