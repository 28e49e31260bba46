"""Rows prepared for display: scores, shares of the colour scale, the ranking and the facts that every view states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lxt.show.words import amount, listed, percent, shorten

if TYPE_CHECKING:
    from lxt.attribution import Attribution, Explained, Prediction

__all__ = ["Row", "binned", "column_width", "rescaled", "rows", "unit"]

_NAMED = 6  # explained positions that are named
_UNITS = {"logprob": "log-probability", "prob": "probability", "centered": "centred logit", "custom": "value"}


@dataclass(frozen=True)
class Row:
    """One row, without padding, as the views draw it.

    Attributes:
        places: the number of each token in its row; gaps where special tokens are left out.
        fractions: score / scale; 0 for special tokens that are not coloured.
        muted: special tokens that are not coloured.
        scale: the score that has the full colour.
        asked: which of `tokens` the explained prediction is made at, where it isn't simply the last one.
        layers: [layer, token], from the embeddings up, or None.
        layer_names: of the rows of `layers`.
    """

    number: int
    tokens: list[str]
    places: list[int]
    scores: list[float]
    fractions: list[float]
    special: list[bool]
    muted: list[bool]
    scale: float
    asked: list[int]
    layers: Tensor | None
    layer_names: list[str]
    explained: Explained
    prediction: Prediction | None
    total: float
    apart: float | None
    model: str
    rules: str

    def ranked(self, top: int) -> list[int]:
        """Indices of the `top` most relevant tokens, strongest first; without what has no colour or no score."""
        candidates = [i for i, muted in enumerate(self.muted) if not muted and self.scores[i] != 0]
        return sorted(candidates, key=lambda i: -abs(self.scores[i]))[:top]

    @property
    def origin(self) -> str:
        """The model and the rules."""
        return f"{shorten(self.model)}, {shorten(self.rules)}"

    @property
    def target(self) -> str:
        """What is explained, e.g. `' dogs'`."""
        return shorten(self.explained.label, 80)

    @property
    def value(self) -> str:
        """The explained number with its unit, e.g. `logit 14.02`."""
        return f"{unit(self.explained.kind)} {amount(self.explained.value, 4)}"

    @property
    def facts(self) -> str:
        """The same with the explained token's standing, e.g. `logit 9.110 (choice 2, probability 1.31 %)`."""
        return f"{self.value} ({self.standing})" if self.standing else self.value

    @property
    def predicted(self) -> str | None:
        """The predicted token with its logit and probability, and how the explained one stands beside it."""
        if self.prediction is None:
            return None
        logit, probability = amount(self.prediction.logit, 4), percent(self.prediction.probability)
        line = f"'{shorten(self.prediction.token)}'  logit {logit}, probability {probability}"
        return f"{line}; explained is {self.standing}" if self.explained.rank else line

    @property
    def standing(self) -> str | None:
        """How probable the explained token is, e.g. `choice 2, probability 1.31 %`."""
        if self.explained.rank is None or self.explained.probability is None:
            return None
        return f"choice {self.explained.rank + 1:,}, probability {percent(self.explained.probability)}"

    @property
    def places_asked(self) -> str | None:
        """Where the explained prediction is made, where it isn't simply at the last token."""
        if not self.asked:
            return None
        # the word before each number keeps it from being set right to left with the token before
        each = (f"token {self.places[i]} {listed(self.tokens[i], 16, note=False)}" for i in self.asked[:_NAMED])
        more = f" and {len(self.asked) - _NAMED} more" if len(self.asked) > _NAMED else ""
        return f"explained at {', '.join(each)}{more}"

    @property
    def conserved(self) -> str:
        """The conservation line, e.g. `Σ relevance 14.02 of logit 14.02 (100 %)`."""
        line = f"Σ relevance {amount(self.total, 4)} of {self.value}"
        total = self.total
        if self.explained.prefix is not None:
            total += self.explained.prefix
            line = f"Σ relevance {amount(self.total, 4)} + {amount(self.explained.prefix)} of the decoder's own tokens"
            line += f" of {self.value}"
        if self.explained.value == 0:
            return line
        ratio = total / self.explained.value  # of a log-probability near 0 it can be anything
        rest = "" if abs(ratio - 1) < 0.005 else "; check() says why"
        return f"{line} ({percent(ratio) if abs(ratio) < 10 else f'{amount(ratio)} times'}{rest})"

    @property
    def note(self) -> str | None:
        """What the uncoloured special tokens hold, where they hold something."""
        if not self.apart:
            return None
        return f"special tokens hold {amount(self.apart)} of it and are not coloured"


