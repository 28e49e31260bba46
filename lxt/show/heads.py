"""Layers × heads (or experts) as a map, and the strongest by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lxt.latents.names import parts_of as kind_of_parts
from lxt.latents.ranking import label, letter
from lxt.show import colors
from lxt.show.figure import INK, MOST_ROWS, QUIET, WIDEST, color_bar, colormap, figure_of, titled
from lxt.show.parts import Parts, parts_of, whole
from lxt.show.rows import rows, unit
from lxt.show.words import signed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lxt.attribution import Attribution

__all__ = ["picture", "ranked_bars"]

_WIDEST = 256  # columns; more could not be told apart
_LIST = 2.3  # inches beside the map
_LINE = 0.3  # inches of an entry
_NAMED = 0.52  # inches that a cell must have for a name


def picture(
    attribution: Attribution, token: int | None = None, special: bool = True, top: int = 8, latent: str = "head"
) -> Figure:
    """The maps of all rows, one below the other, on one scale; options as in `Attribution.plot_heads`.

    Raises:
        ValueError: the latent was not kept, or has more columns or rows than a picture holds.
    """
    if not 0 < len(attribution) <= MOST_ROWS:
        raise ValueError(
            f"a picture holds 1 to {MOST_ROWS} rows, got {len(attribution)}; draw one: out[i].plot_heads(path)"
        )
    found = [parts_of(attribution, latent, number, token, special) for number in range(len(attribution))]
    layers, heads = found[0].scores.shape
    if heads > _WIDEST:
        raise ValueError(
            f"a map holds {_WIDEST} parts of a layer, and {latent!r} has {heads}; out.latents[{latent!r}].top() lists "
            "the strongest"
        )
    noun = kind_of_parts(latent) or "feature"
    of = "" if latent == noun else f"{latent} of "
    cell = 0.66 if heads <= 12 else 0.34 if heads <= 40 else (WIDEST - _LIST - 1.6) / heads
    width = min(WIDEST, max(7.5, 1.6 + heads * cell + _LIST))
    height = min(14.0, 1.9 + max(1.6, layers * (0.34 if layers <= 16 else 0.24)))
    figure = figure_of(width, height * len(found))
    panels = figure.subfigures(len(found), 1, squeeze=False)[:, 0]
    share = max(3.0, width - _LIST - 1.2)
    prepared = list(rows(attribution))
    alike = len({row.explained.kind for row in prepared}) == 1
    ends = [float(one.scores.abs().max()) for one in found]
    for row, one, panel, own in zip(prepared, found, panels, ends, strict=True):
        end = (max(ends) if alike else own) or 1.0
        best = one.strongest(whole(top))
        notes = [f"{of}each {noun}: {one.where}", one.note, row.origin]
        titled(panel, f"Which {noun}s speak for {row.target}?", row.facts, notes)
        axes, beside = panel.subplots(1, 2, width_ratios=[share, _LIST])
        names = [label(latent, one.layers[layer], head) for layer, head in best]
        named = dict(zip(best, names, strict=True))
        inches = (share / max(1, heads), height - 1.0)
        _map(axes, one, named, letter(latent), end, inches, f"relevance ({unit(row.explained.kind)})")
        ranked_bars(beside, names, [float(one.scores[place]) for place in best], end, height - 1.0)
    return figure


def _map(
    axes: Axes,
    one: Parts,
    named: dict[tuple[int, int], str],
    letter: str,
    end: float,
    inches: tuple[float, float],
    scale: str,
) -> None:
    """The map with its strongest named; `inches` are the width of a cell and the height of the axes."""
    cell, height = inches
    scores = one.scores.numpy()
    layers, heads = scores.shape
    image = axes.imshow(scores, cmap=colormap(), norm=Normalize(-end, end), aspect="auto", origin="lower")
    axes.set_xticks(np.arange(-0.5, heads), minor=True)
    axes.set_yticks(np.arange(-0.5, layers), minor=True)
    axes.grid(which="minor", color="#eceef1", linewidth=0.6)
    for ticks, numbers, prefix in ((axes.xaxis, range(heads), letter), (axes.yaxis, one.layers, "L")):
        shown = range(0, len(numbers), max(1, -(-len(numbers) // 18)))
        ticks.set_ticks(list(shown), [f"{prefix}{numbers[i]}" for i in shown])
    axes.tick_params(which="both", length=0, pad=5, labelsize=8, labelcolor=QUIET)
    axes.spines[:].set_visible(False)
    for rank, ((layer, head), name) in enumerate(named.items(), start=1):
        ink = colors.css(colors.ink(colors.diverging(float(scores[layer, head]) / end)))
        text = name if cell >= _NAMED else str(rank)
        axes.text(head, layer, text, ha="center", va="center", fontsize=8, color=ink)
        if cell < _NAMED:
            box = Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, edgecolor=INK, linewidth=0.9, zorder=3)
            axes.add_patch(box)
    color_bar(axes, image, end, scale, height)


def ranked_bars(axes: Axes, names: list[str], scores: list[float], end: float, height: float) -> None:
    """The strongest by name, each with its bar and its number.

    Args:
        axes: where to.
        names: of the strongest, best first.
        scores: of each.
        end: the score whose bar is the longest.
        height: of the axes in inches, of which a line takes `_LINE`.
    """
    places = np.arange(len(scores))
    tones = [colors.css(colors.diverging(0.85 if score > 0 else -0.85)) for score in scores]
    axes.barh(places, [abs(score) for score in scores], color=tones, height=0.62)
    for place, score in enumerate(scores):
        axes.text(abs(score) + 0.03 * end, place, signed(score), va="center", fontsize=8.5, color=INK)
    axes.set_yticks(places, [f"{rank}  {name}" for rank, name in enumerate(names, start=1)])
    axes.set_xlim(0, 1.45 * end)
    axes.set_ylim(max(height / _LINE, len(scores)) - 0.6, -0.6)
    axes.set_xticks([])
    axes.tick_params(length=0, labelsize=9, labelcolor=INK)
    axes.spines[:].set_visible(False)
    axes.set_title("strongest", loc="left", fontsize=9, color=QUIET)
