"""One offline page: coloured text, ranking, layers × tokens; light and dark, no script, nothing from the network.

Colours are classes (`p1`..`p20` raise, `n1`..`n20` lower), so that the only style is one sheet whose hash the page's
content policy names: with that policy, nothing that a token contains could load or run even if it were not escaped.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING

from torch import Tensor

from lxt.show import style
from lxt.show.rows import Row, binned, rows, unit
from lxt.show.words import amount, direction, listed, shorten, signed, visible

if TYPE_CHECKING:
    from lxt.attribution import Attribution

__all__ = ["boxed", "document", "fragment", "isolated", "legend", "page", "ranking", "running", "text"]

_TOP = 10
_CELLS = 24_000  # of the heatmaps of one page together; at about 90 bytes each the page stays near 2 MB
_FOCUSABLE = 400  # tokens reachable by keyboard; with more, only coloured ones are


def page(attribution: Attribution, special: bool = True, scale_special: bool = False) -> str:
    """The whole page; options as in `Attribution.show`."""
    prepared = list(rows(attribution, special, scale_special))
    title = f"{prepared[0].target} explained" if len(prepared) == 1 else f"{len(prepared)} explanations"
    body = "\n".join([_contents(prepared), *_sections(prepared)])
    return document(title, body, attribution.model, attribution.rules, attribution.versions)


def document(title: str, body: str, model: str, rules: str, versions: Mapping[str, str], images: bool = False) -> str:
    """A page of the house around sections of HTML; `images` lets it show those that are written into it."""
    sheet = style.fragment() + style.PAGE
    digest = base64.b64encode(hashlib.sha256(sheet.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"  # no " in it
    policy += "; img-src data:" if images else ""
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width,initial-scale=1">',
            '<meta name="color-scheme" content="light dark"><meta name="referrer" content="no-referrer">',
            f"<title>{text(title)}</title>\n<style>{sheet}</style>\n</head>",
            f'<body class="lxt">\n<header>lxt · model {isolated(model)} · rules {isolated(rules)}</header>\n<main>',
            body,
            f"<footer>{_versions(versions)}</footer>\n</main>\n</body>\n</html>\n",
        ]
    )


def fragment(attribution: Attribution, limit: int, special: bool = True, scale_special: bool = False) -> str:
    """The same for a notebook's output cell: at most `limit` rows, styled without touching the notebook."""
    prepared = [row for row, _ in zip(rows(attribution, special, scale_special), range(limit), strict=False)]
    more = len(attribution) - len(prepared)
    left = f"<p class=quiet>{more} more rows: out[{limit}] and on, or out.to_html(path)</p>" if more > 0 else ""
    return boxed("".join([*_sections(prepared), left]), attribution.model, attribution.rules)


def boxed(body: str, model: str, rules: str) -> str:
    """Sections of HTML with their style, for a notebook's output cell."""
    where = f"<p class=quiet>model {isolated(model)} · rules {isolated(rules)}</p>"
    box = "padding:1rem 1.2rem;border-radius:.5rem"
    return f'<style>{style.fragment()}</style><div class="lxt" style="{box}">{where}{body}</div>'


def text(raw: str) -> str:
    """Text for HTML, with every character visible."""
    return escape(visible(raw), quote=True)


def isolated(raw: str) -> str:
    """The same where its direction must not reach what is beside it."""
    return f"<bdi>{escape(shorten(raw, 200), quote=True)}</bdi>"


def _contents(prepared: list[Row]) -> str:
    if len(prepared) < 2:
        return ""
    links = (f'<li><a href="#row{row.number}">{isolated(row.target)} {text(row.facts)}</a></li>' for row in prepared)
    return f"<nav><ol>{''.join(links)}</ol></nav>"


def _sections(prepared: list[Row]) -> list[str]:
    budget = _CELLS // max(1, len(prepared))
    return [_section(row, budget, len(prepared)) for row in prepared]


def _section(row: Row, budget: int, count: int) -> str:
    predicted = f"<p>The model predicts {isolated(row.predicted)}</p>" if row.predicted else ""
    predicted += f"<p>Underlined: {isolated(row.places_asked)}</p>" if row.places_asked else ""
    note = f" <span class=quiet>· {text(row.note)}</span>" if row.note else ""
    which = f"{row.number + 1} of {count} · " if count > 1 else ""
    return "\n".join(
        [
            f'<section id="row{row.number}">',
            f"<h2>{which}What speaks for {isolated(row.target)}? <small>{text(row.value)}</small></h2>",
            running(row),
            legend(row),
            predicted,
            f"<p>{text(row.conserved)}{note}</p>",
            ranking(row),
            _heatmap(row, budget),
            _all_tokens(row),
            "</section>",
        ]
    )


def running(row: Row) -> str:
    """The row's tokens as coloured running text."""
    few = len(row.tokens) <= _FOCUSABLE
    out = []
    for i, token in enumerate(row.tokens):
        shade = "s" if row.muted[i] else style.shade(row.fractions[i])
        asked = i in row.asked
        tab = ' tabindex="0"' if few or asked or shade not in ("", "s") else ""
        mark = " · special token" if row.special[i] else ""
        mark += " · explained here" if asked else ""
        title = f"{signed(row.scores[i])} · token {row.places[i]}{mark}"
        word = token.lstrip(" ") or token  # the space before a word stays outside its box
        body = escape(shorten(word) if word else "∅", quote=True)
        spaces = " " * (len(token) - len(word))
        out.append(f'{spaces}<span class="t {shade}{" at" if asked else ""}"{tab} title="{text(title)}">{body}</span>')
        if "\n" in token and token != row.tokens[i - 1 if i else 0]:
            out.append("\n")
    return f'<div class="text" dir="{direction(row.tokens)}">{"".join(out)}</div>'


