"""Pictures with matplotlib: layers × tokens, or one bar per token; and what all pictures are made with.

Everything is drawn on a Figure of its own, so no global state of pyplot is touched and no window can open. Labels are
plain text, never mathtext. A character that no installed font has is drawn as a box, and the picture says so.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure, FigureBase
from matplotlib.text import Text

from lxt.show import colors
from lxt.show.files import write
from lxt.show.rows import Row, binned, rescaled, rows, unit
from lxt.show.words import amount, listed, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lxt.attribution import Attribution

__all__ = [
    "INK",
    "MOST_ROWS",
    "QUIET",
    "WIDEST",
    "bars",
    "color_bar",
    "colormap",
    "drawable",
    "families",
    "figure_of",
    "headed",
    "picture",
    "save",
    "titled",
    "token_axis",
    "written",
]

INK, QUIET = "#16181d", "#5a616c"
WIDEST = 16.0  # inches; a wider picture is unreadable where it is shrunk to a page
MOST_ROWS = 12  # of one picture; more would be too tall to read
_COLUMNS = 220  # beyond, neighbouring tokens are summed
_BAR_LONG, _BAR_WIDE = 3.6, 0.15  # inches of a colour bar
_BOX = "□"
_WORD = f"{_BOX} stands for a character that no installed font has; to_html() shows it"
_FALLBACKS = (  # families with wide coverage that systems commonly have, after matplotlib's own DejaVu Sans
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "PingFang SC", "Hiragino Sans", "Microsoft YaHei"),
    *("WenQuanYi Zen Hei", "Malgun Gothic", "Noto Sans Devanagari", "Noto Sans Bengali", "Noto Sans Tamil"),
    *("Noto Sans Thai", "Noto Sans Arabic", "Noto Sans Hebrew", "Nirmala UI", "Noto Emoji", "Segoe UI Symbol"),
    *("Symbola", "Noto Sans Symbols", "Noto Sans Symbols2", "Noto Sans Symbols 2", "Noto Sans", "Arial Unicode MS"),
)


def picture(
    attribution: Attribution,
    normalise: Literal["absolute", "layer"] = "absolute",
    special: bool = True,
    scale_special: bool = False,
) -> Figure:
    """The picture of all rows, one below the other; options as in `Attribution.plot`.

    Raises:
        ValueError: an unknown normalisation, or more rows than a picture holds.
    """
    if normalise not in ("absolute", "layer"):
        raise ValueError(f"unknown normalise {normalise!r}; allowed: 'absolute' (one scale), 'layer' (one per layer)")
    if not 0 < len(attribution) <= MOST_ROWS:
        raise ValueError(f"a picture holds 1 to {MOST_ROWS} rows, got {len(attribution)}; draw one: out[i].plot(path)")
    prepared = list(rows(attribution, special, scale_special))
    one_scale = len({row.explained.kind for row in prepared}) == 1
    prepared = rescaled(prepared) if one_scale else prepared
    sizes = [_size(row) for row in prepared]
    figure = figure_of(max(width for width, _ in sizes), sum(height for _, height in sizes))
    grid = figure.add_gridspec(len(prepared), 1, height_ratios=[height for _, height in sizes])
    shared = None
    for place, row in enumerate(prepared):
        axes = figure.add_subplot(grid[place], sharey=shared if row.layers is None else None)
        if row.layers is None:
            shared = axes if one_scale else None
            bars(axes, row)
        else:
            _layers(axes, row, normalise)
        asked = f"▾ {row.places_asked}" if row.places_asked else ""
        grey = "grey: special tokens, not coloured" if any(row.muted) else ""
        headed(axes, f"What speaks for {row.target}?", row.facts, [row.conserved, row.origin, asked, grey])
    return figure


def headed(axes: Axes, question: str, facts: str, notes: Sequence[str]) -> None:
    """Write a question with facts over axes and, in quieter lines below it, notes; empty ones are left out."""
    title, lines = _fitted(question, facts, notes, axes.figure.get_figure(root=True).get_figwidth() - 1.0)
    words = {"parse_math": False, "family": families()}
    axes.set_title(title + "\n" * len(lines), loc="left", fontsize=12, color=INK, **words)  # type: ignore[arg-type]
    text = "\n".join(lines)
    axes.annotate(text, (0, 1), (0, 5), "axes fraction", "offset points", fontsize=9, color=QUIET, **words)  # type: ignore[arg-type]


def titled(figure: FigureBase, question: str, facts: str, notes: Sequence[str]) -> None:
    """The same over a whole figure or a part of one, whose layout makes room for it."""
    width, height = figure.bbox.size / figure.get_figure(root=True).dpi  # type: ignore[union-attr]
    title, lines = _fitted(question, facts, notes, width - 0.3)
    words: dict[str, Any] = {"x": 0.12 / width, "ha": "left", "parse_math": False, "family": families()}
    figure.suptitle(title + "\n" * len(lines), fontsize=12, color=INK, **words)
    words |= {"y": 1 - 0.31 / height, "va": "top", "fontsize": 9, "color": QUIET}
    figure.text(s="\n".join(lines), **words)


def _fitted(question: str, facts: str, notes: Sequence[str], width: float) -> tuple[str, list[str]]:
    """A title of at most so many inches, and the notes below it in lines; facts go there where they don't fit."""
    room = int(width * 11.3)  # characters of 12 points
    title, below = f"{question}   {facts}", list(notes)
    if len(title) > room:
        title, below = shorten(question, room, note=False), [facts, *below]
    lines: list[str] = []
    for note in filter(None, below):
        if lines and len(lines[-1]) + len(note) <= width * 15.5:  # characters of 9 points
            lines[-1] += f"  ·  {note}"
        else:
            lines.append(note)
    return drawable(title), [drawable(line) for line in lines]


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure in the format that the file's ending names.

    Raises:
        ValueError: matplotlib has no such format.
    """
    form = os.path.splitext(path)[1].lstrip(".").lower()
    known = figure.canvas.get_supported_filetypes()
    if form not in known:
        raise ValueError(f"no picture format for {os.fspath(path)!r}; end the name in .png, .pdf or .svg")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=form, dpi=160)
    write(path, buffer.getvalue())


def written(figure: Figure, path: str | os.PathLike[str] | None) -> Figure:
    """The figure, with a word on boxes where it has any; and in a file too if `path` names one."""
    below = "" if figure._supxlabel is None else figure._supxlabel.get_text()  # type: ignore[attr-defined]
    if _WORD not in below and any(_BOX in text.get_text() for text in figure.findobj(Text)):  # type: ignore[attr-defined]
        look = {"x": 0.01, "ha": "left", "fontsize": 8, "color": QUIET, "parse_math": False, "family": families()}
        figure.supxlabel(f"{below}\n{_WORD}".lstrip(), **look)
    if path is not None:
        save(figure, path)
    return figure


def figure_of(width: float, height: float, constrained: bool = True) -> Figure:
    """A figure of that many inches, without pyplot."""
    figure = Figure(figsize=(width, height), dpi=100, facecolor="white", layout="constrained" if constrained else None)
    FigureCanvasAgg(figure)
    return figure


def _size(row: Row) -> tuple[float, float]:
    columns = min(_COLUMNS, len(row.tokens))
    width = min(WIDEST, max(7.5, 2.2 + columns * (0.42 if columns <= 40 else 0.2)))
    layers = 9 if row.layers is None else row.layers.shape[0]
    longest = min(16, max(len(listed(token, 16, note=False)) for token in row.tokens))
    below = longest * (0.072 if columns <= 40 else 0.068) + 0.35  # inches of the tokens' names
    return width, 0.95 + max(1.6, min(11.0, layers * (0.27 if layers <= 20 else 0.18))) + below


def _layers(axes: Axes, row: Row, normalise: str) -> None:
    scores, labels, muted, width = binned(row, _COLUMNS)
    data = np.asarray(scores.numpy(), dtype=float)
    shown = np.where(np.asarray(muted), np.nan, data)
    if normalise == "layer":
        peaks = np.nanmax(np.abs(shown), axis=1, keepdims=True)
        shown, end = shown / np.where(peaks > 0, peaks, 1.0), 1.0
        name = "share of the layer's strongest"
    else:
        end = row.scale or float(np.nanmax(np.abs(shown), initial=0.0)) or 1.0
        name = f"relevance ({unit(row.explained.kind)})"
    beyond = bool((np.nan_to_num(np.abs(shown)) > end * 1.001).any())
    image = axes.imshow(shown, cmap=colormap(), norm=Normalize(-end, end), aspect="auto", origin="lower")
    for column in np.flatnonzero(muted):
        axes.axvspan(column - 0.5, column + 0.5, facecolor="#eceef1", edgecolor="#c9cdd4", hatch="////", linewidth=0)
    if len(labels) <= 100:  # beyond, lines would cover what they part
        axes.set_xticks(np.arange(-0.5, len(labels)), minor=True)
        axes.set_yticks(np.arange(-0.5, len(data)), minor=True)
        axes.grid(which="minor", color="#eceef1", linewidth=0.6)
    every = max(1, -(-len(data) // 18))
    shown_layers = [0, *range(1, len(data), every)]  # the embeddings, L0, ...
    axes.set_yticks(shown_layers, [row.layer_names[i] for i in shown_layers], fontsize=8, color=QUIET)
    _columns(axes, row, labels, width, np.nan_to_num(np.abs(shown)).max(0, initial=0.0))
    color_bar(axes, image, end, name, max(1.6, min(11.0, len(data) * 0.2)), beyond)


def color_bar(
    axes: Axes | Sequence[Axes], image: Any, end: float, name: str, height: float, beyond: bool = False
) -> None:
    """The legend of a map whose full colours are at -end and end.

    Args:
        axes: where the map is, or the maps are.
        image: a map.
        end: of the scale.
        name: of the scores, with their unit.
        height: of the axes together, in inches.
        beyond: whether scores are further out than `end`.
    """
    one = axes[0] if isinstance(axes, Sequence) else axes
    long = min(height, _BAR_LONG)
    bar = one.figure.colorbar(  # type: ignore[union-attr]
        image,
        ax=axes,  # type: ignore[arg-type]
        extend="both" if beyond else "neither",
        extendfrac=0.1 / long,
        pad=0.12 / one.figure.get_figure(root=True).get_figwidth(),
        fraction=0.03,
        shrink=long / height,
        aspect=long / _BAR_WIDE,
    )
    bar.set_ticks([-end, 0, end], labels=[f"{amount(-end)} lowers", "0", f"+{amount(end)} raises"])
    bar.ax.tick_params(labelsize=8, length=0, labelcolor=QUIET)
    bar.set_label(name, fontsize=8, color=QUIET)
    bar.outline.set_visible(False)  # type: ignore[operator]


def bars(axes: Axes, row: Row) -> None:
    """One bar per token."""
    scores, labels, muted, width = binned(row, _COLUMNS)
    heights = np.asarray(scores[0].numpy(), dtype=float)
    shades = [
        "#c9cdd4" if hidden else colors.css(colors.diverging(0.85 if height > 0 else -0.85))
        for height, hidden in zip(heights, muted, strict=True)
    ]
    axes.bar(np.arange(len(heights)), heights, color=shades, width=0.78)
    axes.axhline(0, color=QUIET, linewidth=0.8)
    axes.set_xlim(-0.6, len(heights) - 0.4)
    axes.set_ylabel(f"relevance ({unit(row.explained.kind)})", fontsize=9, color=QUIET)
    axes.tick_params(axis="y", labelsize=8, labelcolor=QUIET)
    axes.yaxis.grid(True, color="#eceef1")
    axes.set_axisbelow(True)
    _columns(axes, row, labels, width, np.where(muted, 0.0, np.abs(heights)))
    if row.scale and (np.abs(heights) > 1.001 * row.scale).any():  # special tokens, which don't set the scale
        low = 1.1 * row.scale if (heights < 0).any() else 0.0
        high = 1.1 * row.scale if (heights > 0).any() else 0.0
        axes.set_ylim(-low, high)
        for place in np.flatnonzero((heights > high) | (heights < -low)).tolist():
            end, side = (high, "top") if heights[place] > 0 else (-low, "bottom")
            axes.text(place, end, amount(float(heights[place])), fontsize=7, color=INK, ha="center", va=side)


def _columns(axes: Axes, row: Row, labels: list[str], width: int, strengths: np.ndarray) -> None:
    """Name the columns, and mark those at which the explained prediction is made."""
    inches = (axes.figure.get_figure(root=True).get_figwidth() - 2.2) / max(1, len(labels))
    named = token_axis(axes, "x", labels, strengths, inches)
    axes.tick_params(which="both", length=0, pad=6)
    axes.spines[:].set_visible(False)
    for column in sorted({place // width for place in row.asked}):
        above = axes.get_xaxis_transform()
        axes.plot([column], [1.0], marker="v", markersize=6, color=INK, clip_on=False, transform=above)
    notes = [f"each column sums {width} neighbouring tokens and names the first"] if width > 1 else []
    notes += [f"{named} of {len(labels)} columns are named, the strongest"] if named < len(labels) else []
    axes.set_xlabel("; ".join(notes), fontsize=8, color=QUIET)


def token_axis(axes: Axes, side: Literal["x", "y"], tokens: Sequence[str], strengths: np.ndarray, inches: float) -> int:
    """Name the cells of an axis by their tokens; where not all have room, the strongest.

    Args:
        axes: with a cell at each whole number.
        side: which axis.
        tokens: one for each cell.
        strengths: [cell], which are named first.
        inches: how long a cell is.

    Returns:
        How many are named.
    """
    axis = axes.xaxis if side == "x" else axes.yaxis
    size = 10 if inches >= 0.3 else 8 if inches >= 0.13 else 7
    apart = size * 1.15 / 72 / inches  # cells that a line of text takes
    free = np.ones(len(tokens), dtype=bool)
    chosen = []
    for place in np.argsort(-np.asarray(strengths), kind="stable"):
        if free[place]:
            chosen.append(int(place))
            free[np.abs(np.arange(len(tokens)) - place) < apart] = False
    chosen.sort()
    axis.set_ticks(chosen, [drawable(listed(str(tokens[i]), 16, note=False)) for i in chosen])
    for tick in axis.get_ticklabels():
        tick.set(fontsize=size, parse_math=False, fontfamily=families(), rotation_mode="anchor")
        if side == "x":
            angle = 55 if inches >= 0.3 else 90
            tick.set(rotation=angle, horizontalalignment="right", verticalalignment="center")
    return len(chosen)


@lru_cache(maxsize=1)
def colormap() -> LinearSegmentedColormap:
    """The house's diverging scale, for scores in [-end, end]."""
    steps = [colors.css(colors.diverging(step / 32)) for step in range(-32, 33)]
    return LinearSegmentedColormap.from_list("lxt", steps)


@lru_cache(maxsize=1)
def families() -> list[str]:
    """The installed fonts that cover much, in order of preference."""
    installed = {entry.name for entry in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in _FALLBACKS if name in installed)]


@lru_cache(maxsize=1)
def _characters() -> frozenset[int]:
    paths = (font_manager.findfont(name) for name in families())
    return frozenset().union(*(font_manager.get_font(path).get_charmap() for path in paths))


def drawable(text: str) -> str:
    """The text with a box for each character that no font has; joiners only shape what is beside them."""
    have = _characters()
    keep = "\n\u200c\u200d\ufe0e\ufe0f"
    kept = (c if c in keep or ord(c) in have else _BOX for c in text)
    return "".join(c for c in kept if c not in keep[1:])
