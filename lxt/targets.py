"""What is explained: a token's logit or probability, a contrast, a sequence, a class, or any function of the logits.

1. `resolve` makes one `Goal` for each row out of what the user gave, before the forward: token ids, the positions
   whose logits are needed, and the tokens that a sequence target appends to the prompt.
2. `evaluate` reads the explained number of each row from the logits of these positions.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from numbers import Integral
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lxt.coefficients import wide
from lxt.inputs import Model, Row, task
from lxt.spans import best, wanted
from lxt.tokens import display

__all__ = ["Goal", "Kind", "Target", "evaluate", "name_of", "resolve"]

Kind = Literal["logit", "logprob", "prob", "centered"]
Token = int | str
Score = Callable[[Tensor], Tensor]
"""logits [batch, position, vocabulary] -> [batch], or a scalar that is the sum over the rows."""


@dataclass(frozen=True)
class Target:
    """What to explain about one row.

    >>> Target(" dogs", kind="centered", contrast=" cats").contrast
    ' cats'

    Attributes:
        token: a string, an id, or ids in sequence; a class index or label for classifiers; for question answering
            "start", "end", the answer's text, or its first and last position. None is what the model predicts.
        position: the position whose output is explained, among the row's own tokens; negative counts from the end.
            None is the last one, and the masked one for masked language models.
        kind: `logit`; `logprob`; `prob`; `centered`, the logit minus its mean over the vocabulary. None is `logit`
            for one token and `logprob` for several, whose log-probabilities are summed.
        contrast: what to subtract: a token, or several, whose mean is taken.
        function: in place of a token, any function of the logits [batch, 1, vocabulary] to [batch].
        rank: which of the model's predictions is explained where no token is given: 0 is the most probable one, 1 the
            runner-up.
    """

    token: Token | Sequence[int] | None = None
    position: int | None = None
    kind: Kind | None = None
    contrast: Token | Sequence[Token] | None = None
    function: Score | None = None
    rank: int = 0

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in get_args(Kind):
            raise ValueError(f"unknown kind {self.kind!r} of target; allowed: {', '.join(get_args(Kind))}")
        if self.function is not None and not (self.token is self.kind is self.contrast is None):
            raise ValueError("a target that is a function takes no token, kind or contrast: it computes them itself")
        if self.position is not None and (isinstance(self.position, bool) or not isinstance(self.position, Integral)):
            raise TypeError(f"a target's position must be a whole number, got {self.position!r}")
        if isinstance(self.rank, bool) or not isinstance(self.rank, Integral) or self.rank < 0:
            raise ValueError(f"a target's rank must be a whole number >= 0, got {self.rank!r}")
        if self.rank and not (self.token is self.function is None):
            raise ValueError("a rank chooses among the model's predictions: give it without a token and a function")


@dataclass(frozen=True)
class Goal:
    """A target, resolved against one prompt.

    Attributes:
        ids: the explained tokens or class; empty for what the model predicts.
        positions: where their logits are, among the row's tokens (the decoder's, for encoder-decoders).
        kind: as in Target, or `custom` for a function.
        contrast: ids whose mean is subtracted.
        function: the function of the logits, if it is one.
        span: the positions are an answer's start and end, and the ids tokens of the prompt (lxt.spans).
        rank: which prediction is meant where there are no ids, 0 being the first.
    """

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    kind: str
    contrast: tuple[int, ...] = ()
    function: Score | None = None
    span: bool = False
    rank: int = 0


def resolve(
    target: object, contrast: object, rows: Sequence[Row], model: Model, tokenizer: Any = None
) -> tuple[list[Row], list[Goal]]:
    """The goal of each row, and the rows with a sequence's tokens appended.

    Raises:
        TypeError: not a kind of target that there is.
        ValueError: the target does not fit the model, the tokenizer or the prompt.
    """
    resolver = _Resolver(model, tokenizer, task(model))
    extended, goals = [], []
    for one, row in zip(_one_each(target, contrast, len(rows)), rows, strict=True):
        row, goal = resolver.goal(one, row)
        extended.append(row)
        goals.append(goal)
    return extended, goals


def _one_each(target: object, contrast: object, count: int) -> list[Target]:
    if isinstance(target, (list, tuple)):
        if len(target) != count:
            raise ValueError(
                f"a list of targets needs one per prompt: {len(target)} targets for {count}; for several targets of a "
                "prompt use attribute_targets(), for a sequence of ids lxt.Target([...])"
            )
        if isinstance(contrast, (list, tuple)) and len(contrast) > 1:
            raise ValueError(
                "a list of targets with a list of contrasts can be read in two ways; give each target its own as "
                "[lxt.Target(token, contrast=foil), ...]"
            )
        return [_target(one, contrast) for one in target]
    return [_target(target, contrast)] * count


def _target(target: Any, contrast: Any) -> Target:
    if target is None or isinstance(target, str) or (isinstance(target, Integral) and not isinstance(target, bool)):
        return Target(target, contrast=contrast)  # type: ignore[arg-type]
    if isinstance(target, Target):
        if contrast is not None and target.contrast is not None:
            raise ValueError("the contrast is given twice, in the Target and as an argument; give it once")
        return target if contrast is None else replace(target, contrast=contrast)
    if callable(target):
        function: Any = target
        return Target(function=function, contrast=contrast)
    raise TypeError(
        f"a target must be None (the prediction), a string, an id, an lxt.Target, a function of the logits, or a list "
        f"with one of these per prompt; got {type(target).__name__}"
    )


@dataclass(frozen=True)
class _Resolver:
    model: Model
    tokenizer: Any
    task: str

    @property
    def classifies(self) -> bool:
        return self.task in ("sequence", "token", "image")

    def goal(self, target: Target, row: Row) -> tuple[Row, Goal]:
        if self.task == "question":
            return row, self.span(target, row)
        ids: tuple[int, ...] = self.ids(target.token, "target") if target.token is not None else ()
        given: Any = target.contrast
        contrast = given if isinstance(given, (list, tuple)) else [given]
        foils = tuple(self.single(foil, "contrast") for foil in contrast if foil is not None)
        masks = self.masks(target, row, ids) if self.task == "masked" and target.position is None else ()
        if len(ids) > 1 or len(masks) > 1:
            self.sequence_allowed(target, ids, foils, len(masks))
        same = set(ids) & set(foils)
        if same:
            name = repr(self.name(same.pop()))
            raise ValueError(f"the contrast {name} is the target itself, their difference is 0; give another token")
        if target.function is not None:
            kind = "custom"
        else:
            kind = target.kind or ("logprob" if max(len(ids), len(masks)) > 1 else "logit")
        if target.rank:
            self.rank_allowed(target.rank, len(masks))
        goal = Goal(ids, (), kind, foils, target.function, rank=target.rank)
        if self.task == "seq2seq":
            if target.position not in (None, 0):
                raise ValueError(
                    "a position is not supported for encoder-decoders: give the target as the string (or ids) that the "
                    "decoder is to continue with"
                )
            start = getattr(self.model.config, "decoder_start_token_id", None)
            if start is None:
                raise ValueError(
                    f"the configuration of {type(self.model).__name__} has no decoder_start_token_id, which its "
                    "decoder begins with; set model.config.decoder_start_token_id"
                )
            row = replace(row, decoder=(start, *ids[:-1]))
            return row, replace(goal, positions=tuple(range(max(len(ids), 1))))
        if masks:
            return row, replace(goal, positions=masks)
        first = self.position(target, row)
        return row.extended(ids[:-1]), replace(goal, positions=tuple(range(first, first + max(len(ids), 1))))

    def span(self, target: Target, row: Row) -> Goal:
        if target.contrast is not None or target.position is not None:
            raise ValueError(
                f"{type(self.model).__name__} answers by two positions of the prompt, so its target has no contrast "
                "and no position; give a function of its logits [batch, start or end, token] instead"
            )
        if target.rank:
            raise ValueError(
                f"{type(self.model).__name__} answers by two positions of the prompt, which have no common rank; give "
                "the answers themselves, as text or as lxt.Target([first, last])"
            )
        ids, positions = wanted(target.token, row, self.tokenizer)
        if target.kind == "prob" and len(positions) > 1:
            raise ValueError("kind='prob' is of a single token, and an answer has a start and an end; use 'logprob'")
        kind = "custom" if target.function is not None else target.kind or "logit"
        return Goal(ids, positions, kind, function=target.function, span=True)

    def rank_allowed(self, rank: int, masks: int) -> None:
        if masks > 1:
            raise ValueError(
                f"the prompt has {masks} masks, and a rank is of the predictions at one; say at which one: "
                "lxt.Target(position=..., rank=...)"
            )
        size = self.model.config.num_labels if self.classifies else _vocabulary(self.model)
        if rank >= size:
            what = "classes" if self.classifies else "tokens"
            raise ValueError(f"there is no prediction number {rank + 1}: {type(self.model).__name__} has {size} {what}")

    def sequence_allowed(self, target: Target, ids: tuple[int, ...], foils: tuple[int, ...], masks: int) -> None:
        if masks > 1 and not foils and target.kind in (None, "logprob"):
            return
        if masks > 1 and not ids:
            raise ValueError(
                f"the prompt has {masks} masks, explained together by their predictions' log-probability; for a "
                "contrast or another kind say which one: lxt.Target(token, position=...)"
            )
        reason = None
        if foils:
            reason = "a contrast compares single tokens"
        elif target.kind not in (None, "logprob"):
            reason = f"kind={target.kind!r} is of a single token"
        elif self.task not in ("causal", "seq2seq"):
            reason = f"{type(self.model).__name__} does not continue text"
        elif target.position is not None:
            reason = "a sequence continues the prompt, and has no other position"
        text = target.token if isinstance(target.token, str) else None
        if reason:
            raise ValueError(self.several(text, ids, "target", reason))
        better = self.one_token(text)
        if better is not None:
            warnings.warn(
                f"the target {text!r} is {len(ids)} tokens {self.names(ids)}, explained as a sequence; {better!r} is "
                "one token: is that what you mean?",
                stacklevel=5,  # the caller of attribute()
            )

    def several(self, text: str | None, ids: Sequence[int], role: str, reason: str) -> str:
        better = self.one_token(text)
        advice = f"{better!r} is one token" if better is not None else "give one of these tokens"
        return (
            f"the {role} {text!r} is {len(ids)} tokens {self.names(ids)} where one is needed ({reason}); {advice}, or "
            "explain the sequence's log-probability, without contrast"
        )

    def one_token(self, text: str | None) -> str | None:
        """The same word with (or without) a leading space, where only that is a single token."""
        if not text or self.tokenizer is None or self.classifies:
            return None
        other = text[1:] if text.startswith(" ") else f" {text}"
        return other if other and len(_encode(other, self.tokenizer)) == 1 else None

    def names(self, ids: Sequence[int]) -> str:
        return "(" + ", ".join(repr(self.name(token)) for token in ids) + ")"

    def name(self, token: int) -> str:
        return name_of(token, self.model, self.tokenizer)

    def single(self, token: Token, role: str) -> int:
        ids = self.ids(token, role)
        if len(ids) != 1:
            text = token if isinstance(token, str) else None
            raise ValueError(self.several(text, ids, role, "a contrast compares single tokens"))
        return ids[0]

    def ids(self, token: Any, role: str) -> tuple[int, ...]:
        if isinstance(token, str):
            return self.label(token, role) if self.classifies else self.text(token, role)
        given = token if isinstance(token, (list, tuple)) else (token,)
        if not given or not all(isinstance(i, Integral) and not isinstance(i, bool) for i in given):
            raise TypeError(f"the {role} must be a string, an id, or a sequence of ids; got {token!r}")
        size = self.model.config.num_labels if self.classifies else _vocabulary(self.model)
        for number in given:
            if not 0 <= number < size:
                what = "classes" if self.classifies else "token ids"
                raise ValueError(
                    f"the {role} {number} is out of range: {type(self.model).__name__} has {what} 0 to {size - 1}"
                )
        return tuple(int(number) for number in given)

    def label(self, name: str, role: str) -> tuple[int, ...]:
        classes = {str(label): int(index) for index, label in (self.model.config.id2label or {}).items()}
        if name not in classes:
            near = get_close_matches(name, classes, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"the {role} {name!r} is no class of {type(self.model).__name__}, which has {_few(classes)}{hint}"
            )
        return (classes[name],)

    def text(self, text: str, role: str) -> tuple[int, ...]:
        if not text:
            raise ValueError(f"the {role} is an empty string; give a token's text, or None")
        if self.tokenizer is None:
            raise ValueError(f"the {role} {text!r} needs a tokenizer: lxt.load(model, tokenizer); or give its id")
        ids = _encode(text, self.tokenizer)
        if not ids or (self.tokenizer.unk_token_id in ids and text != self.tokenizer.unk_token):
            raise ValueError(f"the {role} {text!r} is not in the tokenizer's vocabulary; give other text, or an id")
        return ids

    def position(self, target: Target, row: Row) -> int:
        if self.task in ("sequence", "image"):
            if target.position is not None:
                raise ValueError(f"{type(self.model).__name__} has one output for the whole prompt; leave position out")
            return 0
        if target.position is not None:
            if not -len(row) <= target.position < len(row):
                raise ValueError(
                    f"the target's position {target.position} is not in the prompt, which has {len(row)} tokens: "
                    f"allowed are {-len(row)} to {len(row) - 1}"
                )
            return target.position % len(row)
        if self.task == "token":
            raise ValueError(
                f"{type(self.model).__name__} has an output for every token; say which: lxt.Target(label, position=...)"
            )
        return len(row) - 1

    def masks(self, target: Target, row: Row, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Where the masks are: one for each token of the target; all of them where they are predicted."""
        mask = getattr(self.tokenizer, "mask_token_id", None)
        found = tuple(place for place, token in enumerate(row.ids) if token == mask) if row.embeds is None else ()
        if found and (not ids or len(found) in (1, len(ids))):
            return found
        token = getattr(self.tokenizer, "mask_token", None) or "the mask token"
        where = f" at positions {', '.join(map(str, found))}" if found else ""
        if len(ids) > 1:
            raise ValueError(
                f"the target is {len(ids)} tokens {self.names(ids)}, one for each mask, and the prompt has "
                f"{len(found)} masks{where}; write {token} {len(ids)} times"
            )
        raise ValueError(
            f"a masked language model is explained at its mask, and the prompt has {len(found)} of them{where}; write "
            f"{token} once, give as many target tokens as there are masks, or give lxt.Target(token, position=...)"
        )


