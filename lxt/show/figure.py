"""Pictures with matplotlib: layers × tokens, one bar per token, or the coloured text itself.

Everything is drawn on a Figure of its own, so no global state of pyplot is touched and no window can open. Labels are
plain text, never mathtext. A character that no installed font has is drawn as a box.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lxt.show import colors
from lxt.show.files import write
from lxt.show.rows import Row, binned, rows, unit
from lxt.show.words import amount, listed, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lxt.attribution import Attribution

__all__ = [
    "Block",
    "Word",
    "bars",
    "colormap",
    "drawable",
    "families",
    "figure_of",
    "picture",
    "save",
    "text_pages",
    "written",
]

Color = colors.RGB | None
Word = tuple[str, Color]  # what to print, and its background

_ROWS = 12  # rows of one picture; more would be too tall to read
_COLUMNS = 220  # beyond, neighbouring tokens are summed: labels would be smaller than print
_FALLBACKS = (  # families with wide coverage that systems commonly have, after matplotlib's own DejaVu Sans
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "PingFang SC", "Hiragino Sans", "Microsoft YaHei"),
    *("WenQuanYi Zen Hei", "Malgun Gothic", "Noto Sans Devanagari", "Noto Sans Bengali", "Noto Sans Tamil"),
    *("Noto Sans Thai", "Noto Sans Arabic", "Noto Sans Hebrew", "Nirmala UI", "Noto Emoji", "Segoe UI Symbol"),
    *("Symbola", "Noto Sans Symbols", "Noto Sans Symbols2", "Noto Sans Symbols 2", "Noto Sans", "Arial Unicode MS"),
)
_INK, _QUIET = "#16181d", "#5a616c"
_LINES = 60  # of text on one page


class Block(NamedTuple):
    """A paragraph of coloured words between plain lines; the first of `head` is its title."""

    words: Sequence[Word]
    head: Sequence[str] = ()
    foot: Sequence[str] = ()


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
    if not 0 < len(attribution) <= _ROWS:
        raise ValueError(f"a picture holds 1 to {_ROWS} rows, got {len(attribution)}; draw one: out[i].plot(path)")
    prepared = list(rows(attribution, special, scale_special))
    sizes = [_size(row) for row in prepared]
    figure = figure_of(max(width for width, _ in sizes), sum(height for _, height in sizes))
    grid = figure.add_gridspec(len(prepared), 1, height_ratios=[height for _, height in sizes])
    for place, row in enumerate(prepared):
        axes = figure.add_subplot(grid[place])
        if row.layers is None:
            bars(axes, row)
        else:
            _layers(axes, row, normalise)
        title = f"What speaks for {row.target}?   {row.value}\n"
        axes.set_title(drawable(title), loc="left", fontsize=12, color=_INK, parse_math=False, family=families())
        note = "  ·  ".join([row.conserved, f"{shorten(row.model)}, {shorten(row.rules)}"])
        note += "  ·  grey: special tokens, not coloured" if any(row.muted) else ""
        quiet = {"fontsize": 9, "color": _QUIET, "parse_math": False, "family": families()}
        axes.annotate(drawable(note), (0, 1), (0, 5), "axes fraction", "offset points", **quiet)
    return figure


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
    """The figure, and in a file too if `path` names one."""
    if path is not None:
        save(figure, path)
    return figure


def text_pages(blocks: Sequence[Block]) -> bytes:
    """A PDF of coloured text, each block on pages of its own."""
    from matplotlib.backends.backend_pdf import PdfPages

    buffer = io.BytesIO()
    with PdfPages(buffer) as pages:
        for block in blocks:
            for figure in _text(block):
                pages.savefig(figure)
    return buffer.getvalue()


def _text(block: Block) -> Iterator[Figure]:
    """Words on coloured backgrounds, wrapped like a paragraph; a line break in a word is one in the picture."""
    width, margin, lead = 8.0, 0.3, 0.34  # inches
    look = {"fontsize": 13, "parse_math": False, "family": families(), "va": "baseline"}
    quiet = {**look, "fontsize": 9.5, "color": _QUIET}
    head, foot = [*block.head], [*block.foot]
    for lines in _pages(_wrapped(block.words, width - 2 * margin, look)):
        top = margin + 0.26 * len(head) + (0.12 if head else 0)
        height = top + lead * len(lines) + 0.24 * len(foot) + margin
        figure = figure_of(width, height, constrained=False)
        for number, text in enumerate(head):
            style = quiet if number else {**look, "fontsize": 12, "color": _INK}
            figure.text(margin / width, 1 - (margin + 0.26 * number + 0.1) / height, drawable(text), **style)
        for number, text in enumerate(foot):
            base = (margin + 0.24 * (len(foot) - 1 - number)) / height
            figure.text(margin / width, base, drawable(text), **quiet)
        for number, line in enumerate(lines):
            base = 1 - (top + lead * number + 0.22) / height
            for piece, background, left, length in line:
                x = (margin + left) / width
                if background is not None:
                    box = Rectangle((x, base - 0.07 / height), length / width, 0.28 / height, lw=0)
                    box.set(transform=figure.transFigure, facecolor=colors.css(background))
                    figure.add_artist(box)
                ink = _INK if background is None else colors.css(colors.ink(background))
                figure.text(x, base, piece, color=ink, **look)
        yield figure
        head = [f"{text} (continued)" for text in block.head[:1]]


def _pages(lines: list[list]) -> Iterator[list[list]]:
    for start in range(0, max(1, len(lines)), _LINES):
        yield lines[start : start + _LINES]


def _wrapped(words: Sequence[Word], most: float, look: dict) -> list[list[tuple[str, Color, float, float]]]:
    """Lines of (text, background, left, width), in inches."""
    figure = figure_of(8.0, 1.0, constrained=False)
    known: dict[str, float] = {}

    def inches(text: str) -> float:
        if text not in known:  # the bars keep spaces at the ends from being dropped
            known[text] = max(0.0, _inches(figure, f"|{text}|", look) - _inches(figure, "||", look))
        return known[text]

    def pieces(text: str) -> list[str]:
        if len(text) < 2 or inches(text) <= most:
            return [text]
        return [*pieces(text[: len(text) // 2]), *pieces(text[len(text) // 2 :])]

    lines: list[list[tuple[str, Color, float, float]]] = [[]]
    x = 0.0
    for word, background in words:
        text = drawable(word.rstrip("\n"))
        core = text.lstrip(" ") or text
        x += inches(" ") * (len(text) - len(core)) if lines[-1] else 0.0
        for piece in pieces(core):
            if lines[-1] and x + inches(piece) > most:
                lines.append([])
                x = 0.0
            lines[-1].append((piece, background, x, inches(piece)))
            x += inches(piece)
        if word.endswith("\n"):
            lines.append([])
            x = 0.0
    return lines if lines[-1] else lines[:-1]


def _inches(figure: Figure, text: str, look: dict) -> float:
    artist = figure.text(0, 0, text, **look)
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    width = artist.get_window_extent(renderer).width / figure.dpi
    artist.remove()
    return width


def figure_of(width: float, height: float, constrained: bool = True) -> Figure:
    """A figure of that many inches, without pyplot."""
    figure = Figure(figsize=(width, height), dpi=100, facecolor="white", layout="constrained" if constrained else None)
    FigureCanvasAgg(figure)
    return figure


def _size(row: Row) -> tuple[float, float]:
    columns = min(_COLUMNS, len(row.tokens))
    width = min(30.0, max(7.5, 2.2 + columns * (0.42 if columns <= 40 else 0.2 if columns <= 100 else 0.14)))
    layers = 9 if row.layers is None else row.layers.shape[0]
    return width, min(14.0, 2.0 + max(1.2, layers * (0.27 if layers <= 20 else 0.18)))


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
    axes.set_xticks(np.arange(-0.5, len(labels)), minor=True)
    axes.set_yticks(np.arange(-0.5, len(data)), minor=True)
    axes.grid(which="minor", color="#eceef1", linewidth=0.6)
    every = max(1, -(-len(data) // 16))
    shown_layers = range(0, len(data), every)
    axes.set_yticks(list(shown_layers), [row.layer_names[i] for i in shown_layers], fontsize=8, color=_QUIET)
    _label(axes, labels, width)
    bar = axes.figure.colorbar(
        image, ax=axes, extend="both" if beyond else "neither", pad=0.01, fraction=0.03, aspect=18
    )
    _ticks(bar, end, name)


def _ticks(bar: Any, end: float, name: str) -> None:
    bar.set_ticks([-end, 0, end], labels=[amount(-end), "0", amount(end)])
    bar.ax.tick_params(labelsize=8, length=0, labelcolor=_QUIET)
    bar.set_label(f"← lowers    {name}    raises →", fontsize=8, color=_QUIET)
    bar.outline.set_visible(False)


def bars(axes: Axes, row: Row) -> None:
    """One bar per token."""
    scores, labels, muted, width = binned(row, _COLUMNS)
    heights = np.asarray(scores[0].numpy(), dtype=float)
    shades = [
        "#c9cdd4" if hidden else colors.css(colors.diverging(0.85 if height > 0 else -0.85))
        for height, hidden in zip(heights, muted, strict=True)
    ]
    axes.bar(np.arange(len(heights)), heights, color=shades, width=0.78)
    axes.axhline(0, color=_QUIET, linewidth=0.8)
    axes.set_xlim(-0.6, len(heights) - 0.4)
    axes.set_ylabel(f"relevance ({unit(row.explained.kind)})", fontsize=9, color=_QUIET)
    axes.tick_params(axis="y", labelsize=8, labelcolor=_QUIET)
    axes.yaxis.grid(True, color="#eceef1")
    axes.set_axisbelow(True)
    _label(axes, labels, width)


def _label(axes: Axes, labels: list[str], width: int) -> None:
    size, angle = (10, 55) if len(labels) <= 40 else (8, 90) if len(labels) <= 100 else (7, 90)
    words = [drawable(listed(label, 16, note=False)) for label in labels]
    axes.set_xticks(range(len(words)), words)
    for tick in axes.get_xticklabels():
        tick.set(fontsize=size, rotation=angle, rotation_mode="anchor", parse_math=False, fontfamily=families())
        tick.set(horizontalalignment="right", verticalalignment="center")
    axes.tick_params(which="both", length=0, pad=6)
    axes.spines[:].set_visible(False)
    if width > 1:
        axes.set_xlabel(f"each column sums {width} neighbouring tokens and names the first", fontsize=8, color=_QUIET)


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
    kept = (c if c in keep or ord(c) in have else "□" for c in text)
    return "".join(c for c in kept if c not in keep[1:])
