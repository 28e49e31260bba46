"""Images with matplotlib: picture, patches in colour over it, pixels beside it; the text above where there is one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from lxt.show.figure import bars, colormap, drawable, families, figure_of
from lxt.show.images import Map, Seen, seen
from lxt.show.rows import unit
from lxt.show.words import amount, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lxt.attribution import Attribution
    from lxt.imagerelevance import ImageRelevance

__all__ = ["faded", "picture"]

_IMAGES = 12  # of one figure; more would be too tall to read
_INK, _QUIET = "#16181d", "#5a616c"
_OVER = 0.85  # how much of the full colour covers the picture; the rest lets its edges through


def picture(attribution: Attribution, special: bool = True, scale_special: bool = False) -> Figure:
    """The figure of all rows with their images; options as in `Attribution.plot`.

    Raises:
        ValueError: more images than a figure holds.
    """
    if len(attribution.images) > _IMAGES:
        raise ValueError(
            f"a figure holds up to {_IMAGES} images, got {len(attribution.images)}; draw one row: out[i].plot(path)"
        )
    prepared = list(seen(attribution, special, scale_special))
    most = max((len(one.maps(image)) for one in prepared for image in one.images), default=0) + 1
    figure = figure_of(3.4 * most + 0.6, sum(map(_height, prepared)))
    figure.get_layout_engine().set(w_pad=0.12)  # type: ignore[union-attr]
    parts = figure.subfigures(len(prepared), 1, squeeze=False, height_ratios=[_height(one) for one in prepared])[:, 0]
    for part, one in zip(parts, prepared, strict=True):
        _row(part, one, most)
    return figure


def _height(one: Seen) -> float:
    return 0.75 + (2.6 if one.reads else 0) + 3.1 * len(one.images)


def _row(part: Any, one: Seen, columns: int) -> None:
    row = one.row
    quiet = {"fontsize": 9, "color": _QUIET, "parse_math": False, "family": families()}
    title = drawable(f"What speaks for {row.target}?   {row.value}")
    part.suptitle(title, x=0.015, ha="left", fontsize=12, color=_INK, parse_math=False, family=families())
    heights = ([2.6] if one.reads else []) + [3.1] * len(one.images)
    grid = part.add_gridspec(len(heights), columns, height_ratios=heights)
    if one.reads:
        bars(part.add_subplot(grid[0, :]), row)
    for line, image in enumerate(one.images, start=int(one.reads)):
        axes = part.add_subplot(grid[line, 0])
        _frame(axes, "what the model saw")
        if image.picture is not None:
            axes.imshow(image.picture.numpy(), interpolation="nearest")
        for column, drawn in enumerate(one.maps(image), start=1):
            _map(part.add_subplot(grid[line, column]), drawn, image, unit(row.explained.kind))
    note = "  ·  ".join([row.conserved, f"{shorten(row.model)}, {shorten(row.rules)}"])
    part.supxlabel(drawable(note), x=0.015, ha="left", **quiet)


def _frame(axes: Axes, title: str) -> None:
    axes.set_title(drawable(title), fontsize=9, color=_QUIET, loc="left", parse_math=False, family=families())
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color="#c9cdd4", linewidth=0.6)


def _map(axes: Axes, drawn: Map, image: ImageRelevance, name: str) -> None:
    """Relevance in colour; over patches, the picture in grey so that one sees what they cover."""
    _frame(axes, drawn.name)
    end = drawn.scale or 1.0
    share = drawn.fractions.numpy()
    if image.picture is not None and drawn.name.endswith("patches"):
        high, wide = image.picture.shape[:2]
        axes.imshow(faded(image.picture.numpy()), extent=(0, wide, high, 0), interpolation="nearest")
        colours = colormap()(Normalize(-1, 1)(np.sign(share)))
        colours[..., 3] = _OVER * np.abs(share) ** 0.8
        axes.imshow(colours, extent=(0, wide, high, 0), interpolation="nearest")
        axes.set_xlim(0, wide)
        axes.set_ylim(high, 0)
        over = axes.figure.colorbar(  # type: ignore[union-attr]
            _mappable(end), ax=axes, pad=0.02, fraction=0.045, aspect=20
        )
    else:
        shown = axes.imshow(drawn.scores.numpy(), cmap=colormap(), norm=Normalize(-end, end), interpolation="nearest")
        beyond = bool((drawn.scores.abs() > end * 1.001).any())
        over = axes.figure.colorbar(  # type: ignore[union-attr]
            shown, ax=axes, pad=0.02, fraction=0.045, aspect=20, extend="both" if beyond else "neither"
        )
    over.set_ticks([-end, 0, end], labels=[amount(-end, 2), "0", amount(end, 2)])
    over.ax.tick_params(labelsize=7, length=0, labelcolor=_QUIET)
    over.set_label(f"← lowers   {name}   raises →", fontsize=7, color=_QUIET)
    over.outline.set_visible(False)  # type: ignore[operator]


def _mappable(end: float) -> Any:
    from matplotlib.cm import ScalarMappable

    return ScalarMappable(Normalize(-end, end), colormap())


def faded(picture: np.ndarray) -> np.ndarray:
    """[height, width, 3] uint8 in light grey, on which colours can be told apart."""
    grey = picture.astype(float) @ np.array([0.299, 0.587, 0.114])  # Rec. 601 luma
    return np.repeat((150 + 105 * grey / 255).round().astype(np.uint8)[..., None], 3, axis=-1)
