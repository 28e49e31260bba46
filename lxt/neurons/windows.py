"""Documents cut into windows that fit the model, and windows dealt into numbered blocks: the unit of work.

Every window starts with the special tokens that the tokenizer puts before a text, followed by the next tokens of its
document; windows of a document don't overlap, and no window holds two documents. Both numberings depend on corpus,
tokenizer and settings alone, so a block can be computed anywhere and again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from lxt.neurons.corpus import Corpus

__all__ = ["Block", "Counts", "Reading", "Window", "windows"]


@dataclass(frozen=True)
class Window:
    """A piece of a document.

    Attributes:
        number: among all windows of the corpus.
        document: the document's name.
        start: which of the document's tokens comes first here, special tokens before it not counted.
        ids: the token ids, special tokens included.
        prefix: how many special tokens the tokenizer put before the text.
    """

    number: int
    document: str
    start: int
    ids: tuple[int, ...]
    prefix: int = 0


@dataclass(frozen=True)
class Block:
    """Windows that are computed together.

    Attributes:
        number: its place among the blocks; a block holds the windows from number × size on.
        windows: at least one.
    """

    number: int
    windows: tuple[Window, ...]


@dataclass
class Counts:
    """What was read: documents, those cut into several windows, those too short to predict anything, windows."""

    documents: int = 0
    cut: int = 0
    too_short: int = 0
    windows: int = 0


def windows(corpus: Corpus, tokenizer: Any, length: int, counts: Counts) -> Iterator[Window]:
    """The windows of all documents, counted in `counts`.

    Args:
        corpus: the documents.
        tokenizer: the model's.
        length: how many tokens a window holds at most, special ones included.
        counts: where to count.

    Raises:
        ValueError: a length that leaves no room for two tokens.
    """
    for document in corpus.documents():
        read = tokenizer(document.text, verbose=False, return_special_tokens_mask=True)
        # the mask is of what the tokenizer added: special tokens may also be written in a text
        ids, added = list(read["input_ids"]), read["special_tokens_mask"]
        first = next((place for place, mark in enumerate(added) if not mark), len(ids))
        prefix, ids = ids[:first], ids[first:]
        room = length - len(prefix)
        if room < 2:
            raise ValueError(
                f"windows of {length} tokens leave {room} beside the {len(prefix)} special ones; give a larger length"
            )
        counts.documents += 1
        counts.cut += len(ids) > room
        # a piece of a single token predicts nothing, unless special tokens go before it
        pieces = [(start, ids[start : start + room]) for start in range(0, len(ids), room)]
        pieces = [(start, piece) for start, piece in pieces if len(prefix) + len(piece) > 1]
        counts.too_short += not pieces
        for start, piece in pieces:
            yield Window(counts.windows, document.name, start, (*prefix, *piece), len(prefix))
            counts.windows += 1


@dataclass
class Reading:
    """The blocks of a corpus that are still to be computed; may be iterated again, also in another process.

    Attributes:
        corpus: the documents.
        tokenizer: the model's.
        length: tokens of a window.
        size: windows of a block; the last may have fewer.
        done: the numbers of blocks to leave out.
        counts: what was read, when it was read to the end.
    """

    corpus: Corpus
    tokenizer: Any
    length: int
    size: int
    done: frozenset[int] = frozenset()
    counts: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[Block]:
        counts, self.counts = Counts(), None
        found, number = windows(self.corpus, self.tokenizer, self.length, counts), 0
        while part := tuple(islice(found, self.size)):
            if number not in self.done:
                yield Block(number, part)
            number += 1
        corpus = self.corpus
        read = {"bad": corpus.bad, "first_bad": corpus.first_bad, "files_left_out": corpus.left_out}
        self.counts = asdict(counts) | read
