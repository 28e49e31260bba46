"""A table of scores by two lists of tokens: decoder steps × what they read, or the tokens of two sentences.

Every cell prints its number, so that nothing is said by colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from matplotlib.figure import Figure
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from lxt.show import colors, style
from lxt.show.figure import color_bar, colormap, drawable, families, figure_of
from lxt.show.terminal import print_line, shade
from lxt.show.words import listed

__all__ = ["Grid", "figure", "html", "render"]

_CELL = 7  # columns of a terminal: a sign, a point and two or three digits
_NAME = 16


@dataclass(frozen=True)
class Grid:
    """What to draw.

    Attributes:
        rows: labels.
        columns: labels.
        scores: [row][column]; NaN where there is nothing.
        muted: columns that are printed but neither coloured nor counted for the scale (special tokens).
        gap: the column before which a second group begins, or None.
        groups: names of the one or two groups of columns.
        unit: of the scores.
    """

    rows: Sequence[str]
    columns: Sequence[str]
    scores: Sequence[Sequence[float]]
    muted: Sequence[bool]
    gap: int | None = None
    groups: tuple[str, ...] = ()
    unit: str = "logit"

    @property
    def scale(self) -> float:
        """The score that has the full colour."""
        found = (abs(x) for line in self.scores for x, off in zip(line, self.muted, strict=True) if not off)
        return max((x for x in found if not math.isnan(x)), default=0.0)

    def fraction(self, row: int, column: int) -> float:
        """The score's share of the scale; 0 where it has no colour."""
        score = self.scores[row][column]
        if math.isnan(score) or self.muted[column] or not self.scale:
            return 0.0
        return score / self.scale

    def cell(self, row: int, column: int) -> str:
        """The score with as many digits as the scale deserves."""
        score = self.scores[row][column]
        if math.isnan(score):
            return ""
        decimals = 0 if self.scale >= 100 else 1 if self.scale >= 10 else 2 if self.scale >= 0.5 else 3
        text = f"{score:+.{decimals}f}".replace("-", "−")
        return text if text.strip("+−0.") else "·"


def render(grid: Grid, console: Console) -> None:
    """Print the table, in as many bands of columns as the console's width needs."""
    coloured = console.color_system is not None and not console.no_color
    names = [_cut(name, _NAME) for name in grid.rows]
    left = max((cell_len(name) for name in names), default=0) + 1
    most = max(1, (console.width - left) // _CELL)
    ends = [grid.gap, len(grid.columns)] if grid.gap else [len(grid.columns)]
    start = 0
    for end, group in zip(ends, grid.groups or ("",) * len(ends), strict=True):
        if group:
            print_line(console, Text(group, style="dim"))
        for first in range(start, end, most):
            band = range(first, min(first + most, end))
            heads = [_cut(grid.columns[i], _CELL - 1) for i in band]
            line = Text(" " * left)
            for place, head in zip(band, heads, strict=True):
                line.append(" " * (_CELL - cell_len(head)))
                line.append(head, "dim" if grid.muted[place] else "bold")
            print_line(console, line)
            for number, name in enumerate(names):
                line = Text(name + " " * (left - cell_len(name)))
                for place in band:
                    text = grid.cell(number, place).rjust(_CELL)
                    quiet = grid.muted[place] or text.strip() == "·"
                    line.append(text, "dim" if quiet else shade(grid.fraction(number, place)) if coloured else "")
                print_line(console, line)
        start = end


def html(grid: Grid) -> str:
    """The table for a page of the house."""
    head = "".join(
        f"<th class=num{_bar(grid, i)}><bdi>{escape(listed(name, 14, note=False))}</bdi></th>"
        for i, name in enumerate(grid.columns)
    )
    groups = ""
    if grid.gap and grid.groups:
        spans = zip(grid.groups, (grid.gap, len(grid.columns) - grid.gap), strict=True)
        groups = f"<tr><th></th>{''.join(f'<th colspan={span}>{escape(name)}</th>' for name, span in spans)}</tr>"
    lines = []
    for number, name in enumerate(grid.rows):
        cells = "".join(
            f'<td class="num {style.shade(grid.fraction(number, i))}"{_bar(grid, i)}>{grid.cell(number, i)}</td>'
            for i in range(len(grid.columns))
        )
        lines.append(f"<tr><td class=tok><bdi>{escape(listed(name, 24, note=False))}</bdi></td>{cells}</tr>")
    return f"<div class=scroll><table class=grid>{groups}<tr><th></th>{head}</tr>{''.join(lines)}</table></div>"


def figure(grid: Grid, title: str, note: str = "") -> Figure:
    """The table as a picture."""
    rows, columns = len(grid.rows), len(grid.columns)
    canvas = figure_of(min(30.0, max(6.0, 2.6 + 0.52 * columns)), min(20.0, 2.2 + 0.34 * rows))
    axes = canvas.add_subplot()
    scores = np.asarray(grid.scores, dtype=float).reshape(rows, columns)
    scores[:, np.asarray(grid.muted, dtype=bool)] = np.nan
    end = grid.scale or 1.0
    image = axes.imshow(scores, cmap=colormap(), vmin=-end, vmax=end, aspect="auto")
    look = {"parse_math": False, "fontfamily": families()}
    for ticks, names, angle in ((axes.xaxis, grid.columns, 55), (axes.yaxis, grid.rows, 0)):
        ticks.set_ticks(range(len(names)), [drawable(listed(name, 16, note=False)) for name in names])
        for tick in ticks.get_ticklabels():
            tick.set(fontsize=10, rotation=angle, rotation_mode="anchor", **look)
            if angle:
                tick.set(horizontalalignment="right", verticalalignment="center")
    axes.tick_params(length=0, pad=6)
    axes.spines[:].set_visible(False)
    if columns * rows <= 600:  # beyond, the numbers would be smaller than print
        for row in range(rows):
            for column in range(columns):
                share = grid.fraction(row, column)
                ink = colors.css(colors.ink(colors.diverging(share)))
                text = grid.cell(row, column)
                axes.text(column, row, text, ha="center", va="center", fontsize=7, color=ink)
    if grid.gap:
        axes.axvline(grid.gap - 0.5, color="#16181d", linewidth=1.2)
        for name, place in zip(grid.groups, (0, grid.gap), strict=True):
            axes.annotate(
                drawable(name), (place - 0.5, 1), (0, 3), ("data", "axes fraction"), "offset points", fontsize=8
            )
    axes.set_title(drawable(f"{title}\n"), loc="left", fontsize=12, parse_math=False, family=families())
    axes.set_xlabel(drawable(note), fontsize=8, loc="left", parse_math=False, family=families())
    color_bar(axes, image, end, grid.unit, canvas.get_figheight() - 1.0)
    return canvas


def _cut(name: str, width: int) -> str:
    text = Text(listed(name.lstrip(" ") or name, 24, note=False))
    text.truncate(width, overflow="ellipsis")
    return text.plain


def _bar(grid: Grid, column: int) -> str:
    return ' data-gap=""' if grid.gap == column else ""
