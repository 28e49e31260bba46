"""Images as HTML: the picture with its patches in colour over it, its pixels beside it; the text where there is one.

Pictures are written into the page as PNG. No script, nothing from the network.
"""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.image import imsave

from lxt.show import colors, html, style
from lxt.show.imagefigure import faded
from lxt.show.images import Map, Seen, seen
from lxt.show.rows import unit
from lxt.show.words import amount, signed

if TYPE_CHECKING:
    from lxt.attribution import Attribution
    from lxt.imagerelevance import ImageRelevance

__all__ = ["fragment", "page"]

_SIDE = 320  # of a picture on the page, at its longer side
_CELLS = 4096  # patches that get a rectangle with its number; finer maps become a picture


def page(attribution: Attribution, special: bool = True, scale_special: bool = False) -> str:
    """The whole page; options as in `Attribution.show`."""
    prepared = list(seen(attribution, special, scale_special))
    title = f"{prepared[0].row.target} explained" if len(prepared) == 1 else f"{len(prepared)} explanations"
    body = "\n".join(_section(one, len(prepared)) for one in prepared)
    return html.document(title, body, attribution.model, attribution.rules, attribution.versions, images=True)


def fragment(attribution: Attribution, limit: int, special: bool = True, scale_special: bool = False) -> str:
    """The same for a notebook's output cell: at most `limit` rows."""
    prepared = [one for one, _ in zip(seen(attribution, special, scale_special), range(limit), strict=False)]
    more = len(attribution) - len(prepared)
    left = f"<p class=quiet>{more} more rows: out[{limit}] and on, or out.to_html(path)</p>" if more > 0 else ""
    body = "".join([*(_section(one, len(prepared)) for one in prepared), left])
    return html.boxed(body, attribution.model, attribution.rules)


def _section(one: Seen, count: int) -> str:
    row = one.row
    which = f"{row.number + 1} of {count} · " if count > 1 else ""
    return "\n".join(
        [
            f'<section id="row{row.number}">',
            f"<h2>{which}What speaks for {html.isolated(row.target)}? <small>{html.text(row.value)}</small></h2>",
            html.running(row) + html.legend(row) if one.reads else "",
            f"<p>The model predicts {html.isolated(row.predicted)}</p>" if row.predicted else "",
            f"<p>Underlined: {html.isolated(row.places_asked)}</p>" if row.places_asked and one.reads else "",
            f"<p>{html.text(row.conserved)}</p>",
            html.ranking(row) if one.reads else "",
            *(_image(one, image, number) for number, image in enumerate(one.images)),
            "</section>",
        ]
    )


def _image(one: Seen, image: ImageRelevance, number: int) -> str:
    name = unit(one.row.explained.kind)
    drawn = [_figure(_picture(image), "what the model saw")] if image.picture is not None else []
    for found in one.maps(image):
        caption = f"{found.name}: red raises, blue lowers; full colour from ±{amount(found.scale)} {name} on"
        drawn.append(_figure(_map(found, image), caption))
    which = f"Image {number + 1}" if len(one.images) > 1 else "Image"
    total = "" if image.total is None else f" <small>Σ pixels {html.text(amount(image.total, 4))} {name}</small>"
    return f"<h3>{which}{total}</h3><div class=images>{''.join(drawn)}</div>"


def _figure(body: str, caption: str) -> str:
    return f"<figure>{body}<figcaption class=quiet>{html.text(caption)}</figcaption></figure>"


def _picture(image: ImageRelevance) -> str:
    assert image.picture is not None
    high, wide = image.picture.shape[:2]
    return _svg(high, wide, f"{_embedded(image.picture.numpy(), high, wide)}", "what the model saw")


def _map(drawn: Map, image: ImageRelevance) -> str:
    rows, columns = drawn.scores.shape
    high, wide = image.picture.shape[:2] if image.picture is not None else (rows, columns)
    if rows * columns > _CELLS or drawn.name.endswith("pixels"):
        return _svg(high, wide, _embedded(_coloured(drawn), high, wide), drawn.name)
    under = _embedded(faded(image.picture.numpy()), high, wide) if image.picture is not None else ""
    y, x = high / rows, wide / columns
    cells = []
    for i, (scores, shares) in enumerate(zip(drawn.scores.tolist(), drawn.fractions.tolist(), strict=True)):
        for j, (score, share) in enumerate(zip(scores, shares, strict=True)):
            cells.append(
                f'<rect class="{style.shade(1 if share > 0 else -1)}" fill-opacity="{0.85 * abs(share) ** 0.8:.3f}" '
                f'x="{j * x:g}" y="{i * y:g}" width="{x:g}" height="{y:g}">'
                f"<title>row {i + 1}, column {j + 1}: {signed(score)}</title></rect>"
            )
    return _svg(high, wide, under + "".join(cells), drawn.name)


def _svg(high: int, wide: int, body: str, label: str) -> str:
    zoom = _SIDE / max(high, wide)
    return (
        f'<svg role="img" aria-label="{html.text(label)}" width="{wide * zoom:.0f}" height="{high * zoom:.0f}" '
        f'viewBox="0 0 {wide} {high}">{body}</svg>'
    )


def _embedded(pixels: np.ndarray, high: int, wide: int) -> str:
    buffer = io.BytesIO()
    imsave(buffer, np.ascontiguousarray(pixels), format="png")
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<image href="data:image/png;base64,{data}" width="{wide}" height="{high}" preserveAspectRatio="none" '
        'image-rendering="pixelated"/>'
    )


def _coloured(drawn: Map) -> np.ndarray:
    """[rows, columns, 3] uint8 in the house's scale."""
    table = np.array([colors.diverging(step / 128) for step in range(-128, 129)], dtype=np.uint8)
    return table[(drawn.fractions.numpy() * 128).round().astype(int) + 128]
