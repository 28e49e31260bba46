"""The strongest neurons of each layer as lollipops, with what labelling found that they stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.transforms import blended_transform_factory

from lxt.show import colors
from lxt.show.figure import INK, QUIET, WIDEST, drawable, families, figure_of, titled
from lxt.show.labels import Labels, check
from lxt.show.parts import Parts, only_row, parts_of, whole
from lxt.show.rows import rows, unit
from lxt.show.words import shorten, signed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lxt.attribution import Attribution

__all__ = ["picture"]


_LINES = 42  # of one column; more would be too tall to read
_FEW = 16  # lines that stay in one column
_COLUMNS = 5
_LINE = 0.2  # inches
_LABEL = 30  # characters


def picture(
    attribution: Attribution,
    token: int | None = None,
    special: bool = True,
    top: int = 5,
    labels: Labels | None = None,
    layer: int | Sequence[int] | None = None,
) -> Figure:
    """The neurons of the one row, layer by layer from the first; options as in `Attribution.plot_neurons`.

    Raises:
        ValueError: neurons were not kept, there are several rows, more lines than a picture holds, or labels of heads.
        TypeError: no labels.
        IndexError: no such token, or a layer that was not kept.
    """
    only_row(attribution, "plot_neurons")
    check(labels, attribution, "plot_neurons", ("neuron",))
    one = parts_of(attribution, "neuron", 0, token, special, layer)
    groups = [_strongest(one, place, whole(top)) for place in range(len(one.layers))]
    lines = sum(len(group) + 2 for group in groups)
    if lines > _LINES * _COLUMNS:
        fewer = _LINES * _COLUMNS // len(groups) - 2
        some = max(1, _LINES * _COLUMNS // (top + 2))
        raise ValueError(
            f"a picture holds {_LINES * _COLUMNS} lines, and {top} neurons of {len(groups)} layers take {lines}; show "
            f"{f'fewer, top={fewer}, or ' if fewer > 0 else ''}some layers: layer={one.layers[:some]}"
        )
    columns = _dealt(groups, max(1 if lines <= _FEW else 2, -(-lines // _LINES)))
    [row] = rows(attribution)
    high = max(sum(len(groups[layer]) + 2 for layer in column) for column in columns)
    figure = figure_of(
        min(WIDEST, max(7.5, (4.6 if labels is not None else 2.9) * len(columns) + 0.4)), high * _LINE + 1.1
    )
    found = [float(one.scores[layer, number]) for layer, group in enumerate(groups) for number in group]
    low, end = min([0.0, *found]), max([0.0, *found])
    room = 0.42 * (end - low or 1.0)  # beside the longest, for its number
    for place, column in enumerate(columns):
        axes = figure.add_subplot(1, len(columns), place + 1)
        _column(axes, one, [(layer, groups[layer]) for layer in column], labels)
        axes.set_xlim(low - (room if low < 0 else 0.0), end + room)
        axes.set_ylim(high - 0.5, -0.7)
    notes = [f"relevance ({unit(row.explained.kind)}), each neuron: {one.where}", one.note, row.origin]
    titled(figure, f"Which neurons speak for {row.target}?", row.facts, notes)
    return figure


def _strongest(one: Parts, layer: int, top: int) -> list[int]:
    size = one.scores[layer].abs()
    return [i for i in size.argsort(descending=True, stable=True)[:top].tolist() if size[i] > 0]


def _dealt(groups: list[list[int]], count: int) -> list[list[int]]:
    """Layers by column, in order, each column about as long as the others; no layer is torn."""
    total = sum(len(group) + 2 for group in groups)
    columns: list[list[int]] = [[] for _ in range(count)]
    done = 0
    for layer, group in enumerate(groups):
        size = len(group) + 2
        columns[min(count - 1, int((done + size / 2) * count / total))].append(layer)
        done += size
    return [column for column in columns if column]


def _column(axes: Axes, one: Parts, groups: list[tuple[int, list[int]]], labels: Labels | None) -> None:
    line = 0
    ticks, names = [], []
    edge = blended_transform_factory(axes.transAxes, axes.transData)
    for layer, group in groups:
        number = one.layers[layer]
        axes.text(-0.02, line, f"L{number}", transform=edge, fontsize=10, weight="bold", va="center", ha="right")
        total = f"all neurons {signed(float(one.totals[layer]))}"
        axes.text(0, line, total, transform=edge, fontsize=8, va="center", color=QUIET)
        axes.plot([0, 0], [line + 0.5, line + len(group) + 0.5], color="#c9cdd4", linewidth=0.8)
        for place, neuron in enumerate(group, start=line + 1):
            score = float(one.scores[layer, neuron])
            tone = colors.css(colors.diverging(0.85 if score > 0 else -0.85))
            axes.plot([0, score], [place, place], color=tone, linewidth=1.6, solid_capstyle="butt")
            axes.plot([score], [place], marker="o", markersize=4.5, color=tone)
            beside = {"xytext": (6 if score > 0 else -6, 0), "textcoords": "offset points", "va": "center"}
            side = "left" if score > 0 else "right"
            axes.annotate(signed(score), (score, place), ha=side, fontsize=8, color=INK, **beside)
            label = _label(labels, number, neuron)
            ticks.append(place)
            names.append(drawable(f"{label}  N{neuron}" if label else f"N{neuron}"))
        line += len(group) + 2
    axes.set_yticks(ticks, names)
    axes.set_xticks([])
    axes.tick_params(length=0, labelsize=8, labelcolor=INK)
    for tick in axes.get_yticklabels():
        tick.set(parse_math=False, fontfamily=families())
    axes.spines[:].set_visible(False)


def _label(labels: Labels | None, layer: int, neuron: int) -> str:
    """What a neuron stands for; "" where nobody knows."""
    if labels is None:
        return ""
    if isinstance(labels, Mapping):
        return shorten(str(labels.get((layer, neuron), "")), _LABEL, note=False)
    if layer not in labels.layers or neuron >= labels.count(layer):
        return ""
    return shorten(labels[layer, neuron].label, _LABEL, note=False)
