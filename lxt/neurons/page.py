"""The results as pages to browse, without network and without scripts: an index, and pages of neurons by layer.

Everything that comes from a corpus is text: it is escaped, kept from changing the direction of what stands around it,
and the pages' policy lets nothing run or load.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING

from lxt.neurons.measuring import KINDS

if TYPE_CHECKING:
    from lxt.neurons.results import Context, Neuron, Neurons

__all__ = ["pages"]

_PER_PAGE = 200  # neurons: about 1 MB
_CONTEXTS = 5
_BEST = 40
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --peak: #f0b45a88; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; }
td, th { text-align: left; vertical-align: top; padding: .15rem .6rem .15rem 0; border-bottom: 1px solid var(--line); }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
summary { cursor: pointer; padding: .3rem 0; }
mark { background: var(--peak); color: inherit; border-radius: .2rem; }
.small { opacity: .75; font-size: .9em; }
"""


def pages(found: Neurons) -> Iterator[tuple[str, str]]:
    """(file name, content) of every page."""
    yield "index.html", _index(found)
    for layer in found.layers:
        total = found.count(layer)
        for start in range(0, total, _PER_PAGE):
            numbers = range(start, min(start + _PER_PAGE, total))
            body = "".join(_neuron(found[layer, number]) for number in numbers)
            title = f"Layer {layer}, neurons {numbers[0]} to {numbers[-1]}"
            yield _name(layer, start), _page(title, f'<p><a href="index.html">all layers</a></p>{body}')


def _name(layer: int, start: int) -> str:
    return f"layer-{layer:03d}-{start:06d}.html"


def _index(found: Neurons) -> str:
    settings, counts = found.manifest["settings"], found.manifest.get("counts", {})
    said = ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in counts.items() if isinstance(value, int))
    body = (
        f"<p>{escape(str(settings['model_name']))}, {escape(str(settings['rules']))}. "
        f"{escape(said)}, {found.tally.tokens:,} tokens. Names come from the contexts with the highest {found.by}.</p>"
        "<p class=small>Relevance is in logits: what the neuron, at the marked token, contributed to the tokens that "
        "follow in its window. AUROC says how well the name tells held-out contexts from random places; 0.5 is chance."
        "</p>"
    )
    for layer in found.layers:
        links = " ".join(
            f'<a href="{_name(layer, start)}">{start}</a>' for start in range(0, found.count(layer), _PER_PAGE)
        )
        rows = "".join(_row(neuron, found.by) for neuron in found.best(layer, _BEST))
        body += (
            f"<h2>Layer {layer}</h2><p>All {found.count(layer):,} neurons, from: {links}</p><table><tr>"
            f"<th class=n>neuron</th><th>name</th><th class=n>AUROC</th><th class=n>highest {found.by}</th>"
            f"<th>where</th></tr>{rows}</table>"
        )
    return _page("What the neurons stand for", body)


def _row(neuron: Neuron, by: str) -> str:
    contexts = neuron.contexts[by, "positive"]
    best = f"{contexts[0].score:+.4g}" if contexts else ""
    link = f"{_name(neuron.layer, neuron.number // _PER_PAGE * _PER_PAGE)}#n{neuron.number}"
    where = _context(contexts[0]) if contexts else ""
    return (
        f'<tr><td class=n><a href="{link}">{neuron.number}</a></td><td>{_text(neuron.label or "–")}</td>'
        f"<td class=n>{_auroc(neuron)}</td><td class=n>{best}</td><td>{where}</td></tr>"
    )


def _neuron(neuron: Neuron) -> str:
    tables = ""
    for (kind, sign), contexts in neuron.contexts.items():
        rows = "".join(
            f"<tr><td class=n>{context.score:+.4g}</td><td>{_context(context)}</td>"
            f"<td class=small>{_text(context.document)}</td></tr>"
            for context in contexts[:_CONTEXTS]
        )
        tables += f"<p class=small>{sign} {kind}</p><table>{rows}</table>" if rows else ""
    statistics = "; ".join(
        f"{kind}: mean {neuron.mean[kind]:.3g}, deviation {neuron.deviation[kind]:.3g}, above 0 at "
        f"{neuron.above_zero[kind]:.1%} of the tokens"
        for kind in KINDS
    )
    return (
        f'<details id="n{neuron.number}"><summary>{neuron.number} <b>{_text(neuron.label or "–")}</b> '
        f"<span class=small>AUROC {_auroc(neuron) or 'unknown'}</span></summary>"
        f"<p class=small>{statistics}</p>{tables}</details>"
    )


def _auroc(neuron: Neuron) -> str:
    return "" if neuron.auroc is None else f"{neuron.auroc:.2f}"


def _context(context: Context) -> str:
    before, after = ("".join(part) for part in (context.before, context.after))
    return f"<bdi>{_escaped(before)}<mark>{_escaped(context.peak)}</mark>{_escaped(after)}</bdi>"


def _text(text: str) -> str:
    return f"<bdi>{_escaped(text)}</bdi>"


def _escaped(text: str) -> str:
    """HTML's characters, and those that no page may hold or that would turn the text around, shown as their codes."""
    turning = {*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F}
    shown = (
        f"<U+{ord(c):04X}>" if ord(c) in turning or (ord(c) < 32 and c not in "\n\t") or ord(c) == 127 else c
        for c in text
    )
    return escape("".join(shown).replace("\n", "⏎").replace("\t", "⇥"))


def _page(title: str, body: str) -> str:
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style><body><h1>{escape(title)}</h1>{body}</body></html>\n"
    )
