"""Views of an attention score: the tokens of both its sides, where its query looks, and the heads that made it so."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.text import Text

from lxt.show import colors
from lxt.show.figure import QUIET, drawable, families, figure_of, titled, token_axis
from lxt.show.terminal import print_line, shade
from lxt.show.words import amount, listed, percent, shorten, signed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lxt.qkrelevance import AttentionEntry, AttentionRelevance

__all__ = ["picture", "render", "show"]

_HEADS = 8  # that a picture names
_MARKED = 0.25  # without colour, tokens from this share of the strongest on are marked in the text
_SIDES = (("query", "who looks"), ("key", "what is looked at"))


def show(found: AttentionRelevance, top: int, special: bool) -> None:
    """Print to the terminal, or to the output of the notebook that runs this."""
    render(found, Console(highlight=False), top, special)


def render(found: AttentionRelevance, console: Console, top: int = 6, special: bool = True) -> None:
    """Print to a console; options as in `AttentionRelevance.show`."""
    coloured = console.color_system is not None and not console.no_color
    head = Text.assemble("Why does ", (_question(found), "bold"), "?")
    head.append(f"   {shorten(found.model)} · {shorten(found.rules)}", "dim")
    for line in (head, Text(_looks(found)), Text(_sums(found)), Text()):
        print_line(console, line)
    scale = max((entry.relevance for entry in _tokens(found, None, special)), key=abs, default=0.0)
    for side, meaning in _SIDES:
        text = Text.assemble((f"{side}  ", "bold"), (f"{meaning}: ", "dim"))
        for entry in _tokens(found, side, special):
            shown = shorten(entry.token) or "∅"
            share = entry.relevance / abs(scale) if scale else 0.0
            if coloured:
                text.append(shown, shade(share))
            else:
                text.append(f"«{'+' if share > 0 else '−'}{shown}»" if abs(share) >= _MARKED else shown)
        print_line(console, text)
    console.print()
    for line in _ranked("token", sorted(_tokens(found, None, special), key=lambda entry: -abs(entry.relevance))[:top]):
        print_line(console, line)
    heads = found.top(top, heads=True) if found.query_heads is not None else []
    if heads:
        console.print()
        for line in _ranked("earlier head", heads):
            print_line(console, line)


def picture(found: AttentionRelevance, special: bool = True) -> Figure:
    """Bars of both sides' tokens, a strip of the attention weights, and the earlier heads."""
    keep = [place for place in range(len(found.tokens)) if special or not found.special[place]]
    tokens = [found.tokens[place] for place in keep]
    heads = found.top(_HEADS, heads=True) if found.query_heads is not None else []
    width = min(30.0, max(7.5, 2.2 + 0.42 * len(keep)))
    lower = 0.5 + 0.24 * len(heads) if heads else 0.0
    figure = figure_of(width, 4.6 + lower)
    rows = figure.add_gridspec(3 if heads else 2, 1, height_ratios=[2.6, 0.35, lower] if heads else [2.6, 0.35])
    upper = figure.add_subplot(rows[0])
    places = np.arange(len(keep))
    for offset, side, face in ((-0.2, "query", 0.85), (0.2, "key", 0.45)):
        values = getattr(found, side).double().numpy()[keep]
        shades = [colors.css(colors.diverging(face if value > 0 else -face)) for value in values]
        upper.bar(places + offset, values, 0.38, color=shades, label=f"through the {side}")
    upper.axhline(0, color=QUIET, linewidth=0.6)
    upper.tick_params(length=0, labelbottom=False, labelsize=8)
    upper.spines[:].set_visible(False)
    upper.set_ylabel("relevance (score)", fontsize=8, color=QUIET)
    upper.legend(fontsize=8, frameon=False, loc="upper left")
    notes = [_looks(found), _sums(found), f"{shorten(found.model)}, {shorten(found.rules)}"]
    titled(figure, f"Why does {_question(found)}?", f"score {amount(found.value, 4)}", notes)
    _strip(figure.add_subplot(rows[1], sharex=upper), found.weights.double().numpy()[keep], tokens, width)
    if heads:
        _heads(figure.add_subplot(rows[2]), heads)
    return figure


def _strip(axes: Axes, weights: np.ndarray, tokens: list[str], width: float) -> None:
    axes.imshow(weights[None], cmap="Greys", vmin=0, vmax=1, aspect="auto")
    axes.set_yticks([0], ["looks at"], fontsize=8, color=QUIET)
    token_axis(axes, "x", tokens, weights, (width - 2.2) / max(1, len(tokens)))
    axes.tick_params(length=0, pad=6)


def _heads(axes: Axes, heads: list[AttentionEntry]) -> None:
    values = [entry.relevance for entry in heads]
    shades = [colors.css(colors.diverging(0.85 if value > 0 else -0.85)) for value in values]
    axes.barh(range(len(heads)), values, color=shades, height=0.7)
    names = [
        f"{entry.head} at {listed(entry.token, 16, note=False)} ({entry.position}), {entry.side}" for entry in heads
    ]
    axes.set_yticks(range(len(heads)), [drawable(name) for name in names])
    for tick in axes.get_yticklabels():
        tick.set(fontsize=8, parse_math=False, fontfamily=families())
    axes.invert_yaxis()
    axes.axvline(0, color=QUIET, linewidth=0.6)
    axes.set_xlabel("relevance of earlier heads (score)", fontsize=8, color=QUIET)
    axes.tick_params(axis="both", length=0, labelsize=8)
    axes.spines[:].set_visible(False)


def _question(found: AttentionRelevance) -> str:
    looking, seen = (
        f"'{shorten(found.tokens[place])}' ({place})" for place in (found.query_position, found.key_position)
    )
    return f"L{found.layer}H{found.head} at {looking} look at {seen}"


def _looks(found: AttentionRelevance) -> str:
    share = percent(float(found.weights[found.key_position]))
    if found.contrast is None:
        return f"attention weight {share}, score {amount(found.score, 4)}, which is explained"
    other = "the mean of all keys that it sees"
    if found.contrast != "mean":
        other = f"that of '{shorten(found.tokens[found.contrast])}' ({found.contrast})"
    return (
        f"attention weight {share}, score {amount(found.score, 4)}; explained is what it has over {other}: "
        f"{amount(found.value, 4)}"
    )


def _sums(found: AttentionRelevance) -> str:
    query, key = float(found.query.double().sum()), float(found.key.double().sum())
    line = f"Σ relevance {amount(query, 4)} through the query + {amount(key, 4)} through the key"
    return f"{line} of {amount(found.value, 4)}"


def _tokens(found: AttentionRelevance, side: str | None, special: bool) -> list[AttentionEntry]:
    sides = [side] if side else [name for name, _ in _SIDES]
    entries = [entry for one in sides for entry in found._of_tokens(one)]  # type: ignore[arg-type]
    return [entry for entry in entries if special or not found.special[entry.position]]


def _ranked(what: str, entries: list[AttentionEntry]) -> list[Text]:
    rows = [
        (signed(entry.relevance), entry.side, entry.head or "", f"{listed(entry.token, 18)} ({entry.position})")
        for entry in entries
    ]
    widest = max((len(row[0]) for row in rows), default=0)
    lines = [
        Text(f"{value:>{widest}}  {side:<5}  {head + '  ' if head else ''}{name}") for value, side, head, name in rows
    ]
    return [Text(f"{'relevance':>{widest}}  through, {what}", "dim"), *lines] if lines else []
