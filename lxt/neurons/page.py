"""The results as pages to browse, without network: an index that can be sorted, and pages of neurons by layer.

Everything that comes from a corpus is text: what is invisible in it or would turn the text around is shown as a code,
and the pages' policy lets nothing load, and nothing run but the one script that is written into them.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING

from lxt.neurons.measuring import KINDS
from lxt.show.words import visible

if TYPE_CHECKING:
    from lxt.neurons.results import Context, Neuron, Neurons

__all__ = ["pages"]

_PER_PAGE = 200  # neurons: about 1 MB
_CONTEXTS = 5
_BEST = 40
_UNITS = {"relevance": " (logits)", "activation": ""}


def pages(found: Neurons) -> Iterator[tuple[str, str]]:
    """(file name, content) of every page."""
    yield "index.html", _index(found)
    for layer in found.layers:
        total = found.count(layer)
        for start in range(0, total, _PER_PAGE):
            numbers = range(start, min(start + _PER_PAGE, total))
            body = "".join(_neuron(found, found.neuron(layer, number, _CONTEXTS)) for number in numbers)
            title = f"Layer {layer}, {found.latent}s {numbers[0]} to {numbers[-1]}"
            links = ['<a href="index.html">Index</a>']
            links += [f'<a href="{_name(layer, start - _PER_PAGE)}">Before</a>'] if start else []
            links += [f'<a href="{_name(layer, start + _PER_PAGE)}">Next</a>'] if start + _PER_PAGE < total else []
            yield _name(layer, start), _page(title, f"<nav>{' '.join(links)}</nav><div data-filter></div>{body}")


def _name(layer: int, start: int) -> str:
    return f"layer-{layer:03d}-{start:06d}.html"


def _link(layer: int, number: int) -> str:
    return f"{_name(layer, number // _PER_PAGE * _PER_PAGE)}#n{number}"


def _index(found: Neurons) -> str:
    settings, counts = found.manifest["settings"], found.manifest.get("counts", {})
    said = ", ".join(
        f"{value:,} {'bad rows skipped' if name == 'bad' else name.replace('_', ' ')}"
        for name, value in counts.items()
        if isinstance(value, int) and (value or name in ("documents", "windows"))
    )
    rows = "".join(_row(neuron, found.by) for layer in found.layers for neuron in found.best(layer, _BEST))
    shown = "All" if all(found.count(layer) <= _BEST for layer in found.layers) else f"The {_BEST} of each layer"
    lists = "".join(
        f"<p>Layer {layer}, {found.count(layer):,} {found.latent}s, from: "
        + " ".join(f'<a href="{_name(layer, s)}">{s}</a>' for s in range(0, found.count(layer), _PER_PAGE))
        + "</p>"
        for layer in found.layers
    )
    body = (
        f"<p>{_text(str(settings['model_name']))}, rules {_text(str(settings['rules_name']))}. "
        f"{escape(said)}, {found.tally.tokens:,} tokens.</p>"
        f"<p class=quiet>Names come from the contexts with the highest {found.by}. Relevance is in logits: what the "
        f"{found.latent}, at the marked token, contributed to the tokens that follow in its window. AUROC says how "
        "well the name tells held-out contexts from random places; 0.5 is chance.</p>"
        f"<h2>Every {found.latent}</h2>{lists}<h2>{shown} with the highest {found.by}</h2><div data-filter></div>"
        f"<div class=scroll><table><thead><tr><th class=n>layer</th><th class=n>{found.latent}</th><th>name</th>"
        f"<th class=n>AUROC</th><th class=n>highest {found.by}{_UNITS[found.by]}</th><th class=n>above 0</th>"
        f"<th class=where>where</th></tr></thead><tbody class=sorted>{rows}</tbody></table></div>"
    )
    return _page(f"What the {found.latent}s stand for", body)


def _row(neuron: Neuron, by: str) -> str:
    contexts = neuron.contexts[by, "positive"]
    peak = contexts[0].score if contexts else None
    auroc, share = neuron.auroc, neuron.above_zero[by]
    return (
        f"<tr><td class=n>{neuron.layer}</td>"
        f'<td class=n><a href="{_link(neuron.layer, neuron.number)}">{neuron.number}</a></td>'
        f"<td class=name>{_text(neuron.label)}</td>"
        f'<td class=n data-v="{"" if auroc is None else auroc}">{_auroc(neuron)}</td>'
        f'<td class=n data-v="{"" if peak is None else peak}">{"" if peak is None else f"{peak:+.4g}"}</td>'
        f'<td class=n data-v="{share}">{share:.1%}</td>'
        f"<td class=where>{_context(contexts[0]) if contexts else ''}</td></tr>"
    )


def _neuron(found: Neurons, neuron: Neuron) -> str:
    tables = ""
    for (kind, sign), contexts in neuron.contexts.items():
        rows = "".join(
            f"<tr><td class=n>{context.score:+.4g}</td><td class=where>{_context(context)}</td>"
            f"<td class=quiet>{_text(context.document)}</td></tr>"
            for context in contexts
        )
        side = "up" if sign == "positive" else "down"
        title = f"{'Highest' if sign == 'positive' else 'Lowest'} {kind}{_UNITS[kind]}"
        tables += (
            f'<h2>{title}</h2><div class="scroll {side}"><table><tbody>{rows}</tbody></table></div>' if rows else ""
        )
    statistics = "; ".join(
        f"{kind}: mean {neuron.mean[kind]:.3g}, deviation {neuron.deviation[kind]:.3g}, above 0 at "
        f"{neuron.above_zero[kind]:.1%} of the tokens"
        for kind in KINDS
    )
    alike = ", ".join(
        f'<a href="{_link(*key)}">L{key[0]}{neuron.latent[0].upper()}{key[1]}</a> {_text(found.name(*key).label)}'
        for key in found.alike(neuron.layer, neuron.number)
    )
    like = f"<p>Named alike: {alike}</p>" if alike else ""
    return (
        f'<details><summary id="n{neuron.number}"><span class=n>{neuron.number}</span><b>'
        f"{_text(neuron.label) if neuron.label else '–'}</b>"
        f"<span class=quiet>{f'AUROC {_auroc(neuron)}' if neuron.auroc is not None else ''}</span></summary>"
        f"<div>{like}<p class=quiet>{statistics}</p>{tables}</div></details>"
    )


def _auroc(neuron: Neuron) -> str:
    return "" if neuron.auroc is None else f"{neuron.auroc:.2f}"


def _context(context: Context) -> str:
    before, after = ("".join(part) for part in (context.before, context.after))
    peak = context.peak.lstrip(" ") or context.peak
    before += context.peak.removesuffix(peak)  # the space before a word isn't marked
    left, right = ("…" if context.goes_on[0] else ""), (" …" if context.goes_on[1] else "")
    return f"<bdi>{left}{_shown(before)}<mark>{_shown(peak)}</mark>{_shown(after)}{right}</bdi>"


def _text(text: str) -> str:
    return f"<bdi>{_shown(text)}</bdi>"


def _shown(text: str) -> str:
    plain = text.isascii() and text.isprintable()  # most are, and looking at each character takes long
    return escape(text if plain else visible(text))


def _page(title: str, body: str) -> str:
    sheet, script = (files("lxt.neurons").joinpath(name).read_text("utf-8") for name in ("browse.css", "browse.js"))
    policy = (
        f"default-src 'none'; style-src {_hash(sheet)}; script-src {_hash(script)}; base-uri 'none'; form-action 'none'"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><meta name="referrer" content="no-referrer">'
        f"<title>{escape(title)}</title><style>{sheet}</style></head>\n<body><h1>{escape(title)}</h1>{body}"
        f"<script>{script}</script></body></html>\n"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
