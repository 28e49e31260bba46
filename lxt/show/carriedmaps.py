"""Attention as relevance: what a head carries from key to query, as a map; or the strongest heads side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from lxt.show.figure import INK, QUIET, color_bar, colormap, figure_of, titled, token_axis
from lxt.show.parts import carried, kept, layer_place, only_row, weights_of, whole
from lxt.show.rows import Row, column_width, rows, unit
from lxt.show.words import signed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lxt.attribution import Attribution

__all__ = ["picture"]

_ONE, _EACH = 110, 60  # cells on a side; beyond, neighbouring tokens are summed
_RULED = 40  # cells on a side up to which lines part them
_WIDE = 3  # maps beside each other


class _Panel(NamedTuple):
    name: str
    total: float  # of all that is counted
    cells: Tensor  # [query, key]; NaN where nothing is drawn


def picture(
    attribution: Attribution,
    head: tuple[int, int] | None = None,
    top: int = 6,
    special: bool = True,
    scale_special: bool = False,
) -> Figure:
    """The map of one head, or those of the strongest; options as in `Attribution.plot_attention`.

    Raises:
        ValueError: the flow was not kept, there are several rows, or there is no such head.
    """
    only_row(attribution, "plot_attention")
    whole(top)
    found = kept(attribution, "flow")
    [row] = rows(attribution, special, scale_special)
    real = attribution.mask[0].nonzero().flatten()
    keep = torch.zeros_like(attribution.mask[0])
    keep[real[row.places]] = True
    counted = keep.clone()
    counted[real[[place for place, muted in zip(row.places, row.muted, strict=True) if muted]]] = False
    totals = weights_of(found, 0, counted)
    if head is not None:
        chosen = [layer_place(found, head)]
    else:
        best = totals.abs().flatten().argsort(descending=True, stable=True)[:top].tolist()
        chosen = [divmod(place, totals.shape[1]) for place in best]
    most = _ONE if head is not None else _EACH
    width = column_width(len(row.tokens), most)
    panels = [
        _Panel(
            f"L{found.layers[layer]}H{number}",
            float(totals[layer, number]),
            _summed(carried(found, 0, layer, number, keep), row, width),
        )
        for layer, number in chosen
    ]
    notes = ["each row: what the query's token takes from each key's token"]
    if any(row.muted):
        notes.append(
            ("grey: special tokens, " if width == 1 else "special tokens are ") + "neither coloured nor counted"
        )
    if found.indices is not None:
        most_kept = found.values.shape[-1]
        others = "the others, special ones too" if any(row.muted) else "the others"
        notes.append(f"the {most_kept} largest keys of each query are shown; totals count {others}")
    notes += [f"each cell sums {width} × {width} neighbouring tokens"] if width > 1 else []
    figure = _drawn(panels, row, width, single=head is not None)
    if head is not None:
        question, notes = f"{panels[0].name}: what it carries for", [f"in all {signed(panels[0].total)}", *notes]
    else:
        question = "What the strongest heads carry for"
    titled(figure, f"{question} {row.target}", row.facts, [*notes, row.origin])
    return figure


def _drawn(panels: Sequence[_Panel], row: Row, width: int, single: bool) -> Figure:
    stack = torch.stack([panel.cells for panel in panels]).numpy()
    end = float(np.nanmax(np.abs(stack), initial=0.0)) or 1.0
    cells = stack.shape[-1]
    side = min(9.0, max(3.6, 0.36 * cells)) if single else min(4.2, max(2.4, 0.2 * cells))
    across = 1 if single else min(_WIDE, len(panels))
    down = -(-len(panels) // across)
    figure = figure_of(max(7.5, across * side + 2.6), down * (side + 0.3) + 1.6)
    grid = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    flat = list(grid.flat)
    image = None
    for axes, panel in zip(flat, panels, strict=False):
        image = _map(axes, panel.cells, end)
        if not single:
            axes.set_title(f"{panel.name}  {signed(panel.total)}", loc="left", fontsize=10, color=INK)
    for axes in flat[len(panels) :]:
        axes.set_visible(False)
    strengths = np.nansum(np.abs(stack), axis=0)
    labels = [row.tokens[place] for place in range(0, len(row.tokens), width)]
    for place, axes in enumerate(flat[: len(panels)]):
        lowest = place + across >= len(panels)
        axes.tick_params(which="both", length=0, pad=4, labelbottom=lowest, labelleft=place % across == 0)
        if lowest:
            axes.set_xlabel("from: key", fontsize=8, color=QUIET)
        if place % across == 0:
            axes.set_ylabel("to: query", fontsize=8, color=QUIET)
    strongest = np.maximum(strengths.max(0), strengths.max(1))  # of both sides: they name the same tokens
    for axes in flat[: len(panels)]:
        token_axis(axes, "x", labels, strongest, side / cells)
        token_axis(axes, "y", labels, strongest, side / cells)
    color_bar(flat[: len(panels)], image, end, f"relevance ({unit(row.explained.kind)})", down * side)
    return figure


def _map(axes: Axes, one: Tensor, end: float):
    image = axes.imshow(one.numpy(), cmap=colormap(), norm=Normalize(-end, end), aspect="auto")
    axes.set_facecolor("#eceef1")  # shows where there is no number
    if len(one) <= _RULED:
        axes.set_xticks(np.arange(-0.5, len(one)), minor=True)
        axes.set_yticks(np.arange(-0.5, len(one)), minor=True)
        axes.grid(which="minor", color="#eceef1", linewidth=0.5)
    axes.spines[:].set(color="#c9cdd4", linewidth=0.6)
    return image


def _summed(one: Tensor, row: Row, width: int) -> Tensor:
    """In cells of `width` tokens a side; NaN at special tokens that are not coloured, which sums leave out."""
    muted = torch.tensor(row.muted)
    off = muted[:, None] | muted[None, :]
    if width == 1:
        return one.masked_fill(off, torch.nan)
    pad = -len(one) % width
    wide = torch.nn.functional.pad(one.masked_fill(off, 0.0), [0, pad, 0, pad])
    cells = len(wide) // width
    return wide.view(cells, width, cells, width).sum((1, 3))
