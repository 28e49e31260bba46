"""The strongest entries of a latent, and how they print: `L5H1  token " Mary"  +1.83`.

Each layer of each row gives its own strongest, and the strongest of these are sorted: no copy is as large as all
layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args, overload

import torch
from rich.cells import cell_len
from torch import Tensor

from lxt.latents.names import KINDS, parts_of

if TYPE_CHECKING:
    from pandas import DataFrame

    from lxt.latents.values import LatentRelevance

__all__ = ["Order", "Ranked", "Ranking", "label", "letter", "ranked"]

Order = Literal["absolute", "positive", "negative"]
_LETTERS = {"head": "H", "neuron": "N", "expert": "E"}  # other parts are features
_LONGEST = 28  # characters of a token
_SHOWN = 100  # lines; a longer ranking is for programs, or for to_dataframe


@dataclass(frozen=True)
class Ranked:
    """One entry.

    Attributes:
        row: of the batch.
        layer: its number.
        part: the head, neuron, expert, ...; None where there are none.
        token: the place of the token among its row's own; of pattern and flow the query's.
        text: that token.
        value: its relevance, in units of the explained value.
        source: of pattern and flow the key's place, which is looked at; None elsewhere.
        source_text: that token.
        label: the layer and the part, such as L5H1.
    """

    row: int
    layer: int
    part: int | None
    token: int
    text: str
    value: float
    source: int | None = None
    source_text: str | None = None
    label: str = ""


@dataclass(frozen=True, repr=False)
class Ranking(Sequence[Ranked]):
    """Entries, strongest first, row by row; print it, or go through it.

    Attributes:
        name: of the latent.
        entries: the entries.
        note: what was left out, if anything was.
        repeated: (row, text) of tokens that are in their row more than once, which print with their places.
    """

    name: str
    entries: tuple[Ranked, ...]
    note: str = ""
    repeated: frozenset[tuple[int, str]] = frozenset()

    @overload
    def __getitem__(self, index: int) -> Ranked: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Ranked]: ...

    def __getitem__(self, index: int | slice) -> Ranked | Sequence[Ranked]:
        return self.entries[index]

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[Ranked]:
        return iter(self.entries)

    def __repr__(self) -> str:
        shown = self.entries[:_SHOWN]
        several = len({entry.row for entry in shown}) > 1
        columns = [[entry.label for entry in shown], [self._tokens(entry) for entry in shown]]
        if several:
            columns.insert(0, [f"row {entry.row}" for entry in shown])
        widths = [max(map(cell_len, column), default=0) for column in columns]
        lines = []
        for *cells, entry in zip(*columns, shown, strict=True):
            padded = (cell + " " * (width - cell_len(cell)) for cell, width in zip(cells, widths, strict=True))
            lines.append("  ".join([*padded, f"{entry.value:+#.3g}"]))
        if len(self) > len(shown):
            lines.append(f"and {len(self) - len(shown):,} more")
        if not lines:
            lines.append(f"no {self.name} has such relevance")
        return "\n".join([*lines, *([f"({self.note})"] if self.note else [])])

    def _tokens(self, entry: Ranked) -> str:
        looking = self._token(entry.row, entry.text, entry.token)
        if entry.source is None:
            return f"token {looking}"
        return f"{self._token(entry.row, entry.source_text or '', entry.source)} -> {looking}"

    def _token(self, row: int, text: str, place: int) -> str:
        return f"{_quoted(text)} ({place})" if (row, text) in self.repeated else _quoted(text)

    def to_dataframe(self) -> DataFrame:
        """The entries as a table, with the columns of `LatentRelevance.to_dataframe` and the labels.

        Raises:
            ModuleNotFoundError: pandas isn't installed.
        """
        from lxt.latents.table import of_ranking

        return of_ranking(self)


def ranked(
    latent: LatentRelevance,
    k: int,
    row: int | None,
    by: Order,
    layer: int | Sequence[int] | None,
    token: int | Sequence[int] | None,
    special: bool,
) -> Ranking:
    """The ranking; `LatentRelevance.top` says what the arguments are."""
    if by not in get_args(Order):
        raise ValueError(f"unknown order {by!r}; allowed: {', '.join(map(repr, get_args(Order)))}")
    if type(k) is not int or k < 1:
        raise ValueError(f"k must be a whole number >= 1, got {k!r}")
    batch = latent.values.shape[1]
    if row is not None and not -batch <= row < batch:
        raise IndexError(f"row {row} of {batch}; allowed: 0 to {batch - 1}")
    numbers = list(latent.layers) if layer is None else _several(layer)
    for number in numbers:
        latent.layer(number)  # which names the layers there are
    entries, left_out = [], False
    for one in range(batch) if row is None else [row % batch]:
        allowed, own, some = _places(latent, one, token, special)
        left_out |= some
        found: list[tuple[float, int, int]] = []
        for place, number in enumerate(latent.layers):
            if number in numbers:
                scores = _scores(latent, place, one, by, allowed, special or token is not None)
                best = scores.flatten().topk(min(k, scores.numel()))
                pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
                found += [(score, place, at) for score, at in pairs if score > 0]
        found.sort(key=lambda entry: (-entry[0], *entry[1:]))
        entries += [_entry(latent, one, place, at, own) for _, place, at in found[:k]]
    note = "special tokens are left out; top(special=True) ranks them too" if left_out else ""
    return Ranking(latent.name, tuple(entries), note, _repeated(latent, {entry.row for entry in entries}))


def _repeated(latent: LatentRelevance, rows: Iterable[int]) -> frozenset[tuple[int, str]]:
    if latent.tokens is None:
        return frozenset()
    counts = Counter((row, text) for row in rows for text in latent.tokens.of_row(row).texts[0])
    return frozenset(one for one, count in counts.items() if count > 1)


def label(name: str, layer: int, part: int | None, rank: int = 3) -> str:
    """What an entry is called: `L5`, `L5H1`, `L7N1234`, `L3E5`; `embed`, or the path of a module, has no layer.

    Args:
        name: of the latent.
        layer: its number.
        part: the head, neuron, ...; None where there are none.
        rank: how many dimensions the latent's values have.
    """
    kind = KINDS.get(name)
    if part is None:
        return f"L{layer}" if kind is not None and name != "embed" else name
    return f"L{layer}{letter(name, rank)}{part}"


def letter(name: str, rank: int = 3) -> str:
    """What stands before the number of a latent's part; `rank` as in `label`."""
    return "H" if rank == 5 else _LETTERS.get(parts_of(name) or "", "F")


