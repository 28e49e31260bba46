"""Documents of a corpus, one at a time: text, JSON lines, parquet, folders of these, datasets of the hub, or a list.

A document is its text and where it stands ("notes.jsonl:17"). Rows that can't be read raise `BadRow`, which says
where; a reader that skips them counts them. Nothing is held but the document at hand.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

__all__ = ["SUFFIXES", "BadRow", "Corpus", "Document", "Unit"]

Unit = Literal["line", "paragraph", "file"]
SUFFIXES = (".jsonl", ".parquet", ".txt")
_SAMPLE = 1 << 20  # bytes at either end of a file that enter its fingerprint: enough to tell versions apart


class BadRow(ValueError):
    """A row that is no document; the message says where it stands and what is wrong."""


@dataclass(frozen=True)
class Document:
    """A text, and where it stands."""

    name: str
    text: str


@dataclass
class Corpus:
    """Where documents come from; may be read again and again.

    Attributes:
        source: a file, a folder (its .txt, .jsonl and .parquet files, sorted by path), `owner/dataset` or
            `owner/dataset:split` of the hub, or the texts themselves.
        column: which field or column of jsonl, parquet and datasets holds the text.
        unit: what a document is in text files: a line, a paragraph (ended by an empty line), or the file.
        skip_bad: count bad rows instead of raising.
        bad: how many were skipped by the last reading.
        first_bad: what was wrong with the first few of them.
        left_out: how many files of the folder the last reading left out, as they are of other kinds.
    """

    source: str | Path | Sequence[str]
    column: str = "text"
    unit: Unit = "line"
    skip_bad: bool = False
    bad: int = 0
    first_bad: list[str] = field(default_factory=list)
    left_out: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.source, Iterator):
            raise TypeError(
                f"a corpus is a path, a dataset of the hub or a list of texts, not {type(self.source).__name__}; it is "
                "read more than once, so write what is generated to a file"
            )
        if self.unit not in get_args(Unit):
            raise ValueError(f"unknown unit {self.unit!r} of text files; allowed: {', '.join(get_args(Unit))}")

    def documents(self) -> Iterator[Document]:
        """All documents that aren't empty, in their order.

        Raises:
            BadRow: a row that is no text, unless these are skipped.
            OSError: a file that can't be read.
            ValueError: no file that holds documents, or no document.
            ImportError: what reads this kind of corpus isn't installed.
        """
        self.bad, self.first_bad, self.left_out = 0, [], 0
        empty = True
        for document in self._rows():
            if isinstance(document, BadRow):
                if not self.skip_bad:
                    raise BadRow(f"{document}; mend it, or skip bad rows (skip_bad=True, --skip-bad)")
                self.bad += 1
                self.first_bad += [str(document)] if len(self.first_bad) < 5 else []
            elif document.text.strip():
                empty = False
                yield document
        if empty:
            skipped = f" ({self.bad} bad rows were skipped, the first: {self.first_bad[0]})" if self.bad else ""
            raise ValueError(f"the corpus {self._shown()} holds no document with text{skipped}; give one that does")

    def fingerprint(self) -> str:
        """Equal for equal corpora, read the same way.

        Of files it takes names, sizes and the first and last MiB of each; of datasets name and split alone.
        """
        digest = hashlib.sha256(f"{self.column} {self.unit} {self.skip_bad}".encode())
        if not isinstance(self.source, (str, Path)):
            for text in self.source:
                digest.update(hashlib.sha256(str(text).encode("utf-8", "surrogatepass")).digest())
        elif Path(self.source).exists():
            root = Path(self.source)
            for path in self._files():
                name = path.relative_to(root).as_posix() if root.is_dir() else path.suffix
                digest.update(b"\n%s %d\n" % (os.fsencode(name), path.stat().st_size))
                with open(path, "rb") as file:
                    digest.update(file.read(_SAMPLE))
                    file.seek(max(path.stat().st_size - _SAMPLE, 0))
                    digest.update(file.read(_SAMPLE))
        else:
            digest.update(str(self.source).encode())
        return digest.hexdigest()

    def _shown(self) -> str:
        return str(self.source) if isinstance(self.source, (str, Path)) else f"of {len(self.source)} texts"

    def _rows(self) -> Iterator[Document | BadRow]:
        if not isinstance(self.source, (str, Path)):
            yield from _listed(self.source)
        elif Path(self.source).exists():
            root = Path(self.source)
            for path in self._files():
                name = path.relative_to(root).as_posix() if root.is_dir() else path.name
                name = os.fsencode(name).decode("utf-8", "replace")  # names of files may be any bytes
                kind = path.suffix.lower()
                if kind == ".jsonl":
                    yield from _jsonl(path, name, self.column)
                elif kind == ".parquet":
                    yield from _parquet(path, name, self.column)
                else:
                    yield from _text(path, name, self.unit)
        else:
            yield from _dataset(str(self.source), self.column)

    def _files(self) -> list[Path]:
        root = Path(self.source)  # type: ignore[arg-type]
        if root.is_file():
            if root.suffix.lower() not in SUFFIXES:
                raise ValueError(
                    f"{root} is no {', '.join(SUFFIXES)}, which a corpus is read from; write its texts into one of "
                    "these, rename it to .txt where its lines are the documents, or give a list of texts"
                )
            return [root]
        files = list(_below(root))
        found = sorted(path for path in files if path.suffix.lower() in SUFFIXES)
        self.left_out = len(files) - len(found)
        if not found:
            raise ValueError(f"the folder {root} holds no {', '.join(SUFFIXES)}; give another, or the file itself")
        return found


def _below(folder: Path) -> Iterator[Path]:
    """All files; a folder that can't be read is an error, and not an empty one."""

    def refuse(error: OSError) -> None:
        raise error

    for root, folders, names in os.walk(folder, onerror=refuse):
        if {".lock", "manifest.json"} <= {*names}:  # results, written into the folder of their corpus
            folders.clear()
            continue
        yield from (path for name in names if (path := Path(root, name)).is_file())


