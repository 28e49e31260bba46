"""What is known of the neurons after some blocks, as tensors: what a shard on disk holds, and how two become one.

Ranks are merged in a total order (`ranking`). Sums are sums of floating-point numbers, so tallies are added up in the
order of their blocks, always: that makes results equal to the last bit, whoever computed which block when.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lxt.neurons.measuring import KINDS, SIGNS
from lxt.neurons.ranking import Top, merged
from lxt.neurons.windows import Window

__all__ = ["SAMPLE", "Tally", "drawn"]

SAMPLE = 256  # windows kept at random, which names are tested against


@dataclass(frozen=True, eq=False)
class Tally:
    """Ranks and moments of the neurons of some layers, over some windows.

    Attributes:
        tops: by layer, kind and sign.
        moments: by layer and kind, [3, neuron]: sum, sum of squares, how many above 0; over all tokens that count.
        vocabulary: [token id], how often each occurs among the tokens that count.
        windows: those that the ranks name, and a sample; ascending by number.
    """

    tops: dict[tuple[int, str, str], Top]
    moments: dict[tuple[int, str], Tensor]
    vocabulary: Tensor
    windows: tuple[Window, ...]

    @property
    def layers(self) -> list[int]:
        """Their numbers, ascending."""
        return sorted({layer for layer, _ in self.moments})

    @property
    def tokens(self) -> int:
        """How many tokens were counted."""
        return int(self.vocabulary.sum())

    def then(self, later: Tally) -> Tally:
        """This tally and that of later blocks together."""
        k = next(iter(self.tops.values())).score.shape[1]
        tops = {key: merged(top, later.tops[key], k, SIGNS[key[2]]) for key, top in self.tops.items()}
        moments = {key: value + later.moments[key] for key, value in self.moments.items()}
        return Tally(tops, moments, self.vocabulary + later.vocabulary, _named(tops, (*self.windows, *later.windows)))

    def tensors(self) -> dict[str, Tensor]:
        """For safetensors."""
        found = {"vocabulary": self.vocabulary} | _table(self.windows)
        for (layer, kind, sign), top in self.tops.items():
            found |= {f"{layer}.{kind}.{sign}.{name}": tensor for name, tensor in top.tensors().items()}
        for (layer, kind), value in self.moments.items():
            found[f"{layer}.{kind}.moments"] = value
        return {name: tensor.contiguous() for name, tensor in found.items()}

    @staticmethod
    def of(tensors: dict[str, Tensor]) -> Tally:
        """The inverse of `tensors`."""
        layers = sorted({int(name.split(".")[0]) for name in tensors if name.endswith(".moments")})
        tops = {
            (layer, kind, sign): Top(
                *(tensors[f"{layer}.{kind}.{sign}.{name}"] for name in ("score", "window", "position"))
            )
            for layer in layers
            for kind in KINDS
            for sign in SIGNS
        }
        moments = {(layer, kind): tensors[f"{layer}.{kind}.moments"] for layer in layers for kind in KINDS}
        return Tally(tops, moments, tensors["vocabulary"], _windows(tensors))

    @staticmethod
    def named(
        tops: dict[tuple[int, str, str], Top],
        moments: dict[tuple[int, str], Tensor],
        vocabulary: Tensor,
        windows: Sequence[Window],
    ) -> Tally:
        """Of all these windows, keep those that are needed."""
        return Tally(tops, moments, vocabulary, _named(tops, windows))


def drawn(number: int) -> int:
    """A number's place in a random order that is the same everywhere (splitmix64, Steele et al. 2014)."""
    z = (number + 1) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    z = (z ^ z >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return z ^ z >> 31


def _named(tops: dict[tuple[int, str, str], Top], windows: Sequence[Window]) -> tuple[Window, ...]:
    needed = {number for top in tops.values() for number in top.window.unique().tolist()}
    sample = sorted(windows, key=lambda window: drawn(window.number))[:SAMPLE]
    needed |= {window.number for window in sample}
    return tuple(sorted((w for w in windows if w.number in needed), key=lambda window: window.number))


def _table(windows: Sequence[Window]) -> dict[str, Tensor]:
    names = [window.document.encode() for window in windows]
    return {
        "windows.number": torch.tensor([window.number for window in windows]),
        "windows.start": torch.tensor([window.start for window in windows]),
        "windows.prefix": torch.tensor([window.prefix for window in windows]),
        "windows.length": torch.tensor([len(window.ids) for window in windows]),
        "windows.ids": torch.tensor([token for window in windows for token in window.ids], dtype=torch.int32),
        "windows.name_length": torch.tensor([len(name) for name in names]),
        "windows.names": torch.tensor(list(b"".join(names)), dtype=torch.uint8),
    }


def _windows(tensors: dict[str, Tensor]) -> tuple[Window, ...]:
    columns = ("number", "start", "prefix", "length", "name_length")
    rows = zip(*(tensors[f"windows.{name}"].tolist() for name in columns), strict=True)
    ids, names = tensors["windows.ids"].tolist(), bytes(tensors["windows.names"].tolist())
    found, at, name_at = [], 0, 0
    for number, start, prefix, length, name_length in rows:
        name = names[name_at : name_at + name_length].decode()
        found.append(Window(number, name, start, tuple(ids[at : at + length]), prefix))
        at, name_at = at + length, name_at + name_length
    return tuple(found)
