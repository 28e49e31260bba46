"""The explorer: one offline page that leads from a prediction to its tokens, layers, heads, neurons and their contexts.

The page is `page/`'s markup, style and scripts around the data (explorer_data.py) as JSON, which no browser executes.
Its content policy names the style and the script by their hashes and allows nothing else: neither network nor markup
that a token might contain. Where the numbers don't fit into LIMIT, `_ladder` says what goes first; so does the page.
"""

from __future__ import annotations

import base64
import hashlib
import json
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from lxt.latents.values import LatentRelevance
from lxt.show import colors
from lxt.show.explorer_data import (
    Detail,
    is_causal,
    most_relevant,
    named,
    row_data,
    shape_of,
    text_data,
)
from lxt.show.labels import Labels, check, labelled
from lxt.show.rows import Row, rows
from lxt.show.words import shorten

if TYPE_CHECKING:
    from lxt.attribution import Attribution

__all__ = ["LIMIT", "page"]

LIMIT = 2_000_000  # bytes: opens at once, and goes through mail and issue trackers
_STEPS = 64  # colours on each side
# one after the other, in one script
_SCRIPTS = ("data.js", "pictures.js", "views.js", "state.js", "specs.js", "panes.js", "contexts.js", "explorer.js")
_LIST = 20  # parts at each token, where there is room
_NAMED = 512  # neurons that come with their contexts, where there is room


@dataclass(frozen=True)
class _Source:
    """A row, and what its latents hold at most."""

    row: Row
    one: Attribution
    latents: dict[str, LatentRelevance]

    def count(self, shape: str, dimensions: Sequence[int]) -> int:
        """The most numbers that a latent of this shape has in these dimensions."""
        sizes = [1]
        for latent in self.latents.values():
            if shape_of(latent) == shape:
                size = 1
                for dimension in dimensions:
                    size *= latent.values.shape[dimension]
                sizes.append(size)
        return max(sizes)


def page(attribution: Attribution, labels: Labels | None = None) -> str:
    """The page as text.

    Args:
        attribution: what to explore: each of its rows is a prediction to choose.
        labels: what `lxt.neurons.load(folder)` gives: the contexts that neurons or heads stand for; or names alone.

    Raises:
        ValueError: no rows; images; too much text for LIMIT, whatever is left out; labels of another model.
        TypeError: no labels.
    """
    if not len(attribution):
        raise ValueError("there is nothing to explore: the attribution has no rows")
    if attribution.images:
        raise ValueError(
            "the explorer shows text and the latents that were read at it, which images have none of so far; "
            "to_html(path) draws them"
        )
    check(labels, attribution, "explore", ("neuron", "head"))
    sources = [_source(row, one) for row, one in zip(rows(attribution), attribution, strict=True)]
    room = LIMIT - len(_document(attribution, "").encode())

    def written(detail: Detail) -> str:
        return _json(_data(attribution, sources, labels, detail))

    detail, *less = _ladder(sources, labels)
    text = written(detail)
    if len(text) > room:
        detail = next(iter(less[bisect_left(less, True, key=lambda one: len(written(one)) <= room) :]), None)
        text = written(detail) if detail else ""
    if detail is not None:
        if maps := _maps(sources, room - len(text)):
            larger = written(replace(detail, maps=maps))
            text = larger if len(larger) <= room else text
        return _document(attribution, text)
    raise ValueError(
        f"the page would be larger than {LIMIT / 1e6:g} MB with the least detail: {len(sources)} rows of up to "
        f"{attribution.relevance.shape[1]} tokens. Explore one row (out[0].explore(path)) or a shorter text, or ask "
        "for fewer latents or layers, such as latents=lxt.Keep('residual', layers=(0, 8, 16))"
    )


def _source(row: Row, one: Attribution) -> _Source:
    # The embeddings' relevance is that of the tokens.
    return _Source(row, one, {name: one.latents[name] for name in one.latents if name != "embed"})


