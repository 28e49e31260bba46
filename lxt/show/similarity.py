"""Views of a Similarity: both sentences on one colour scale, what they share out, the strongest pairs of tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from lxt.show import grid, html, terminal
from lxt.show.figure import bars, drawable, families, figure_of
from lxt.show.rows import Row, rescaled, rows
from lxt.show.words import amount, listed, percent, shorten, signed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lxt.sentences import Similarity

__all__ = ["fragment", "page", "picture", "render", "show"]


def show(similarity: Similarity, scale_special: bool, top: int) -> None:
    """Display in the notebook that runs this, otherwise print."""
    terminal.display(
        lambda: fragment(similarity, scale_special), lambda console: render(similarity, console, scale_special, top)
    )


def render(similarity: Similarity, console: Console, scale_special: bool = False, top: int = 6) -> None:
    """Print to a console; options as in `Similarity.show`."""
    coloured = console.color_system is not None and not console.no_color
    sides = _sides(similarity, scale_special)
    head = Text.assemble("What makes these alike?  ", (f"cosine {amount(similarity.value, 4)}", "bold"))
    head.append(f"   {shorten(similarity.model)} · {shorten(similarity.rules)} · {similarity.pooling} pooling", "dim")
    lines = [head, Text(), *(terminal.running(side, coloured) for side in sides), Text()]
    lines.append(terminal.legend(sides[0]) if coloured else Text("«+token» raises it, «−token» lowers it"))
    lines += [Text(_conserved(similarity)), *([Text(_note(sides), style="dim")] if _note(sides) else [])]
    for name, side in zip("ab", sides, strict=True):
        lines += [Text(), Text(f"sentence {name}", style="dim"), *terminal.ranking(side, coloured, top, console.width)]
    if similarity.pairs is not None:
        lines += [Text(), Text("strongest pairs", style="dim")]
        lines += [Text(f"{signed(score)}  {one} – {other}") for score, one, other in _pairs(similarity, top)]
    for line in lines:
        terminal.print_line(console, line)
    if similarity.pairs is not None:
        console.print()
        grid.render(_grid(similarity), console)


def page(similarity: Similarity, scale_special: bool = False) -> str:
    """The whole page; options as in `Similarity.show`."""
    title = f"cosine {amount(similarity.value, 4)} explained"
    return html.document(
        title, _section(similarity, scale_special), similarity.model, similarity.rules, similarity.versions
    )


def fragment(similarity: Similarity, scale_special: bool = False) -> str:
    """The same for a notebook's output cell."""
    return html.boxed(_section(similarity, scale_special), similarity.model, similarity.rules)


def picture(similarity: Similarity) -> Figure:
    """The pairs as a heat map, else a bar for each token."""
    if similarity.pairs is None:
        return _bars(similarity)
    title = f"What makes these alike?   cosine {amount(similarity.value, 4)}"
    total = float(similarity.pairs.sum())
    return grid.figure(
        _grid(similarity), title, f"pairs sum to {amount(total, 4)}  ·  {similarity.model}, {similarity.rules}"
    )


def _bars(similarity: Similarity) -> Figure:
    """A bar for each token, one sentence below the other, on one scale."""
    sides = _sides(similarity, scale_special=False)
    words = {"loc": "left", "parse_math": False, "family": families()}
    made = figure_of(max(8.0, 1.5 + 0.42 * max(len(side.tokens) for side in sides)), 6.4)
    for axes, side, text in zip(made.subplots(2, 1, sharey=True), sides, similarity.texts, strict=True):
        bars(axes, side)
        axes.set_title(drawable(shorten(text or "", 70)), fontsize=10, **words)
    head = f"What makes these alike?   cosine {amount(similarity.value, 4)}"
    note = f"{_conserved(similarity)}  ·  {shorten(similarity.model)}, {shorten(similarity.rules)}"
    made.suptitle(drawable(head), x=0.01, ha="left", fontsize=12, parse_math=False, family=families())
    made.supxlabel(drawable(note), x=0.01, ha="left", fontsize=8, parse_math=False, family=families())
    return made


def _sides(similarity: Similarity, scale_special: bool) -> list[Row]:
    """Both sentences, scaled alike so that a colour means the same in both."""
    sides = rescaled(list(rows(similarity.attribution, scale_special=scale_special)))
    return [replace(side, explained=replace(side.explained, kind="cosine")) for side in sides]


def _conserved(similarity: Similarity) -> str:
    first, second = (float(side.double().sum()) for side in similarity.relevance)
    line = f"Σ relevance {amount(first)} + {amount(second)} of cosine {amount(similarity.value, 4)}"
    if not similarity.value or abs(similarity.conservation) >= 10:
        return line
    left = "" if abs(similarity.conservation - 1) < 0.005 else "; biases and softmax account for the rest"
    return f"{line} ({percent(similarity.conservation)}{left})"


def _note(sides: list[Row]) -> str:
    apart = sum(side.apart or 0.0 for side in sides)
    return f"special tokens hold {amount(apart)} of it and are not coloured" if apart else ""


def _pairs(similarity: Similarity, top: int) -> list[tuple[float, str, str]]:
    assert similarity.pairs is not None
    first, second = similarity.tokens
    order = similarity.pairs.abs().flatten().argsort(descending=True)[:top].tolist()
    places = [divmod(place, len(second)) for place in order]
    return [
        (
            float(similarity.pairs[i, j]),
            listed(first[i].strip(" ") or first[i]),
            listed(second[j].strip(" ") or second[j]),
        )
        for i, j in places
    ]


def _grid(similarity: Similarity) -> grid.Grid:
    assert similarity.pairs is not None
    muted = [False] * len(similarity.tokens[1])
    names = [[token.lstrip(" ") or token for token in tokens] for tokens in similarity.tokens]
    return grid.Grid(names[0], names[1], similarity.pairs.tolist(), muted, unit="cosine")


def _section(similarity: Similarity, scale_special: bool) -> str:
    sides = _sides(similarity, scale_special)
    note = f" <span class=quiet>· {html.text(_note(sides))}</span>" if _note(sides) else ""
    value = f"cosine {amount(similarity.value, 4)}"
    parts = [
        f"<section>\n<h2>What makes these alike? <small>{html.text(value)}</small></h2>",
        *(html.running(side) for side in sides),
        html.legend(sides[0]),
        f"<p>{html.text(_conserved(similarity))}{note} <span class=quiet>· {similarity.pooling} pooling</span></p>",
        *(html.ranking(side) for side in sides),
    ]
    if similarity.pairs is not None:
        parts += ["<h3>Pairs of tokens</h3>", grid.html(_grid(similarity))]
        parts.append(f"<p class=quiet>They sum to {amount(float(similarity.pairs.sum()), 4)}.</p>")
    return "\n".join([*parts, "</section>"])