def _several(number: int | Sequence[int]) -> list[int]:
    return list(number) if isinstance(number, Iterable) else [number]


def _places(
    latent: LatentRelevance, row: int, token: int | Sequence[int] | None, special: bool
) -> tuple[Tensor, list[int], bool]:
    """[token], where to look; the place of each token among its row's own; and whether special tokens are left out."""
    length = latent.values.shape[latent.token_dims[0]]
    tokens = latent.tokens
    mask = torch.ones(length, dtype=torch.bool) if tokens is None else tokens.mask[row]
    own = (mask.cumsum(0) - 1).tolist()
    if token is None:
        plain = mask if special or tokens is None else mask & ~tokens.special[row]
        plain = plain if plain.any() else mask  # nothing but special tokens: then they are the text
        return plain, own, not torch.equal(plain, mask)
    where, count = mask.nonzero()[:, 0].tolist(), int(mask.sum())
    chosen = torch.zeros_like(mask)
    asked: list[Any] = [token] if isinstance(token, str) else _several(token)
    for place in asked:
        if isinstance(place, bool) or not hasattr(place, "__index__"):
            texts = [] if tokens is None else tokens.of_row(row).texts[0]
            there = ", ".join(str(i) for i, text in enumerate(texts) if text == place)
            hint = f"; {place!r} is at {there}" if there else ""
            raise TypeError(f"token is the place of a token in its row, from 0, or several; got {place!r}{hint}")
        if not -count <= place < count:
            raise IndexError(f"token {place} of {count} in row {row}; allowed: {-count} to {count - 1}")
        chosen[where[place]] = True
    return chosen, own, False


def _scores(latent: LatentRelevance, place: int, row: int, by: Order, allowed: Tensor, any_key: bool) -> Tensor:
    """How far up each entry of one layer and row belongs; what isn't above 0 doesn't."""
    values = latent.values[place, row]
    scores = values.abs() if by == "absolute" else values.clone() if by == "positive" else -values
    if values.dim() < 3:
        scores[~allowed] = 0
        return scores
    scores[:, ~allowed] = 0  # [head, query, key]
    if not any_key:
        keys = allowed if latent.indices is None else allowed[latent.indices[place, row].long()]
        scores = scores * keys
    return scores


def _entry(latent: LatentRelevance, row: int, place: int, at: int, own: Sequence[int]) -> Ranked:
    values = latent.values[place, row]
    where = [int(i) for i in torch.unravel_index(torch.tensor(at), values.shape)]
    value = float(values[tuple(where)])
    inner = where[-1] if latent.indices is None else int(latent.indices[(place, row, *where)])
    texts = None if latent.tokens is None else latent.tokens.texts[row]
    part, token, source = None, where[0], None
    if values.dim() == 2:
        part = inner
    elif values.dim() == 3:
        part, token, source = where[0], where[1], inner
    number = latent.layers[place]
    return Ranked(
        row=row,
        layer=number,
        part=part,
        token=own[token],
        text="" if texts is None else texts[token],
        value=value,
        source=None if source is None else own[source],
        source_text=None if source is None or texts is None else texts[source],
        label=label(latent.name, number, part, latent.values.dim()),
    )


def _quoted(text: str) -> str:
    """In quotes on one line, whatever it holds: an ellipsis in the middle, codes for what can't be seen."""
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]}…{text[-(_LONGEST // 2 - 1) :]}"
    shown = "".join(one if one.isprintable() and one != "\\" else repr(one)[1:-1] for one in text)
    return '"' + shown.replace('"', '\\"') + '"'
