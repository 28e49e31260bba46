"""Rows with images, prepared for display: runs of image tokens as one word, maps as shares of their colour scale."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lxt.show.rows import Row, rows

if TYPE_CHECKING:
    from lxt.attribution import Attribution
    from lxt.imagerelevance import ImageRelevance

__all__ = ["Map", "Seen", "as_text", "seen"]

_RUN = 4  # as many equal tokens in a row are an image's
_CLIPPED = 0.995  # of the pixels keep their colour apart; single glaring ones would leave the others pale


@dataclass(frozen=True)
class Map:
    """Relevance over an image.

    Attributes:
        name: what the map is of, with its size.
        scores: [rows, columns].
        scale: the score that has the full colour.
    """

    name: str
    scores: Tensor
    scale: float

    @property
    def fractions(self) -> Tensor:
        """[rows, columns], each score's share of the scale, in [-1, 1]."""
        return (self.scores / self.scale).clamp(-1, 1) if self.scale else torch.zeros_like(self.scores)


@dataclass(frozen=True)
class Seen:
    """One row with its images.

    Attributes:
        row: what is explained, and the text's tokens where there is text.
        reads: whether the row has text.
        images: in order.
    """

    row: Row
    reads: bool
    images: list[ImageRelevance]

    def maps(self, image: ImageRelevance) -> list[Map]:
        """Patches first, then pixels, of which there are; one scale for the maps of a kind in this row."""
        found = []
        for name, parts in (
            ("patches", [one.patches for one in self.images]),
            ("pixels", [one.pixels for one in self.images]),
        ):
            part = getattr(image, name)
            if part is None or part.numel() < 2:
                continue
            sizes = torch.cat([one.double().abs().flatten() for one in parts if one is not None])
            most = float(sizes.max())
            scale = most if name == "patches" else float(_quantile(sizes)) or most
            found.append(Map(f"{part.shape[0]} × {part.shape[1]} {name}", part.double(), scale))
        return found


def _quantile(sizes: Tensor) -> Tensor:
    return sizes.sort().values[min(len(sizes) - 1, int(_CLIPPED * len(sizes)))]  # torch's own stops at 16 million


def seen(attribution: Attribution, special: bool = True, scale_special: bool = False) -> Iterator[Seen]:
    """The rows to draw; options as in `Attribution.show`."""
    text = as_text(attribution)
    for row in rows(text, special, scale_special):
        yield Seen(row, attribution.token_ids is not None, [i for i in attribution.images if i.row == row.number])


def as_text(attribution: Attribution) -> Attribution:
    """The same with each run of image tokens as one token, which has their sum; unchanged where there is no text."""
    if attribution.token_ids is None:
        return attribution
    folded = []
    for number, keep in enumerate(attribution.mask):
        tokens = [token for token, real in zip(attribution.tokens[number], keep.tolist(), strict=True) if real]
        scores, marks = attribution.relevance[number, keep], attribution.special[number, keep]
        out, start = [], 0
        for token, run in groupby(tokens):
            count = len(list(run))
            part = slice(start, start + count)
            if count >= _RUN:
                out.append((f"{token} × {count}", scores[part].sum(), marks[start]))
            else:
                out += [(token, score, mark) for score, mark in zip(scores[part], marks[part], strict=True)]
            start += count
        folded.append(out)
    width = max(map(len, folded))

    def padded(place: int) -> Tensor:
        rows = [torch.stack([entry[place] for entry in out]) for out in folded]  # type: ignore[misc]
        return torch.stack([torch.nn.functional.pad(row, [width - len(row), 0]) for row in rows])

    return replace(
        attribution,
        tokens=[[""] * (width - len(out)) + [token for token, *_ in out] for out in folded],
        token_ids=None,
        relevance=padded(1),
        special=padded(2),
        mask=torch.tensor([[False] * (width - len(out)) + [True] * len(out) for out in folded]),
        images=(),
    )
