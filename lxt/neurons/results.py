"""What labelling found: of each neuron its best contexts, its statistics, its name and how good that is."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lxt.neurons.detection import auroc, fit_of_tokens, fit_of_words, held_out, naming_part
from lxt.neurons.measuring import KINDS, SIGNS
from lxt.neurons.naming import AFTER, BEFORE, distinctive, near
from lxt.neurons.storing import Folder
from lxt.neurons.tally import SAMPLE, Tally, drawn
from lxt.neurons.windows import Window
from lxt.tokens import display

__all__ = ["Context", "Detect", "Explain", "Neuron", "Neurons", "load"]

_SHOWN = 12  # tokens shown on either side of the peak


@dataclass(frozen=True)
class Context:
    """A place of the corpus where a neuron matters.

    Attributes:
        document: the document's name.
        token: which of the document's tokens the peak is.
        score: the neuron's relevance (in logits) or activation there.
        before: the text before the peak, as pieces of text.
        peak: the token itself.
        after: the text after it.
    """

    document: str
    token: int
    score: float
    before: tuple[str, ...]
    peak: str
    after: tuple[str, ...]

    @property
    def text(self) -> str:
        """The whole context."""
        return "".join((*self.before, self.peak, *self.after))

    @property
    def near(self) -> str:
        """The few tokens around the peak that names are made from."""
        return "".join((*self.before[len(self.before) - BEFORE :], self.peak, *self.after[:AFTER]))

    def __str__(self) -> str:
        return f"{self.score:+9.4f}  {''.join(self.before)}[{self.peak}]{''.join(self.after)}"


Explain = Callable[[Sequence[Context]], str]
"""Contexts, best first -> a name."""

Detect = Callable[[str, Sequence[Context]], Sequence[float]]
"""(name, contexts) -> how well the name fits each of them: higher is better, in any unit."""


@dataclass(frozen=True)
class Neuron:
    """A neuron: the input of layer `layer`'s down projection at index `number`.

    Attributes:
        layer: from 0.
        number: from 0.
        contexts: by kind ("relevance", "activation") and sign ("positive", "negative"), the most extreme first.
        mean: by kind, over all tokens.
        deviation: by kind, the standard deviation.
        above_zero: by kind, the share of tokens where it is above 0.
        label: the name; "" if nothing is distinctive.
        words: the distinctive tokens with their z; none where the name was written by something else.
        auroc: how well the name detects held-out contexts; None without a name, or with too few contexts to tell.
    """

    layer: int
    number: int
    contexts: dict[tuple[str, str], tuple[Context, ...]]
    mean: dict[str, float]
    deviation: dict[str, float]
    above_zero: dict[str, float]
    label: str = ""
    words: tuple[tuple[str, float], ...] = ()
    auroc: float | None = None

    def __str__(self) -> str:
        lines = [f"L{self.layer}N{self.number}  {self.label or '(no distinctive token)'}  {_shown(self.auroc)}"]
        for kind, sign in ((kind, sign) for kind in KINDS for sign in SIGNS):
            found = self.contexts[kind, sign]
            lines += [f"{sign} {kind}", *(f"  {context}" for context in found[:5])] if found else []
        return "\n".join(lines)


@dataclass(frozen=True)
class _Name:
    label: str
    words: tuple[tuple[int, float], ...]
    auroc: float | None


@dataclass
class Neurons:
    """The neurons of some layers; `found[layer, number]` is one of them.

    Attributes:
        tally: ranks and moments, as tensors.
        manifest: what was computed, and what was read.
        pieces: token id -> how it reads.
        special: ids of special tokens.
        by: which contexts the names come from, "relevance" or "activation".
        folder: where it lies, if it was kept.
    """

    tally: Tally
    manifest: dict[str, Any]
    pieces: dict[int, str]
    special: frozenset[int]
    by: str = "relevance"
    folder: Folder | None = field(default=None, repr=False)
    names: dict[tuple[int, int], _Name] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.by not in KINDS:
            raise ValueError(f"neurons are labelled by {' or '.join(KINDS)}, not by {self.by!r}")

    @classmethod
    def of(cls, folder: Folder, tokenizer: Any, by: str) -> Neurons:
        """Those of a finished folder."""
        tally = folder.tally()
        used = sorted({token for window in tally.windows for token in window.ids})
        used = sorted({*used, *tally.vocabulary.nonzero().flatten().tolist()})
        pieces, special = display(used, tokenizer)
        marked = frozenset(token for token, mark in zip(used, special, strict=True) if mark)
        return cls(tally, folder.manifest, dict(zip(used, pieces, strict=True)), marked, by, folder)

    @property
    def layers(self) -> list[int]:
        """The layers' numbers."""
        return self.tally.layers

    def count(self, layer: int) -> int:
        """How many neurons a layer has."""
        if layer not in self.layers:
            raise ValueError(f"layer {layer} was not labelled; those are {', '.join(map(str, self.layers))}")
        return self.tally.moments[layer, self.by].shape[1]

    def __getitem__(self, key: tuple[int, int]) -> Neuron:
        layer, number = key
        if not 0 <= number < self.count(layer):
            raise IndexError(f"there is no neuron {number} in layer {layer}, which has 0 to {self.count(layer) - 1}")
        name = self.names.get(key) or self._named(layer, number, None, None)
        tokens = max(self.tally.tokens, 1)
        moments = {kind: self.tally.moments[layer, kind][:, number].tolist() for kind in KINDS}
        mean = {kind: values[0] / tokens for kind, values in moments.items()}
        return Neuron(
            layer,
            number,
            {(kind, sign): tuple(self._contexts(layer, number, kind, sign)) for kind in KINDS for sign in SIGNS},
            mean,
            {kind: math.sqrt(max(values[1] / tokens - mean[kind] ** 2, 0)) for kind, values in moments.items()},
            {kind: values[2] / tokens for kind, values in moments.items()},
            name.label,
            tuple((self.pieces[token], z) for token, z in name.words),
            name.auroc,
        )

    def __iter__(self) -> Iterator[Neuron]:
        for layer in self.layers:
            for number in range(self.count(layer)):
                yield self[layer, number]

    def best(self, layer: int, top: int = 20) -> list[Neuron]:
        """A layer's neurons with the highest single scores, by what names come from."""
        self.count(layer)
        peak = self.tally.tops[layer, self.by, "positive"].score[:, 0]
        order = sorted(range(len(peak)), key=lambda number: (-float(peak[number]), number))
        return [self[layer, number] for number in order[:top]]

    def find(
        self, words: Iterable[str], top: int = 20, layers: Sequence[int] | None = None
    ) -> list[tuple[float, Neuron]]:
        """The neurons that matter at these words: (share of the best contexts whose peak is one, neuron), best first.

        Args:
            words: compared without the space before a token, and with its case.
            top: how many neurons.
            layers: where to look; None is everywhere.
        """
        wanted = {word.strip() for word in words}
        tokens = {token for token, piece in self.pieces.items() if piece.strip() in wanted}
        ids = {window.number: window.ids for window in self.tally.windows}
        ranked = []
        for layer in self.layers if layers is None else layers:
            self.count(layer)
            found = self.tally.tops[layer, self.by, "positive"]
            rows = zip(found.window.tolist(), found.position.tolist(), found.score.tolist(), strict=True)
            for number, (places, positions, scores) in enumerate(rows):
                hits = [ids[w][p] in tokens for w, p in zip(places, positions, strict=True) if w >= 0]
                # Few contexts say little: what is missing counts as no hit.
                ranked.append((-sum(hits) / len(places), -scores[0], layer, number))
        return [(-share, self[layer, number]) for share, _, layer, number in sorted(ranked)[:top]]

    def name_all(self, explain: Explain | None = None, detect: Detect | None = None) -> None:
        """Name every neuron anew.

        Args:
            explain: writes the name from contexts; None takes the distinctive tokens.
            detect: how well such a name fits contexts; None is the share of its words that occur.
        """
        for layer in self.layers:
            for number in range(self.count(layer)):
                self.names[layer, number] = self._named(layer, number, explain, detect)

    def save(self) -> None:
        """Write names and pages into the folder: `labels.jsonl`, `vocabulary.json` and `index.html`."""
        from lxt.neurons.page import pages

        if self.folder is None:
            raise ValueError("these neurons have no folder; give label(..., out=...) one")
        rows = (self._row(*key, name) for key, name in sorted(self.names.items()))
        self.folder.text("labels.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        vocabulary = {"by": self.by, "pieces": self.pieces, "special": sorted(self.special)}
        self.folder.text("vocabulary.json", json.dumps(vocabulary))
        for name, content in pages(self):
            self.folder.text(name, content)

    def _row(self, layer: int, number: int, name: _Name) -> dict[str, Any]:
        top = self.tally.tops[layer, self.by, "positive"].score[number, 0]
        words = [[self.pieces[token], round(z, 4)] for token, z in name.words]
        row = {"layer": layer, "neuron": number, "label": name.label, "words": words, "auroc": name.auroc}
        return row | {"max": float(top), "ids": [[token, z] for token, z in name.words]}

    def _contexts(self, layer: int, number: int, kind: str, sign: str) -> Iterator[Context]:
        for window, position, score in self._places(layer, number, kind, sign):
            yield self._context(window, position, score)

    def _places(self, layer: int, number: int, kind: str, sign: str) -> list[tuple[Window, int, float]]:
        top = self.tally.tops[layer, kind, sign]
        rows = zip(*(tensor[number].tolist() for tensor in (top.window, top.position, top.score)), strict=True)
        return [(self._windows[window], position, score) for window, position, score in rows if window >= 0]

    def _context(self, window: Window, position: int, score: float) -> Context:
        def read(ids: Sequence[int]) -> tuple[str, ...]:
            return tuple(self.pieces[token] for token in ids if token not in self.special)

        prefix = next((i for i, token in enumerate(window.ids) if token not in self.special), 0)
        return Context(
            window.document,
            window.start + position - prefix,
            score,
            read(window.ids[max(position - _SHOWN, 0) : position]),
            self.pieces[window.ids[position]],
            read(window.ids[position + 1 : position + 1 + _SHOWN]),
        )

    def _named(self, layer: int, number: int, explain: Explain | None, detect: Detect | None) -> _Name:
        places = self._places(layer, number, self.by, "positive")
        shown, tested = ([places[i] for i in part(len(places))] for part in (naming_part, held_out))
        if not shown:
            return _Name("", (), None)
        if explain is not None:
            label = str(explain([self._context(*place) for place in shown]))
            both = [self._context(*place) for place in tested], self._drawn_contexts
            fits = detect or (lambda name, contexts: [fit_of_words(name, context.near) for context in contexts])
            return _Name(label, (), auroc(*([float(fit) for fit in fits(label, contexts)] for contexts in both)))
        contexts = [near(window.ids, position, self.special) for window, position, _ in shown]
        words = tuple(distinctive(contexts, self._counts, self.tally.tokens))
        label = ", ".join(self.pieces[token].strip() or repr(self.pieces[token]) for token, _ in words)
        if not words:
            return _Name("", (), None)
        positive = [fit_of_tokens(dict(words), near(w.ids, position, self.special)) for w, position, _ in tested]
        negative = [fit_of_tokens(dict(words), tokens) for tokens in self._drawn_tokens]
        return _Name(label, words, auroc(positive, negative))

    @cached_property
    def _windows(self) -> dict[int, Window]:
        return {window.number: window for window in self.tally.windows}

    @cached_property
    def _counts(self) -> list[int]:
        return self.tally.vocabulary.tolist()

    @cached_property
    def _drawn(self) -> list[tuple[Window, int]]:
        """Places at random: one of each window of the sample."""
        sample = sorted(self.tally.windows, key=lambda window: drawn(window.number))[:SAMPLE]
        found = []
        for window in sample:
            plain = [place for place, token in enumerate(window.ids) if token not in self.special]
            if plain:
                found.append((window, plain[drawn(~window.number & 0xFFFFFFFF) % len(plain)]))
        return found

    @cached_property
    def _drawn_tokens(self) -> list[list[int]]:
        return [near(window.ids, position, self.special) for window, position in self._drawn]

    @cached_property
    def _drawn_contexts(self) -> list[Context]:
        return [self._context(window, position, 0.0) for window, position in self._drawn]


def load(path: str | os.PathLike[str]) -> Neurons:
    """What `lxt label` wrote into a folder; needs neither the model nor the corpus.

    Raises:
        ValueError: no such results, or unfinished ones.
    """
    folder = Folder(path)
    try:
        stored = json.loads((folder.path / "vocabulary.json").read_bytes())
        rows = [json.loads(line) for line in (folder.path / "labels.jsonl").read_text().splitlines()]
    except FileNotFoundError as error:
        raise ValueError(f"{path} is not finished: there is no {error.filename}; run `lxt label` again") from None
    pieces = {int(token): piece for token, piece in stored["pieces"].items()}
    found = Neurons(folder.tally(), folder.manifest, pieces, frozenset(stored["special"]), stored["by"], folder)
    for row in rows:
        words = tuple((token, z) for token, z in row["ids"])
        found.names[row["layer"], row["neuron"]] = _Name(row["label"], words, row["auroc"])
    return found


def _shown(value: float | None) -> str:
    return "" if value is None else f"(AUROC {value:.2f})"