def _listed(texts: Sequence[str]) -> Iterator[Document | BadRow]:
    for number, text in enumerate(texts):
        yield _document(str(number), text, f"text {number} of the list")


def _document(name: str, text: object, where: str) -> Document | BadRow:
    if not isinstance(text, str):
        return BadRow(f"{where} is {type(text).__name__}, not a text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return BadRow(f"{where} isn't valid Unicode: character {error.start} is a lone surrogate")
    return Document(name, text)


def _lines(path: Path, name: str) -> Iterator[tuple[int, str | BadRow]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                yield number, BadRow(f"{name}, line {number}: no valid UTF-8 at byte {error.start} of the line")


def _text(path: Path, name: str, unit: Unit) -> Iterator[Document | BadRow]:
    start, part = 1, []
    for number, line in _lines(path, name):
        if isinstance(line, BadRow):
            yield line
        elif unit == "line":
            yield Document(f"{name}:{number}", line.rstrip("\r\n"))
        elif unit == "paragraph" and not line.strip():
            if part:
                yield Document(f"{name}:{start}", "".join(part).rstrip("\r\n"))
            part = []
        else:
            start = start if part else number
            part.append(line)
    if part:
        yield Document(name if unit == "file" else f"{name}:{start}", "".join(part).rstrip("\r\n"))


def _jsonl(path: Path, name: str, column: str) -> Iterator[Document | BadRow]:
    for number, line in _lines(path, name):
        where = f"{name}, line {number}"
        if isinstance(line, BadRow):
            yield line
        elif line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # also a number of too many digits
                yield BadRow(f"{where}: no valid JSON ({error})")
                continue
            yield _of_row(row, column, f"{name}:{number}", where)


def _of_row(row: object, column: str, name: str, where: str) -> Document | BadRow:
    if not isinstance(row, dict):
        return BadRow(f"{where}: {type(row).__name__}, not an object with the field {column!r}")
    if column not in row:
        return BadRow(f"{where}: no field {column!r}; it has {', '.join(map(repr, row)) or 'none'}")
    return _document(name, row[column], f"{where}: the field {column!r}")


def _parquet(path: Path, name: str, column: str) -> Iterator[Document | BadRow]:
    try:
        from pyarrow import ArrowException, parquet  # type: ignore[import-not-found]
    except ImportError:
        raise ImportError(f"{path} needs pyarrow to be read: pip install 'lxt[corpus]'") from None
    try:
        file = parquet.ParquetFile(path)
    except ArrowException as error:
        raise OSError(f"{path} is no parquet file that can be read ({error}); give another") from error
    with file:
        if column not in file.schema_arrow.names:
            raise ValueError(f"{path} has no column {column!r}; it has {', '.join(file.schema_arrow.names)}")
        number, batches = 0, file.iter_batches(batch_size=1024, columns=[column])
        while True:
            try:
                batch = next(batches, None)
            except (ArrowException, OSError) as error:
                raise OSError(f"{path} can't be read after row {number} ({error}); mend it, or leave it out") from error
            if batch is None:
                return
            for value in batch.column(0):
                number += 1
                where = f"{name}, row {number}: the column {column!r}"
                try:
                    text = value.as_py()
                except UnicodeDecodeError as error:
                    yield BadRow(f"{where} has no valid UTF-8 at byte {error.start}")
                else:
                    yield _document(f"{name}:{number}", text, where)


def _dataset(source: str, column: str) -> Iterator[Document | BadRow]:
    name, _, split = source.partition(":")
    missing = f"there is no file or folder {source!r}"
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{missing}; give one, or a dataset of the hub as owner/name or owner/name:split")
    try:
        import datasets  # type: ignore[import-not-found]
    except ImportError:
        raise ImportError(f"{missing}; if it is a dataset of the hub: pip install 'lxt[corpus]'") from None
    rows: Any = datasets.load_dataset(name, split=split or "train", streaming=True)
    for number, row in enumerate(rows):
        yield _of_row(row, column, f"{name}:{number}", f"{name}, row {number}")