def _few(names: Iterable[str], most: int = 12) -> str:
    """The first names, and how many there are."""
    known = [repr(name) for name in names]
    return ", ".join(known[:most]) + (f", … ({len(known)} in all)" if len(known) > most else "")


def _encode(text: str, tokenizer: Any) -> tuple[int, ...]:
    """The text's ids as they would continue a prompt."""
    if text.startswith(" ") and len(text) > 1:
        first = tokenizer("a", add_special_tokens=False)["input_ids"][:1]
        # Such a tokenizer puts a space before any text of its own accord: another one would be a token of its own.
        if first and str(tokenizer.convert_ids_to_tokens(first[0])).startswith("▁"):
            text = text[1:]
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _vocabulary(model: Model) -> int:
    weight = getattr(model.get_output_embeddings(), "weight", None)
    return weight.shape[0] if weight is not None else model.config.get_text_config().vocab_size


def name_of(token: int, model: Model, tokenizer: Any = None) -> str:
    """How a token, or a class, is called."""
    if task(model) in ("sequence", "token", "image"):
        return str((model.config.id2label or {}).get(token, token))
    return display([token], tokenizer)[0][0]


def evaluate(logits: Tensor, goals: Sequence[Goal]) -> tuple[Tensor, list[Goal]]:
    """The explained number of each row, [batch], and the goals with the predicted tokens filled in.

    Args:
        logits: [batch, K, vocabulary]; a row with fewer positions than K uses the first ones.
        goals: one per row.

    Raises:
        ValueError: the prediction is the contrast, or a function gave something else than one number per row.
    """
    logits = logits.to(wide(logits.dtype))
    function = goals[0].function
    alike = all(goal.function is function and len(goal.positions) == logits.shape[1] for goal in goals)
    if function is not None and alike:
        return _custom(function, logits), list(goals)
    values, filled = [], []
    for row, goal in enumerate(goals):
        if goal.function is not None:
            values.append(_custom(goal.function, logits[row : row + 1, : len(goal.positions)])[0])
            filled.append(goal)
            continue
        scores = logits[row, : len(goal.positions)]
        ids = goal.ids or (best(scores) if len(goal.positions) > 1 and goal.span else _ranked(scores, goal.rank))
        if set(ids) & set(goal.contrast):
            which = (
                f"the model's prediction number {goal.rank + 1}" if goal.rank else "the token that the model predicts"
            )
            raise ValueError(
                f"the contrast, id {ids[0]}, is {which}, and their difference is 0; give the "
                "target explicitly, or another contrast"
            )
        if goal.kind == "logprob":
            scores = scores.log_softmax(-1)
        elif goal.kind == "prob":
            scores = scores.softmax(-1)
        elif goal.kind == "centered":
            scores = scores - scores.mean(-1, keepdim=True)
        value = scores[range(len(ids)), list(ids)].sum()
        values.append(value - scores[0, list(goal.contrast)].mean() if goal.contrast else value)
        filled.append(replace(goal, ids=ids))
    return torch.stack(values), filled


