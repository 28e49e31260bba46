"""Pages of coloured text with matplotlib: words on coloured backgrounds, wrapped like a paragraph."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lxt.show import colors
from lxt.show.figure import INK, QUIET, drawable, families, figure_of

__all__ = ["Block", "Word", "text_pages"]

Color = colors.RGB | None
Word = tuple[str, Color]  # what to print, and its background

_LINES = 60  # of text on one page


class Block(NamedTuple):
    """A paragraph of coloured words between plain lines; the first of `head` is its title."""

    words: Sequence[Word]
    head: Sequence[str] = ()
    foot: Sequence[str] = ()


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
    quiet = {**look, "fontsize": 9.5, "color": QUIET}
    head, foot = [*block.head], [*block.foot]
    for lines in _pages(_wrapped(block.words, width - 2 * margin, look)):
        top = margin + 0.26 * len(head) + (0.12 if head else 0)
        height = top + lead * len(lines) + 0.24 * len(foot) + margin
        figure = figure_of(width, height, constrained=False)
        for number, text in enumerate(head):
            style = quiet if number else {**look, "fontsize": 12, "color": INK}
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
                ink = INK if background is None else colors.css(colors.ink(background))
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
