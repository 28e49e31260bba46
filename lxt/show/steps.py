"""Views of decoder steps: a table of steps × tokens, the source on the left and the prefix on the right."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.text import Text

from lxt.show import grid, html
from lxt.show.rows import unit
from lxt.show.terminal import display, print_line
from lxt.show.words import amount, shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lxt.steps import Steps

__all__ = ["fragment", "page", "picture", "render", "show"]


def show(steps: Steps) -> None:
    """Display in the notebook that runs this, otherwise print."""
    display(lambda: fragment(steps), lambda console: render(steps, console))


def render(steps: Steps, console: Console) -> None:
    """Print to a console."""
    head = Text.assemble(("What speaks for each step?  ", ""), (_written(steps), "bold"))
    head.append(f"   {shorten(steps.model)} · {shorten(steps.rules)}", "dim")
    print_line(console, head)
    console.print()
    grid.render(_grid(steps), console)
    console.print()
    print_line(console, Text(_note(steps), style="dim"))


def page(steps: Steps) -> str:
    """The whole page."""
    return html.document("decoder steps explained", _section(steps), steps.model, steps.rules, steps.versions)


def fragment(steps: Steps) -> str:
    """The same for a notebook's output cell."""
    return html.boxed(_section(steps), steps.model, steps.rules)


def picture(steps: Steps) -> Figure:
    """Steps × tokens as a heat map."""
    note = f"{_note(steps)}  ·  {shorten(steps.model)}, {shorten(steps.rules)}"
    return grid.figure(_grid(steps), f"What speaks for each step?   {_written(steps)}", note)


def _section(steps: Steps) -> str:
    return (
        f"<section>\n<h2>What speaks for each step? <small>{html.text(_written(steps))}</small></h2>\n"
        f"{grid.html(_grid(steps))}\n<p class=quiet>{html.text(_note(steps))}</p></section>"
    )


def _written(steps: Steps) -> str:
    return shorten("".join(steps.target).strip(), 80)


def _grid(steps: Steps) -> grid.Grid:
    ahead = torch.ones_like(steps.prefix_relevance, dtype=torch.bool).triu(1)
    scores = torch.cat([steps.source_relevance, steps.prefix_relevance.masked_fill(ahead, torch.nan)], dim=1)
    return grid.Grid(
        rows=[f"{token.strip(' ') or token} {amount(float(value))}" for token, value in _each(steps)],
        columns=[token.lstrip(" ") or token for token in steps.source + steps.prefix],
        scores=scores.tolist(),
        muted=steps.source_special + [mark and place > 0 for place, mark in enumerate(steps.prefix_special)],
        gap=len(steps.source),
        groups=("source", "prefix"),
        unit=unit(steps.kind),
    )


def _each(steps: Steps) -> list[tuple[str, float]]:
    return list(zip(steps.target, steps.values.tolist(), strict=True))


def _note(steps: Steps) -> str:
    source, prefix = float(steps.source_relevance.double().sum()), float(steps.prefix_relevance.double().sum())
    value = float(steps.values.double().sum())
    return (
        f"rows are steps with their {unit(steps.kind)}; all steps: Σ relevance {amount(source, 4)} of the source + "
        f"{amount(prefix, 4)} of the prefix, of {amount(value, 4)}"
    )
