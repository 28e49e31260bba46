"""A latent's relevance as a table in long format, for pandas.

One line for each entry at a real token, in the order of rows, layers and tokens:

- row: of the batch.
- layer: its number.
- token: the place of the token among its row's own; of pattern and flow the query's.
- token_text: that token.
- part: the head, neuron, expert, ...; NA where there are none. Where only the largest were kept there is a line for
  the sum of the others, of part NA (of pattern and flow: of source NA), so that the sums of a token are complete.
- source, source_text: of pattern and flow alone, the key.
- relevance: in units of the explained value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from types import ModuleType

    from pandas import DataFrame

    from lxt.latents.ranking import Ranking
    from lxt.latents.values import LatentRelevance

__all__ = ["frame", "of_ranking"]

_NONE = -1  # stands for NA until the columns are made


def frame(latent: LatentRelevance, zeros: bool = False) -> DataFrame:
    """The table; `zeros` adds the entries that are exactly 0."""
    pandas = _pandas()
    pair = latent.values.dim() == 5
    pieces = []
    for row in range(latent.values.shape[1]):
        mask = torch.ones(latent.values.shape[latent.token_dims[0]], dtype=torch.bool)
        texts = [""] * len(mask)
        if latent.tokens is not None:
            mask, texts = latent.tokens.mask[row], latent.tokens.texts[row]
        own, words = (mask.cumsum(0) - 1).numpy(), np.array([*texts, ""], dtype=object)
        for place, number in enumerate(latent.layers):
            part, token, source, values = _entries(latent, place, row, mask, zeros)
            columns: dict[str, Any] = {
                "row": np.full(len(values), row, np.int32),
                "layer": np.full(len(values), number, np.int32),
                "token": own[token].astype(np.int32),
                "token_text": words[token],
                "part": part,
            }
            if pair:
                columns |= {"source": np.where(source == _NONE, _NONE, own[source]), "source_text": words[source]}
            pieces.append(columns | {"relevance": values})
    names = ["row", "layer", "token", "token_text", "part", *(["source", "source_text"] if pair else []), "relevance"]
    made = {name: np.concatenate([piece[name] for piece in pieces]) if pieces else np.array([]) for name in names}
    for name in ("part", "source"):
        if name in made:
            made[name] = pandas.array(made[name], dtype="Int32")
            made[name][made[name] == _NONE] = pandas.NA
    return pandas.DataFrame(_texts_as_they_are(made))


def _entries(
    latent: LatentRelevance, place: int, row: int, mask: Tensor, zeros: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Part, token, source and value of each entry of one layer and row."""
    values = latent.values[place, row]
    inner = None if latent.indices is None else latent.indices[place, row]
    if values.dim() == 1:
        values = values[:, None]
    wanted = mask[:, None].expand_as(values).clone()
    if values.dim() == 3:
        wanted &= mask if inner is None else mask[inner.long()]  # the keys
    if not zeros:
        wanted &= values != 0
    where = wanted.nonzero().T
    last = where[-1] if inner is None else inner[wanted]
    *outer, _ = where
    none = torch.full_like(last, _NONE)
    if latent.values.dim() == 3:
        part, token, source = none, outer[0], none
    elif latent.values.dim() == 4:
        part, token, source = last, outer[0], none
    else:
        part, token, source = outer[0], outer[1], last
    found = values[wanted]
    if latent.rest is not None:
        part, token, source, found = _with_rest(latent.rest[place, row], mask, (part, token, source, found))
    numbers = found.float() if found.dtype in (torch.bfloat16, torch.float16) else found
    return part.numpy(), token.numpy(), source.numpy(), numbers.numpy()


def _with_rest(
    rest: Tensor, mask: Tensor, entries: tuple[Tensor, Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The entries, and one for each token (and head) that holds the sum of what wasn't kept."""
    where = (mask.expand_as(rest) & (rest != 0)).nonzero().T
    part, token, source, found = entries
    none = torch.full_like(where[-1], _NONE)
    parts = none if len(where) == 1 else where[0]
    more = (parts, where[-1], none, rest[tuple(where)].to(found.dtype))
    part, token, source, found = (torch.cat([a, b.to(a.dtype)]) for a, b in zip(entries, more, strict=True))
    order = np.lexsort((token.numpy(),) if len(where) == 1 else (token.numpy(), part.numpy()))
    return part[order], token[order], source[order], found[order]


def of_ranking(ranking: Ranking) -> DataFrame:
    """The entries of a ranking, in their order."""
    pandas = _pandas()
    pair = any(entry.source is not None for entry in ranking)
    columns: dict[str, Any] = {
        "row": [entry.row for entry in ranking],
        "layer": [entry.layer for entry in ranking],
        "token": [entry.token for entry in ranking],
        "token_text": np.array([entry.text for entry in ranking], dtype=object),
        "part": pandas.array([entry.part for entry in ranking], dtype="Int32"),
    }
    if pair:
        columns["source"] = pandas.array([entry.source for entry in ranking], dtype="Int32")
        columns["source_text"] = np.array([entry.source_text for entry in ranking], dtype=object)
    columns["relevance"] = [entry.value for entry in ranking]
    columns["label"] = [entry.label for entry in ranking]
    return pandas.DataFrame(_texts_as_they_are(columns))


def _texts_as_they_are(columns: dict[str, Any]) -> dict[str, Any]:
    """Texts as objects: a token may be half a character, which pandas' own strings refuse."""
    pandas = _pandas()
    return {
        name: pandas.Series(column, dtype=object) if name.endswith("_text") else column
        for name, column in columns.items()
    }


def _pandas() -> ModuleType:
    try:
        import pandas
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "to_dataframe needs pandas, which isn't installed: pip install 'lxt[dataframe]'"
        ) from error
    return pandas
