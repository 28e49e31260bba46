"""Images in the terminal: the text where there is one, each map as a field of coloured cells, the strongest by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.style import Style
from rich.text import Text
from torch import Tensor

from lxt.show import colors
from lxt.show.images import Map, Seen, seen
from lxt.show.rows import unit
from lxt.show.terminal import display, legend, print_line, ranking, running
from lxt.show.words import amount, shorten, signed

if TYPE_CHECKING:
    from lxt.attribution import Attribution

__all__ = ["render", "show"]

_CELLS = 28  # of a field on each side; finer maps are summed


def show(attribution: Attribution, special: bool, scale_special: bool, top: int, limit: int) -> None:
    """Display in the notebook that runs this, otherwise print; at most `limit` rows."""

    def html() -> str:
        from lxt.show.imagehtml import fragment

        return fragment(attribution, limit, special, scale_special)

    display(html, lambda console: render(attribution, console, special, scale_special, top, limit))


def render(
    attribution: Attribution,
    console: Console,
    special: bool = True,
    scale_special: bool = False,
    top: int = 8,
    limit: int = 20,
) -> None:
    """Print to a console; options as in `Attribution.show`."""
    coloured = console.color_system is not None and not console.no_color
    for one in seen(attribution, special, scale_special):
        if one.row.number == limit:
            left = len(attribution) - limit
            print_line(console, Text(f"… {left} more rows: out[{limit}].show() and on, or out.to_html(path)"))
            break
        if one.row.number:
            print_line(console, Text("─" * min(60, console.width), style="dim"))
        for line in _lines(one, coloured, top, console.width):
            print_line(console, line)


def _lines(one: Seen, coloured: bool, top: int, width: int) -> list[Text]:
    row = one.row
    head = Text.assemble(("What speaks for ", ""), (row.target, "bold"), (f"?  {row.value}", ""))
    lines = [head.append(f"   {shorten(row.model)} · {shorten(row.rules)}", "dim"), Text()]
    if one.reads:
        lines += [running(row, coloured), Text()]
        lines.append(legend(row) if coloured else Text("«+token» raises it, «−token» lowers it"))
    if row.predicted:
        lines.append(Text(f"predicts {row.predicted}"))
    if row.places_asked and one.reads:
        lines.append(Text(row.places_asked))
    lines.append(Text(row.conserved))
    if one.reads:
        lines += [Text(), *ranking(row, coloured, top, width)]
    for number, image in enumerate(one.images):
        maps = one.maps(image)
        if not maps:
            continue
        drawn = _summed(maps[0], min(_CELLS, max(4, width // 2)))
        which = f"image {number + 1} of {len(one.images)}, " if len(one.images) > 1 else ""
        total = "" if image.total is None else f" · Σ pixels {amount(image.total, 4)} {unit(row.explained.kind)}"
        lines += [Text(), Text(f"{which}{drawn.name}{total}", style="dim")]
        lines += _field(drawn) if coloured else []
        lines += _strongest(drawn, top)
    return lines


def _summed(drawn: Map, most: int) -> Map:
    """The map in at most `most` rows and columns, neighbours summed."""
    size = max(1, -(-max(drawn.scores.shape) // most))
    if size == 1:
        return drawn
    rows, columns = (-(-length // size) for length in drawn.scores.shape)
    scores = torch.nn.functional.pad(
        drawn.scores, [0, columns * size - drawn.scores.shape[1], 0, rows * size - drawn.scores.shape[0]]
    )
    scores = scores.view(rows, size, columns, size).sum((1, 3))
    return Map(f"{drawn.name} in fields of {size} × {size}", scores, float(scores.abs().max()))


def _field(drawn: Map) -> list[Text]:
    lines = []
    for line in drawn.fractions.tolist():
        text = Text()
        for share in line:
            color = colors.css(colors.terminal(share))
            text.append("  ", Style(bgcolor=color))
        lines.append(text)
    return lines


def _strongest(drawn: Map, top: int) -> list[Text]:
    scores: Tensor = drawn.scores.flatten()
    columns = drawn.scores.shape[1]
    best = scores.abs().argsort(descending=True, stable=True)[:top].tolist()
    named = (f"row {i // columns + 1}, column {i % columns + 1} {signed(float(scores[i]))}" for i in best if scores[i])
    return [Text("strongest: " + ("  ·  ".join(named) or "none"))]
