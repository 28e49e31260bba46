"""The terminal view: coloured tokens first, then what they add up to, then the strongest ones by name.

Without colour (NO_COLOR, a pipe, a dumb terminal) the strongest tokens stand between marks in the text, and the ranked
list tells the rest; without Unicode everything is written in what the encoding has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console
from rich.style import Style
from rich.text import Text

from lxt.show import colors
from lxt.show.rows import Row, rows, unit
from lxt.show.words import amount, listed, shorten, signed

if TYPE_CHECKING:
    from lxt.attribution import Attribution

__all__ = ["display", "legend", "print_line", "ranking", "render", "running", "shade", "show"]

_FAINT = 0.06  # of the scale: below it a token keeps the terminal's own colours
_FILLED = 0.2  # from here on the background is coloured; in between only the letters are
_MARKED = 0.25  # without colour, tokens from this share of the scale on are marked in the text
_BAR = 24
_PLAIN = str.maketrans(
    {"Σ": "sum of", "−": "-", "…": "...", "█": "#", "▏": "|", "·": "-", "␣": "_", "«": "<<", "»": ">>"}
)


def show(attribution: Attribution, special: bool, scale_special: bool, top: int, limit: int) -> None:
    """Display in the notebook that runs this, otherwise print; at most `limit` rows."""

    def html() -> str:
        from lxt.show.html import fragment

        return fragment(attribution, limit, special, scale_special)

    display(html, lambda console: render(attribution, console, special, scale_special, top, limit))


def display(html: Callable[[], str], render: Callable[[Console], None]) -> None:
    """Show `html` in the notebook that runs this, otherwise `render` to the terminal."""
    console = Console(highlight=False)
    if not console.is_jupyter:
        render(console)
        return
    from IPython import display  # type: ignore[import-not-found]

    display.display(display.HTML(html()))


def render(
    attribution: Attribution,
    console: Console,
    special: bool = True,
    scale_special: bool = False,
    top: int = 8,
    limit: int = 20,
) -> None:
    """Print to a console; options as in `Attribution.show`."""
    for row in rows(attribution, special, scale_special):
        if row.number == limit:
            left = len(attribution) - limit
            print_line(
                console, Text(f"… {left} more rows: out[{limit}].show() and on, or out.to_html(path)", style="dim")
            )
            break
        if row.number:
            print_line(console, Text("─" * min(60, console.width), style="dim"))
        coloured = console.color_system is not None and not console.no_color
        for line in _lines(row, coloured, top, console.width):
            print_line(console, line)


def print_line(console: Console, line: Text) -> None:
    """Print in what the console's encoding has."""
    encoding = getattr(console.file, "encoding", None) or "utf-8"
    try:
        line.plain.encode(encoding)
    except UnicodeEncodeError:
        text = line.plain.translate(_PLAIN).encode(encoding, "backslashreplace").decode(encoding)
        line = Text(text)
    console.print(line, soft_wrap=False, overflow="fold")


def _lines(row: Row, coloured: bool, top: int, width: int) -> list[Text]:
    head = Text.assemble(("What speaks for ", ""), (row.target, "bold"), (f"?  {row.value}", ""))
    head.append(f"   {shorten(row.model)} · {shorten(row.rules)}", "dim")
    lines = [head, Text(), running(row, coloured), Text()]
    lines.append(legend(row) if coloured else Text("«+token» raises it, «−token» lowers it"))
    if row.predicted:
        lines.append(Text(f"predicts {row.predicted}"))
    if row.places_asked:
        lines.append(Text(row.places_asked))
    lines.append(Text(row.conserved))
    if row.note:
        lines.append(Text(row.note, style="dim"))
    return [*lines, Text(), *ranking(row, coloured, top, width)]


def running(row: Row, coloured: bool) -> Text:
    """The row's tokens as running text."""
    text, fresh = Text(), True
    for i, token in enumerate(row.tokens):
        word = token.lstrip(" ") or token
        text.append(" " * (len(token) - len(word)))
        shown = shorten(word) if word else "∅"
        line = " underline" if i in row.asked else ""
        if row.muted[i]:
            text.append(shown, f"dim{line}")
        elif coloured:
            text.append(shown, shade(row.fractions[i]) + Style.parse(line or "none"))
        elif abs(row.fractions[i]) >= _MARKED:
            text.append(f"«{'+' if row.fractions[i] > 0 else '−'}{shown}»", f"bold{line}")
        else:
            text.append(shown, line.strip())
        breaks = "\n" in token
        if breaks and not fresh:
            text.append("\n")
        fresh = breaks
    return text


def shade(fraction: float) -> Style:
    """The style of a score that is this share of the scale."""
    if abs(fraction) < _FAINT:
        return Style()
    color = colors.terminal(fraction)
    if abs(fraction) < _FILLED:
        return Style(color=colors.css(colors.weak(fraction)))
    return Style(color=colors.css(colors.ink(color)), bgcolor=colors.css(color), bold=abs(fraction) > 0.5)


def legend(row: Row) -> Text:
    """The colour scale."""
    end = amount(row.scale)
    text = Text(f"lowers −{end} ", style="dim")
    for step in range(-6, 7):
        text.append("  " if step else " 0 ", shade(step / 6))
    text.append(f" +{end} raises · {unit(row.explained.kind)}", "dim")
    return text


def ranking(row: Row, coloured: bool, top: int, width: int) -> list[Text]:
    """The `top` most relevant tokens, each with its bar."""
    best = row.ranked(top)
    if not best:
        return [Text("no token has any relevance", style="dim")]
    room = max(8, min(40, width - _BAR - 20))
    names = [Text(listed(row.tokens[i], min(18, room))) for i in best]
    for i, name in zip(best, names, strict=True):
        which = f" ({row.places[i]})" if row.tokens.count(row.tokens[i]) > 1 else ""
        name.truncate(room - len(which), overflow="ellipsis")
        name.append(which)
    longest = max(name.cell_len for name in names)
    scores = [signed(row.scores[i]) for i in best]
    widest = max(map(cell_len, scores))
    lines = []
    for i, name, score in zip(best, names, scores, strict=True):
        bar = "█" * max(1, round(_BAR * abs(row.scores[i]) / row.scale))
        end = colors.css(colors.terminal(1.0 if row.scores[i] > 0 else -1.0))
        line = Text.assemble(f"{score:>{widest}}  ", name, " " * (longest - name.cell_len + 2))
        lines.append(line.append(bar, Style(color=end) if coloured else ""))
    return lines
