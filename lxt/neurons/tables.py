"""The results as tables: parquet files that pandas, polars, DuckDB and others read.

    contexts/layer-003-00004096.parquet   a row for each context: of 4096 neurons from the 4096th on
    neurons/layer-003.parquet             a row for each neuron: name, AUROC, statistics

A folder is one table: `pandas.read_parquet("out/contexts")`. Every row of contexts is layer, neuron (or head), kind
(relevance, activation), sign, rank (from 1), score, document, token (of the document), window, position (in the window,
special tokens counted), peak and text. `tally-….safetensors` holds the same, and is what `load` reads.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lxt.neurons.measuring import KINDS, SIGNS

if TYPE_CHECKING:
    from lxt.neurons.results import Neurons

__all__ = ["TABLES", "available", "tables"]

TABLES = ("contexts", "neurons")
"""Their folders."""

_ROWS = 4096  # neurons of a file: 20 contexts of 4 kinds each are 330 thousand rows, some 10 MB


def available() -> bool:
    """Whether tables can be written: what writes them comes with `lxt[corpus]`."""
    return importlib.util.find_spec("pyarrow") is not None


def tables(found: Neurons) -> Iterator[tuple[str, bytes]]:
    """(file name, content) of every table.

    Raises:
        ImportError: pyarrow isn't installed.
    """
    if not available():
        raise ImportError("tables need pyarrow to be written: pip install 'lxt[corpus]'")
    for layer in found.layers:
        yield f"neurons/layer-{layer:03d}.parquet", _parquet(_statistics(found, layer))
        for start in range(0, found.count(layer), _ROWS):
            rows = range(start, min(start + _ROWS, found.count(layer)))
            yield f"contexts/layer-{layer:03d}-{start:08d}.parquet", _parquet(_contexts(found, layer, rows))


def _contexts(found: Neurons, layer: int, numbers: range) -> dict[str, Any]:
    import pyarrow as arrow  # type: ignore[import-not-found]

    parts: dict[str, list[Tensor]] = {}
    for k, kind in enumerate(KINDS):
        for s, sign in enumerate(SIGNS):
            top = found.tally.tops[layer, kind, sign]
            window = top.window[numbers.start : numbers.stop]
            number, rank = (window >= 0).nonzero().unbind(1)
            columns = {
                "number": number + numbers.start,
                "kind": torch.full_like(number, k),
                "sign": torch.full_like(number, s),
                "rank": rank + 1,
                "score": top.score[numbers.start : numbers.stop][number, rank],
                "window": window[number, rank],
                "position": top.position[numbers.start : numbers.stop][number, rank].long(),
            }
            for name, column in columns.items():
                parts.setdefault(name, []).append(column)
    whole = {name: torch.cat(columns) for name, columns in parts.items()}
    order = whole["number"].argsort(stable=True)
    whole = {name: column[order] for name, column in whole.items()}
    # The same place is a context of many neurons, and is read once.
    places, which = torch.stack([whole["window"], whole["position"]]).unique(dim=1, return_inverse=True)
    read = [found.context(window, position) for window, position in places.T.tolist()]
    at = arrow.array(which.to(torch.int32).numpy())

    def of_places(values: list[str]) -> Any:
        return arrow.DictionaryArray.from_arrays(at, arrow.array(values, arrow.string())).dictionary_decode()

    def named(name: str, values: tuple[str, ...]) -> Any:
        return arrow.DictionaryArray.from_arrays(
            arrow.array(whole[name].to(torch.int8).numpy()), arrow.array(values, arrow.string())
        )

    return {
        "layer": arrow.array([layer] * len(order), arrow.int32()),
        found.latent: arrow.array(whole["number"].to(torch.int32).numpy()),
        "kind": named("kind", KINDS),
        "sign": named("sign", tuple(SIGNS)),
        "rank": arrow.array(whole["rank"].to(torch.int32).numpy()),
        "score": arrow.array(whole["score"].numpy()),
        "document": of_places([context.document for context in read]),
        "token": arrow.array([context.token for context in read], arrow.int64()).take(at),
        "window": arrow.array(whole["window"].numpy()),
        "position": arrow.array(whole["position"].to(torch.int32).numpy()),
        "peak": of_places([context.peak for context in read]),
        "text": of_places([context.text for context in read]),
    }


def _statistics(found: Neurons, layer: int) -> dict[str, Any]:
    import pyarrow as arrow  # type: ignore[import-not-found]

    count = found.count(layer)
    names = [found.name(layer, number) for number in range(count)]
    columns: dict[str, Any] = {
        "layer": arrow.array([layer] * count, arrow.int32()),
        found.latent: arrow.array(range(count), arrow.int32()),
        "label": arrow.array([name.label for name in names], arrow.string()),
        "auroc": arrow.array([name.auroc for name in names], arrow.float64()),
        "words": arrow.array(
            [[found.pieces[token] for token, _ in name.words] for name in names], arrow.list_(arrow.string())
        ),
        "z": arrow.array([[z for _, z in name.words] for name in names], arrow.list_(arrow.float64())),
        "tokens": arrow.array([found.tally.tokens] * count, arrow.int64()),
    }
    tokens = max(found.tally.tokens, 1)
    for kind in KINDS:
        sums, squares, above = found.tally.moments[layer, kind]
        mean = sums / tokens
        columns[f"{kind}_mean"] = arrow.array(mean.numpy())
        columns[f"{kind}_deviation"] = arrow.array((squares / tokens - mean.square()).clamp(min=0).sqrt().numpy())
        columns[f"{kind}_above_zero"] = arrow.array(above.long().numpy())
        for sign, name in (("positive", "max"), ("negative", "min")):
            columns[f"{kind}_{name}"] = arrow.array(found.tally.tops[layer, kind, sign].score[:, 0].numpy())
    return columns


def _parquet(columns: dict[str, Any]) -> bytes:
    import pyarrow as arrow  # type: ignore[import-not-found]
    from pyarrow import parquet  # type: ignore[import-not-found]

    file = io.BytesIO()
    parquet.write_table(arrow.table(columns), file, compression="zstd")
    return file.getvalue()
