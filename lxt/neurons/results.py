"""What labelling found: of each neuron its best contexts, its statistics, its name and how good that is."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from heapq import nsmallest
from itertools import chain
from typing import Any

from lxt.neurons.detection import auroc, fit_of_tokens, fit_of_words, held_out, naming_part
from lxt.neurons.measuring import KINDS, SIGNS
from lxt.neurons.naming import AFTER, BEFORE, distinctive, near
from lxt.neurons.storing import Folder
from lxt.neurons.tables import available, tables
from lxt.neurons.tally import SAMPLE, Tally, drawn
from lxt.neurons.windows import Window
from lxt.tokens import display

__all__ = ["Context", "Detect", "Explain", "Name", "Neuron", "Neurons", "load", "saved"]

_SHOWN = 12  # tokens shown on either side of the peak, and more until the word ends
_ALIKE = 40  # of the neurons that share a word, how many are considered to be named alike


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
        goes_on: whether the document goes on before what is shown, and whether the window goes on after it.
    """

    document: str
    token: int
    score: float
    before: tuple[str, ...]
    peak: str
    after: tuple[str, ...]
    goes_on: tuple[bool, bool] = (False, False)

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
    """A neuron: the input of layer `layer`'s down projection at index `number`. Or a head.

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
        latent: "neuron", or "head": the numbers of one head, before the attention's output projection.
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
    latent: str = "neuron"

    def __str__(self) -> str:
        place = f"L{self.layer}{self.latent[0].upper()}{self.number}"
        lines = [f"{place}  {self.label or '(no distinctive token)'}  {_shown(self.auroc)}"]
        for kind, sign in ((kind, sign) for kind in KINDS for sign in SIGNS):
            found = self.contexts[kind, sign]
            lines += [f"{sign} {kind}", *(f"  {context}" for context in found[:5])] if found else []
        return "\n".join(lines)


@dataclass(frozen=True)
class Name:
    """A neuron's name.

    Attributes:
        label: the name; "" if nothing is distinctive.
        words: the distinctive tokens' ids, with their z.
        auroc: how well it detects held-out contexts.
    """

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
        names: by layer and number, those that are known; `name` gives the others.
        explained: whether something else than `lxt.neurons.naming` wrote the names.
    """

    tally: Tally
    manifest: dict[str, Any]
    pieces: dict[int, str]
    special: frozenset[int]
    by: str = "relevance"
    folder: Folder | None = field(default=None, repr=False)
    names: dict[tuple[int, int], Name] = field(default_factory=dict, repr=False)
    explained: bool = False

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

    def __repr__(self) -> str:
        layers, count = ", ".join(map(str, self.layers)), sum(map(self.count, self.layers))
        return f"Neurons(layers {layers}; {count:,} {self.latent}s; {self.tally.tokens:,} tokens)"

    @property
    def latent(self) -> str:
        """What was labelled: "neuron" or "head"."""
        return self.manifest["settings"]["latent"]

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
        return self.neuron(*key)

    def neuron(self, layer: int, number: int, contexts: int | None = None) -> Neuron:
        """The neuron, with so many contexts of each kind and sign; None is all."""
        if not 0 <= number < self.count(layer):
            last = self.count(layer) - 1
            raise IndexError(f"there is no {self.latent} {number} in layer {layer}, which has 0 to {last}")
        name = self.name(layer, number)
        tokens = max(self.tally.tokens, 1)
        moments = {kind: self.tally.moments[layer, kind][:, number].tolist() for kind in KINDS}
        mean = {kind: values[0] / tokens for kind, values in moments.items()}
        return Neuron(
            layer,
            number,
            {
                (kind, sign): tuple(self._context(*at) for at in self._places(layer, number, kind, sign)[:contexts])
                for kind in KINDS
                for sign in SIGNS
            },
            mean,
            {kind: math.sqrt(max(values[1] / tokens - mean[kind] ** 2, 0)) for kind, values in moments.items()},
            {kind: values[2] / tokens for kind, values in moments.items()},
            name.label,
            tuple((self.pieces[token], z) for token, z in name.words),
            name.auroc,
            self.latent,
        )

    def name(self, layer: int, number: int) -> Name:
        """A neuron's name."""
        return self.names.get((layer, number)) or self._named(layer, number, None, None)

    def context(self, window: int, position: int, score: float = 0.0) -> Context:
        """A place as it reads.

        Args:
            window: the window's number, of those that the tally keeps.
            position: in the window, special tokens counted.
            score: what a neuron has there.
        """
        return self._context(self._windows[window], position, score)

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
        self, words: str | Iterable[str], top: int = 20, layers: Sequence[int] | None = None
    ) -> list[tuple[float, Neuron]]:
        """The neurons that matter at these words: (share of the best contexts whose peak is one, neuron), best first.

        Args:
            words: one, or several; compared without the space before a token, and with its case.
            top: how many neurons, at most: those with no such context are left out.
            layers: where to look; None is everywhere.
        """
        wanted = {word.strip() for word in ([words] if isinstance(words, str) else words)}
        tokens = {token for token, piece in self.pieces.items() if piece.strip() in wanted}
        ids = {window.number: window.ids for window in self.tally.windows}
        ranked = []
        for layer in self.layers if layers is None else layers:
            self.count(layer)
            found = self.tally.tops[layer, self.by, "positive"]
            rows = zip(found.window.tolist(), found.position.tolist(), found.score.tolist(), strict=True)
            for number, (places, positions, scores) in enumerate(rows):
                hits = [ids[w][p] in tokens for w, p in zip(places, positions, strict=True) if w >= 0]
                if any(hits):  # few contexts say little: what is missing counts as no hit
                    ranked.append((-sum(hits) / len(places), -scores[0], layer, number))
        return [(-share, self[layer, number]) for share, _, layer, number in sorted(ranked)[:top]]

    def alike(self, layer: int, number: int, top: int = 8) -> list[tuple[int, int]]:
        """The (layer, number) of others whose names share a word with this one's, the most distinctive first.

        Of names that something else wrote, those that are equal.
        """
        own = self.name(layer, number)
        words: Iterable[int | str] = (token for token, _ in own.words) if own.words else (own.label.casefold(),)
        found: dict[tuple[int, int], float] = {}
        for word in words:
            for z, key in self._by_word.get(word, ()):
                found[key] = found.get(key, 0.0) + z
        found.pop((layer, number), None)
        return sorted(found, key=lambda key: (-found[key], key))[:top]

    @cached_property
    def _by_word(self) -> dict[int | str, list[tuple[float, tuple[int, int]]]]:
        """Word -> who has it in its name, those with the highest z first; not all, where it is many."""
        found: dict[int | str, list[tuple[float, tuple[int, int]]]] = {}
        for layer in self.layers:
            for number in range(self.count(layer)):
                name = self.name(layer, number)
                words = name.words or (((name.label.casefold(), 1.0),) if name.label else ())
                for word, z in words:
                    found.setdefault(word, []).append((z, (layer, number)))
        return {word: nsmallest(_ALIKE, rows, key=lambda row: (-row[0], row[1])) for word, rows in found.items()}

    def name_all(self, explain: Explain | None = None, detect: Detect | None = None) -> None:
        """Name every neuron anew.

        Args:
            explain: writes the name from contexts; None takes the distinctive tokens.
            detect: how well such a name fits contexts; None is the share of its words that occur.
        """
        self.explained = explain is not None
        self.__dict__.pop("_by_word", None)
        for layer in self.layers:
            for number in range(self.count(layer)):
                self.names[layer, number] = self._named(layer, number, explain, detect)

    def save(self) -> None:
        """Write names, pages and, where pyarrow is installed, tables into the folder."""
        from lxt.neurons.page import pages

        if self.folder is None:
            raise ValueError("these neurons have no folder; give label(..., out=...) one")
        self.folder.saved = None
        rows = (self._row(*key, name) for key, name in sorted(self.names.items()))
        self.folder.put("labels.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        vocabulary = {"by": self.by, "pieces": self.pieces, "special": sorted(self.special)}
        self.folder.put("vocabulary.json", json.dumps(vocabulary))
        for name, content in chain(pages(self), tables(self) if available() else ()):
            self.folder.put(name, content)
        self.folder.saved = saved(self.by, self.explained)
        self.manifest = self.folder.manifest

    def _row(self, layer: int, number: int, name: Name) -> dict[str, Any]:
        top = self.tally.tops[layer, self.by, "positive"].score[number, 0]
        words = [[self.pieces[token], round(z, 4)] for token, z in name.words]
        row = {"layer": layer, self.latent: number, "label": name.label, "words": words, "auroc": name.auroc}
        return row | {"max": float(top), "ids": [[token, z] for token, z in name.words]}

    def _places(self, layer: int, number: int, kind: str, sign: str) -> list[tuple[Window, int, float]]:
        top = self.tally.tops[layer, kind, sign]
        rows = zip(*(tensor[number].tolist() for tensor in (top.window, top.position, top.score)), strict=True)
        return [(self._windows[window], position, score) for window, position, score in rows if window >= 0]

    def _context(self, window: Window, position: int, score: float) -> Context:
        def read(ids: Sequence[int]) -> tuple[str, ...]:
            return tuple(self.pieces[token] for token in ids if token not in self.special)

        prefix = window.prefix
        first, end = max(position - _SHOWN, prefix), min(position + 1 + _SHOWN, len(window.ids))
        while prefix < first and position - first < 2 * _SHOWN and self._inside_word(window, first):
            first -= 1
        while end < len(window.ids) and end - position <= 2 * _SHOWN and self._inside_word(window, end):
            end += 1
        return Context(
            window.document,
            window.start + position - prefix,
            score,
            read(window.ids[first:position]),
            self.pieces[window.ids[position]],
            read(window.ids[position + 1 : end]),
            (first > prefix or window.start > 0, end < len(window.ids)),
        )

    def _inside_word(self, window: Window, place: int) -> bool:
        """Whether a cut before this token would be inside a word."""
        return self.pieces[window.ids[place - 1]][-1:].isalnum() and self.pieces[window.ids[place]][:1].isalnum()

    def _named(self, layer: int, number: int, explain: Explain | None, detect: Detect | None) -> Name:
        places = self._places(layer, number, self.by, "positive")
        shown, tested = ([places[i] for i in part(len(places))] for part in (naming_part, held_out))
        if not shown:
            return Name("", (), None)
        if explain is not None:
            label = str(explain([self._context(*place) for place in shown]))
            both = [self._context(*place) for place in tested], self._drawn_contexts
            fits = detect or (lambda name, contexts: [fit_of_words(name, context.near) for context in contexts])
            return Name(label, (), auroc(*([float(fit) for fit in fits(label, contexts)] for contexts in both)))
        contexts = [near(window.ids, position, self.special) for window, position, _ in shown]
        words = tuple(distinctive(contexts, self._counts, self.tally.tokens))
        label = ", ".join(_word(self.pieces[token]) for token, _ in words)
        if not words:
            return Name("", (), None)
        positive = [fit_of_tokens(dict(words), near(w.ids, position, self.special)) for w, position, _ in tested]
        negative = [fit_of_tokens(dict(words), tokens) for tokens in self._drawn_tokens]
        return Name(label, words, auroc(positive, negative))

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
        found.names[row["layer"], row[found.latent]] = Name(row["label"], words, row["auroc"])
    return found


def saved(by: str, explained: bool) -> dict[str, Any]:
    """What a folder holds for readers when all of it is written, as the manifest says it."""
    return {"by": by, "names": "explain" if explained else "distinctive tokens", "tables": available()}


def _word(piece: str) -> str:
    """A token in a list of tokens: punctuation, which would be lost in it, in quotation marks."""
    word = piece.strip()
    return word if any(character.isalnum() for character in word) else json.dumps(piece, ensure_ascii=False)


def _shown(value: float | None) -> str:
    return "" if value is None else f"(AUROC {value:.2f})"