def _ladder(sources: Sequence[_Source], labels: Labels | None) -> Iterator[Detail]:
    """Less and less detail: what is left out first is what the fewest will look for.

    Query × key maps come last of all, in what room there is. Then go: contexts, parts at each token, tokens of heads.
    """
    heads = max(source.count("grid", (0, 3)) for source in sources)
    largest = min(_LIST, max(source.count("list", (3,)) for source in sources))
    detail = Detail(heads, largest, _NAMED if labels else 0, 5)
    yield detail
    while labels and detail.named > 64:
        detail = replace(detail, named=detail.named // 2, contexts=max(3, detail.contexts - 1))
        yield detail
    while detail.largest > 5:
        detail = replace(detail, largest=max(5, detail.largest - 5))
        yield detail
    while detail.heads > 8:
        detail = replace(detail, heads=detail.heads * 3 // 4)
        yield detail
    for largest in (3, 2, 1):
        if largest < detail.largest:
            detail = replace(detail, largest=largest, named=min(detail.named, 16 * largest), contexts=largest)
            yield detail
    yield replace(detail, heads=0, named=min(detail.named, 16), contexts=1)


def _maps(sources: Sequence[_Source], spare: int) -> int:
    """How many query × key maps of each row fit."""
    per_row = 0
    for source in sources:
        for latent in source.latents.values():
            if shape_of(latent) == "map":
                length = latent.values.shape[3]
                numbers = length * (length + 1) // 2 if is_causal(latent) else length * length
                per_row += numbers * 2 * 4 // 3 + 40  # 16 bits in base64, with scale and place
    return min(int(0.98 * spare) // per_row, max(s.count("map", (0, 2)) for s in sources)) if per_row else 0


def _data(
    attribution: Attribution, sources: Sequence[_Source], labels: Labels | None, detail: Detail
) -> dict[str, Any]:
    texts: list[dict[str, Any]] = []
    found = []
    for source in sources:
        text = text_data(source.one)
        if text not in texts[-1:]:  # rows of one prompt follow each other
            texts.append(text)
        found.append(row_data(source.row, source.one, source.latents, detail) | {"text": len(texts) - 1})
    return {
        "model": shorten(attribution.model, 200),
        "rules": shorten(attribution.rules, 200),
        "versions": {shorten(name): shorten(version) for name, version in attribution.versions.items()},
        "texts": texts,
        "rows": found,
        "labels": _labels(sources, labels, detail),
        "labelled": None if labels is None else {"latent": labelled(labels), "about": _about(labels)},
        "left": _left_out(sources, labels, detail),
        "palette": {name: _palette(theme) for name, theme in (("light", colors.LIGHT), ("dark", colors.DARK))},
    }


def _labels(sources: Sequence[_Source], labels: Labels | None, detail: Detail) -> dict[str, Any] | None:
    if labels is None:
        return None
    latent = labelled(labels)
    ranked = [
        (*entry, row)
        for row, source in enumerate(sources)
        if latent in source.latents
        for entry in most_relevant(source.latents[latent])
    ]
    found: dict[str, Any] = {}
    for _, layer, part, _ in sorted(ranked, key=lambda entry: (-entry[0], *entry[1:])):
        if len(found) == detail.named:
            break
        if f"{layer}:{part}" not in found and (one := named(labels, layer, part, detail.contexts)) is not None:
            found[f"{layer}:{part}"] = one
    return found


def _about(labels: Labels) -> str:
    if isinstance(labels, Mapping):
        return "A label that was given, without contexts of a corpus"
    name = shorten(str(labels.manifest.get("settings", {}).get("model_name", "?")), 80)
    layers = ", ".join(map(str, labels.layers))
    return f"Labels of {name}, layers {shorten(layers, 60)}, from {labels.tally.tokens:,} tokens of a corpus"


def _left_out(sources: Sequence[_Source], labels: Labels | None, detail: Detail) -> list[str]:
    """What the page does not hold, in the reader's words."""
    found = []
    grids = max(source.count("grid", (0, 3)) for source in sources)
    if detail.heads < grids:
        some = f"{detail.heads:,} of {grids:,} heads, those with the most relevance" if detail.heads else "no head"
        found.append(f"numbers at each token for {some} (the sums over tokens are of all)")
    lists = max(source.count("list", (3,)) for source in sources)
    if lists > 1 and detail.largest < min(_LIST, lists):
        found.append(f"of neurons the largest {detail.largest} at each token instead of {min(_LIST, lists)}")
    if labels is not None and detail.named < _NAMED:
        found.append(f"contexts of the {detail.named:,} {labelled(labels)}s with the most relevance")
    maps = max(source.count("map", (0, 2)) for source in sources)
    if maps > 1 and detail.maps < maps:
        found.append(f"query × key maps of {detail.maps:,} of {maps:,} heads, those with the most relevance")
    return found


def _palette(theme: colors.Theme) -> list[str]:
    """From full negative to full positive, as the other views colour."""
    return [colors.css(colors.diverging(step / _STEPS, theme)) for step in range(-_STEPS, _STEPS + 1)]


def _json(data: Mapping[str, Any]) -> str:
    """ASCII JSON in which nothing can end the element that holds it, nor start a comment in it."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _document(attribution: Attribution, data: str) -> str:
    folder = files("lxt.show").joinpath("page")
    script = "\n".join(folder.joinpath(name).read_text("utf-8") for name in _SCRIPTS)
    sheet = folder.joinpath("explorer.css").read_text("utf-8")
    policy = (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(sheet)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    parts = {"policy": policy, "sheet": sheet, "script": script, "data": data}
    document = folder.joinpath("explorer.html").read_text("utf-8")
    before, *pieces = document.split("{{")
    # One pass: what is filled in may contain the marks of what comes later.
    return before + "".join(parts[name] + after for name, after in (piece.split("}}", 1) for piece in pieces))


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
