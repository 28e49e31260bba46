"""AttentionRelevance: what `attribute_attention` returns. Data, rankings and views of it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["AttentionEntry", "AttentionRelevance", "Foil", "Side"]

Foil = Literal["mean"] | int | None
Side = Literal["query", "key"]


class AttentionEntry(NamedTuple):
    """One line of a ranking.

    Attributes:
        side: through which factor of the score.
        position: of the token among the prompt's.
        token: as displayed.
        head: such as "L1H3", of an earlier head; None where all of the token is meant.
        relevance: in units of the score.
    """

    side: Side
    position: int
    token: str
    head: str | None
    relevance: float


@dataclass(frozen=True, eq=False, repr=False)
class AttentionRelevance:
    """What an attention score is made of.

    Attributes:
        tokens: as displayed.
        special: which of them are special.
        layer: where the head is.
        head: which.
        query_position: the token that looks.
        key_position: the token that it looks at.
        contrast: "mean", or the position of another key, whose score is subtracted; None is the score alone.
        score: scale * q . k and what the model adds to it (a bias of positions), before the softmax.
        value: what is explained: the score minus the contrast's.
        weights: [token], where the query looks: the attention weights of its row.
        query: [token], relevance through the query, in units of the score.
        key: [token], through the key, and where there is a contrast through those keys too.
        query_heads: [layer, token, head], of the heads in the layers below, through the query; None where it isn't
            known where the model's heads are.
        key_heads: through the keys, likewise.
        model: the model's name.
        rules: the composite's name.
        versions: package -> version of what computed it.
    """

    tokens: list[str]
    special: list[bool]
    layer: int
    head: int
    query_position: int
    key_position: int
    contrast: Foil
    score: float
    value: float
    weights: Tensor
    query: Tensor
    key: Tensor
    query_heads: Tensor | None
    key_heads: Tensor | None
    model: str
    rules: str
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """The sum of all relevance, through both sides."""
        return float(self.query.double().sum() + self.key.double().sum())

    @property
    def conservation(self) -> float:
        """The sum over the explained value; NaN where that is 0."""
        return self.total / self.value if self.value else float("nan")

    @property
    def label(self) -> str:
        """What is explained, such as `L2H1: ' my' → ' cats'`, and what it is compared with."""
        label = f"L{self.layer}H{self.head}: {self.tokens[self.query_position]!r} → {self.tokens[self.key_position]!r}"
        if self.contrast is None:
            return label
        return f"{label} − {'mean of keys' if self.contrast == 'mean' else repr(self.tokens[self.contrast])}"

    def top(self, k: int = 10, heads: bool = False, side: Side | None = None) -> list[AttentionEntry]:
        """The tokens of most relevance, strongest first, or the earlier heads at a token.

        Args:
            k: how many.
            heads: rank heads, each at each token, instead of tokens.
            side: through the query or the key only; None ranks both together.

        Raises:
            ValueError: an unknown side, k below 1, or heads where they aren't known.
        """
        if type(k) is not int or k < 1:
            raise ValueError(f"k must be a whole number >= 1, got {k!r}")
        if side is not None and side not in get_args(Side):
            raise ValueError(f"unknown side {side!r}; allowed: query, key, or None for both")
        sides: Sequence[Side] = (side,) if side else ("query", "key")
        found = [entry for one in sides for entry in (self._of_heads(one) if heads else self._of_tokens(one))]
        return sorted(found, key=lambda entry: -abs(entry.relevance))[:k]

    def _of_tokens(self, side: Side) -> Iterator[AttentionEntry]:
        for place, value in enumerate(getattr(self, side).tolist()):
            yield AttentionEntry(side, place, self.tokens[place], None, value)

    def _of_heads(self, side: Side) -> Iterator[AttentionEntry]:
        known: Tensor | None = getattr(self, f"{side}_heads")
        if known is None:
            raise ValueError(
                f"it isn't known where the heads of {self.model} are; give the Attributor a PatchMap with the head path"
            )
        for layer, place, head in known.nonzero().tolist():
            value = float(known[layer, place, head])
            yield AttentionEntry(side, place, self.tokens[place], f"L{layer}H{head}", value)

    def __repr__(self) -> str:
        value = f"{self.value:.4g}" if self.contrast is None else f"{self.value:.4g} (score {self.score:.4g})"
        return f"AttentionRelevance({self.label}, {value}, model={self.model!r}, rules={self.rules!r})"

    def show(self, top: int = 6, special: bool = True) -> None:
        """Print where the query looks, the tokens of both sides in colour, and the earlier heads that matter most.

        Args:
            top: how many tokens and heads are named.
            special: print special tokens; False leaves them out.
        """
        from lxt.show.scores import show

        show(self, top, special)

    def plot(self, path: str | os.PathLike[str] | None = None, special: bool = True) -> Figure:
        """Both sides' tokens as bars, below them where the query looks, and the earlier heads that matter most.

        Args:
            path: where to write it, as .png, .pdf or .svg; None only returns the figure.
            special: draw special tokens; False leaves them out.
        """
        from lxt.show.figure import written
        from lxt.show.scores import picture

        return written(picture(self, special), path)
