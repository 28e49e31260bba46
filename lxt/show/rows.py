"""Rows prepared for display: scores, shares of the colour scale, the ranking and the facts that every view states."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lxt.show.words import amount, percent, shorten

if TYPE_CHECKING:
    from lxt.attribution import Attribution, Explained, Prediction

__all__ = ["Row", "binned", "rows", "unit"]

_UNITS = {"logprob": "log-probability", "prob": "probability", "centered": "centred logit", "custom": "value"}


@dataclass(frozen=True)
class Row:
    """One row, without padding, as the views draw it.

    Attributes:
        places: the number of each token in its row; gaps where special tokens are left out.
        fractions: score / scale; 0 for special tokens that are not coloured.
        muted: special tokens that are not coloured.
        scale: the score that has the full colour.
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
    def target(self) -> str:
        """What is explained, e.g. `' dogs'`."""
        return shorten(self.explained.label, 80)

    @property
    def value(self) -> str:
        """The explained number with its unit, e.g. `logit 14.02`."""
        return f"{unit(self.explained.kind)} {amount(self.explained.value, 4)}"

    @property
    def predicted(self) -> str | None:
        """The predicted token with its logit and probability."""
        if self.prediction is None:
            return None
        logit, probability = amount(self.prediction.logit, 4), percent(self.prediction.probability)
        return f"'{shorten(self.prediction.token)}'  logit {logit}, probability {probability}"

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
    apart = attribution.relevance[number, real & marked].double().sum() if not scale_special else None
    return Row(
        number=number,
        tokens=[token for token, kept in zip(attribution.tokens[number], keep.tolist(), strict=True) if kept],
        places=own[keep[real]].tolist(),
        scores=scores.tolist(),
        fractions=fractions.tolist(),
        special=marks.tolist(),
        muted=muted.tolist(),
        scale=scale,
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
    """Residual relevance from the embeddings up; `residual` may or may not begin with the embeddings."""
    residual = attribution.latents.get("residual")
    if residual is None or residual.shape[0] == 0:
        return None, []
    inner, bottom = residual[:, number, keep].double(), attribution.relevance[number, keep].double()
    if torch.allclose(inner[0], bottom, rtol=1e-4, atol=1e-6 * float(bottom.abs().max()) if bottom.numel() else 0.0):
        inner = inner[1:]
    names = ["embeddings", *(f"layer {layer}" for layer in range(1, inner.shape[0] + 1))]
    return torch.cat([bottom[None], inner]), names


def binned(row: Row, most: int) -> tuple[Tensor, list[str], list[bool], int]:
    """Layers × tokens in at most `most` columns; each column sums the relevance of `width` adjacent tokens.

    Returns:
        [layer, column], the columns' labels (tokens, not shortened), whether a column is muted, and the width.
    """
    scores = row.layers if row.layers is not None else torch.tensor([row.scores], dtype=torch.float64)
    width = max(1, -(-len(row.tokens) // most))
    if width == 1:
        return scores, row.tokens, row.muted, 1
    scores = torch.where(torch.tensor(row.muted), 0.0, scores)
    starts = range(0, len(row.tokens), width)
    sums = torch.stack([scores[:, start : start + width].sum(-1) for start in starts], dim=-1)
    return sums, [row.tokens[start] for start in starts], [False for _ in starts], width