def _ranked(scores: Tensor, rank: int) -> tuple[int, ...]:
    """At each position of [position, vocabulary] the token that is so many places behind the first."""
    first = scores.argmax(-1)
    if not rank:
        return tuple(first.tolist())
    order = scores.argsort(dim=-1, descending=True, stable=True)  # stable: equal logits have one order for all ranks
    rest = order[order != first[:, None]].view(len(scores), -1)
    return tuple(rest[:, rank - 1].tolist())


def _custom(function: Score, logits: Tensor) -> Tensor:
    try:
        values = function(logits)
        if isinstance(values, Tensor) and values.dim() == 0:
            # One number for several rows: ask row by row, so that each row's explained value is known.
            values = values[None] if len(logits) == 1 else torch.stack([function(row[None]) for row in logits])
    except IndexError as error:
        raise ValueError(
            f"the target function reads outside of its logits, whose shape is {list(logits.shape)} = [batch, position, "
            f"vocabulary] ({error}): they are those of the explained position alone, logits[:, -1]; choose another one "
            "by lxt.Target(function=..., position=...)"
        ) from error
    if not isinstance(values, Tensor) or values.shape != logits.shape[:1]:
        got = f"a tensor of shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"the target function got logits of shape {tuple(logits.shape)} and returned {got}; it must return "
            f"[{len(logits)}], one number per row, or a scalar"
        )
    if not values.requires_grad:
        raise ValueError("the target function's result does not depend differentiably on the logits")
    return values