def unit(kind: str) -> str:
    """The name of a target kind as a unit."""
    return _UNITS.get(kind, kind)


def rows(attribution: Attribution, special: bool = True, scale_special: bool = False) -> Iterator[Row]:
    """The rows to draw; options as in `Attribution.show`."""
    for number in range(len(attribution)):
        yield _row(attribution, number, special, scale_special)


def _row(attribution: Attribution, number: int, special: bool, scale_special: bool) -> Row:
    real, marked = attribution.mask[number], attribution.special[number]
    if not (real & ~marked).any():  # nothing but special tokens: then they are the text
        special = scale_special = True
    keep = real if special else real & ~marked
    scores, marks = attribution.relevance[number, keep].double(), marked[keep]
    muted = marks & (not scale_special)
    layers, names = _layers(attribution, number, keep)
    scale = float(scores[~muted].abs().max()) if scores.numel() else 0.0
    fractions = torch.where(muted, 0.0, scores / scale) if scale else torch.zeros_like(scores)
    own = torch.arange(int(real.sum()))
    places = own[keep[real]].tolist()
    positions = set(attribution.explained[number].positions) - {len(own) - 1}
    apart = attribution.relevance[number, real & marked].double().sum() if not scale_special else None
    return Row(
        number=number,
        tokens=[token for token, kept in zip(attribution.tokens[number], keep.tolist(), strict=True) if kept],
        places=places,
        scores=scores.tolist(),
        fractions=fractions.tolist(),
        special=marks.tolist(),
        muted=muted.tolist(),
        scale=scale,
        asked=[i for i, place in enumerate(places) if positions and place in attribution.explained[number].positions],
        layers=layers,
        layer_names=names,
        explained=attribution.explained[number],
        prediction=attribution.predictions[number] if attribution.predictions else None,
        total=float(attribution.relevance[number].double().sum()),
        apart=None if apart is None else float(apart),
        model=attribution.model,
        rules=attribution.rules,
    )


def _layers(attribution: Attribution, number: int, keep: Tensor) -> tuple[Tensor | None, list[str]]:
    """Residual relevance after the embeddings and after each layer that was kept."""
    residual = attribution.latents.get("residual")
    if residual is None or not residual.layers:
        return None, []
    inner, bottom = residual.values[:, number, keep].double(), attribution.relevance[number, keep].double()
    return torch.cat([bottom[None], inner]), ["embed", *(f"L{layer}" for layer in residual.layers)]


def rescaled(several: Sequence[Row]) -> list[Row]:
    """The rows on one scale, that of the strongest, so that a colour means the same in all."""
    end = max(row.scale for row in several)
    return [
        replace(row, scale=end, fractions=[share * row.scale / end if end else 0.0 for share in row.fractions])
        for row in several
    ]


def column_width(tokens: int, most: int) -> int:
    """How many adjacent tokens one column sums, for at most `most` columns."""
    return max(1, -(-tokens // most))


def binned(row: Row, most: int) -> tuple[Tensor, list[str], list[bool], int]:
    """Layers × tokens in at most `most` columns; each column sums the relevance of `width` adjacent tokens.

    Returns:
        [layer, column], the columns' labels (tokens, not shortened), whether a column is muted, and the width.
    """
    scores = row.layers if row.layers is not None else torch.tensor([row.scores], dtype=torch.float64)
    width = column_width(len(row.tokens), most)
    if width == 1:
        return scores, row.tokens, row.muted, 1
    scores = torch.where(torch.tensor(row.muted), 0.0, scores)
    starts = range(0, len(row.tokens), width)
    sums = torch.stack([scores[:, start : start + width].sum(-1) for start in starts], dim=-1)
    return sums, [row.tokens[start] for start in starts], [False for _ in starts], width