def legend(row: Row) -> str:
    """The colour scale."""
    steps = range(-style.STEPS, style.STEPS + 1, 2)
    bar = "".join(f'<i class="{style.shade(step / style.STEPS)}"></i>' for step in steps)
    end, name = amount(row.scale), text(unit(row.explained.kind))
    bar = f'<span class="bar" role="img" aria-label="colour scale from minus {end} to plus {end}">{bar}</span>'
    return f'<div class="key"><span>lowers −{end}</span>{bar}<span>+{end} raises</span><span>· {name}</span></div>'


def ranking(row: Row) -> str:
    """The most relevant tokens as a table."""
    top = row.ranked(_TOP)
    if not top:
        return '<p class="quiet">No token has any relevance.</p>'
    lines = []
    for i in top:
        length = max(2, round(220 * abs(row.scores[i]) / row.scale))
        shade = style.shade(math.copysign(1, row.scores[i]))
        bar = f'<rect class="{shade}" width="{length}" height="12" rx="2"/>'
        bar = f'<svg width="220" height="12" aria-hidden="true">{bar}</svg>'
        lines.append(
            f'<tr><td class="num">{signed(row.scores[i])}</td><td class="rank">{bar}</td>'
            f'<td class="tok"><bdi>{escape(listed(row.tokens[i], 40), quote=True)}</bdi></td>'
            f'<td class="quiet num">{row.places[i]}</td></tr>'
        )
    head = f"<th class=num>{text(unit(row.explained.kind))}</th><th></th><th>token</th><th class=num>place</th>"
    return f"<h3>Most relevant</h3><table><tr>{head}</tr>{''.join(lines)}</table>"


def _all_tokens(row: Row) -> str:
    if len(row.tokens) <= _TOP:
        return ""
    lines = (
        f'<tr><td class="quiet num">{place}</td><td><bdi>{escape(listed(token, 40), quote=True)}</bdi></td>'
        f'<td class="num">{signed(score)}</td></tr>'
        for place, token, score in zip(row.places, row.tokens, row.scores, strict=True)
    )
    head = f"<tr><th class=num>place</th><th>token</th><th class=num>{text(unit(row.explained.kind))}</th></tr>"
    table = f"<table>{head}{''.join(lines)}</table>"
    return f"<details><summary>All {len(row.tokens)} tokens in order</summary>{table}</details>"


def _heatmap(row: Row, budget: int) -> str:
    if row.layers is None:
        return ""
    scores, labels, muted, width = binned(row, max(24, budget // row.layers.shape[0]))
    scale = row.scale or float(scores.abs().max()) or 1.0  # the text's, so that a colour means one thing on the page
    cell = min(46, max(13, 840 // max(1, len(labels))))
    joined = f" Each column sums {width} neighbouring tokens and names the first." if width > 1 else ""
    return (
        f"<h3>Layers × tokens</h3><div class=scroll>{_svg(scores, labels, muted, row.layer_names, cell, scale)}</div>"
        f'<p class="quiet">Relevance on its way from the output (top) to the embeddings (bottom), in the colours '
        f"of the text: full from ±{amount(scale)} {text(unit(row.explained.kind))} on.{joined}</p>"
    )


def _svg(scores: Tensor, labels: list[str], muted: list[bool], names: list[str], cell: int, scale: float) -> str:
    layers, columns = scores.shape
    high = 20 if layers <= 16 else 14
    left, down = 84, layers * high
    words = [listed(label, 12, note=False) for label in labels]
    slanted = 22 + round(5.4 * min(16, max(map(len, words), default=0)))
    parts = [
        f'<svg role="img" aria-label="layers by tokens" width="{left + columns * cell + 60}" height="{down + slanted}" '
        f'viewBox="0 0 {left + columns * cell + 60} {down + slanted}">'
    ]
    for layer, line in enumerate(scores.tolist()):
        top = (layers - 1 - layer) * high
        parts.append(f'<g transform="translate({left},{top})">')
        parts.append(f'<text x="-6" y="{high / 2 + 4:g}" text-anchor="end">{text(names[layer])}</text>')
        for column, score in enumerate(line):
            shade = "m" if muted[column] else style.shade(score / scale) or "g"
            parts.append(
                f'<rect x="{column * cell}" width="{cell}" height="{high}" class="{shade}">'
                f"<title>{text(names[layer])}, {column}: {signed(score)}</title></rect>"
            )
        parts.append("</g>")
    for column, word in enumerate(words):
        x, word = left + (column + 0.5) * cell + 3, escape(word, quote=True)
        parts.append(f'<text text-anchor="end" transform="translate({x:g},{down + 10}) rotate(-55)">{word}</text>')
    return "".join([*parts, "</svg>"])


def _versions(versions: Mapping[str, str]) -> str:
    named = ", ".join(f"{text(name)} {text(version)}" for name, version in versions.items())
    return f"Relevance is in units of the explained value and sums towards it. {named}"
