"""What `lxt label` does: label with a line for each block, and print the best of each layer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lxt.attributor import Attributor
from lxt.neurons.corpus import SUFFIXES, Corpus
from lxt.neurons.results import Neurons
from lxt.neurons.running import Compute, label

__all__ = ["labelled", "numbers", "reader", "where"]

_PRINTED = 5


def numbers(text: str | None) -> list[int] | None:
    """Layers written as 3,7 or 0-5.

    Raises:
        ValueError: neither.
    """
    if text is None:
        return None
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not match:
            raise ValueError(f"layers are written as 3,7 or 0-5, not {text!r}")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    if not found:
        raise ValueError(f"there is no layer in {text!r}; layers are written as 3,7 or 0-5")
    return found


def reader(source: str, column: str, unit: str, skip_bad: bool) -> Corpus:
    """The corpus that was asked for."""
    return Corpus(source, column, unit, skip_bad)  # type: ignore[arg-type]  # checked there, as all that is typed


def where(ray: str | None, workers: int | None) -> Compute | None:
    """Where blocks are computed.

    Raises:
        ValueError: a number of workers without Ray.
        ImportError: Ray isn't installed.
    """
    if ray is None:
        if workers is not None:
            raise ValueError("--workers is how many compute on Ray; give --ray local, --ray auto or an address, too")
        return None
    from lxt.neurons.on_ray import on_ray

    return on_ray(ray, workers)


def labelled(
    explainer: Attributor,
    corpus: Corpus,
    latent: str,
    layers: Sequence[int] | None,
    by: str,
    top: int,
    out: Path,
    targets: Sequence[str] | None,
    length: int | None,
    batch_size: int,
    block_size: int,
    compute: Compute | None = None,
) -> Neurons:
    """Label, say how it goes on stderr, and print each layer's best neurons."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table

    console = Console(stderr=True)
    columns = (TextColumn("labelling, blocks:"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=None)
        found = label(
            explainer,
            corpus,
            latent,
            layers,
            by,
            top,
            out,
            targets,
            length,
            batch_size,
            block_size,
            compute=compute,
            progress=lambda block: progress.advance(bar),
        )
    table = Table("layer", latent, "name", "AUROC", f"highest {by}")
    for layer in found.layers:
        for neuron in found.best(layer, _PRINTED):
            best = neuron.contexts[by, "positive"]
            auroc = "" if neuron.auroc is None else f"{neuron.auroc:.2f}"
            peak = f"{best[0].score:+.4g}" if best else ""
            table.add_row(str(layer), str(neuron.number), neuron.label, auroc, peak)
    Console().print(table, markup=False)
    counts = found.manifest["counts"]
    if counts["bad"]:
        console.print(f"skipped {counts['bad']} bad rows, the first: {counts['first_bad'][0]}", markup=False)
    if counts.get("files_left_out"):  # runs of earlier versions didn't count them
        kinds = ", ".join(SUFFIXES)
        console.print(f"left out {counts['files_left_out']} files of the folder that are no {kinds}", markup=False)
    if counts["cut"]:
        length = found.manifest["settings"]["length"]
        console.print(f"{counts['cut']} of {counts['documents']} documents were cut into windows of {length} tokens")
    if not found.manifest["saved"]["tables"]:
        console.print("no tables for pandas were written: that needs pip install 'lxt[corpus]'", markup=False)
    console.print(f"{found.tally.tokens:,} tokens; written: {out / 'index.html'}", markup=False, highlight=False)
    return found
