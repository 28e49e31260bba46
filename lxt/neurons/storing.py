"""The results folder: a manifest, the tally so far, and the blocks that are finished and not yet part of it.

    manifest.json                  what is computed: model, corpus, settings, fingerprints; when finished, the counts
    tally-00000012.safetensors     blocks 0 to 11 together
    block-00000014.safetensors     block 14 alone, waiting for 13 (or for enough company)

The manifest says whether the last block is in (`counts`), and what was written for readers (`saved`).
Every file is written under another name, synced, and renamed, and files are deleted only after the one that replaces
them is safe. So whatever ends a run, the folder is valid, and a finished block is not computed again.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lxt.neurons.tally import Tally
from lxt.show.files import write

__all__ = ["FORMAT", "READABLE", "Folder"]

FORMAT = 2
READABLE = ("index.html", "labels.jsonl", "vocabulary.json")  # what is written at the end, beside tables and pages
_MANIFEST = "manifest.json"
_FILE = re.compile(r"(tally|block)-(\d{8})\.safetensors")


class Folder:
    """A results folder, held by one run at a time.

    Args:
        path: made if it isn't there.
        settings: what the results depend on, as JSON; None opens a folder for reading.

    Raises:
        ValueError: results of something else, naming what differs; no results, when opened for reading.
        OSError: the folder can't be used, or another run holds it.
    """

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any] | None = None) -> None:
        self.path = Path(path)
        self._lock: Any = None
        if settings is None:
            if not (self.path / _MANIFEST).is_file():
                raise ValueError(f"{self.path} holds no results of `lxt label`: there is no {_MANIFEST} in it")
            self.manifest = self._read()
            return
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self.path)
        try:
            self._begin(json.loads(json.dumps({"format": FORMAT, "settings": settings})))
        except BaseException:
            self.close()
            raise

    def _begin(self, wanted: dict[str, Any]) -> None:
        empty = not any(_FILE.fullmatch(file.name) for file in self.path.iterdir())
        if not (self.path / _MANIFEST).exists():
            if not empty:
                raise ValueError(f"{self.path} holds blocks without a {_MANIFEST}; choose another folder")
            if foreign := [name for name in READABLE if (self.path / name).exists()]:
                raise ValueError(f"{self.path} holds another {foreign[0]}; choose another folder")
        elif empty:
            self._read()  # raises where it is another program's
        if empty:  # also where a run failed before its first block
            self.manifest = wanted
            self._write(_MANIFEST, _json(wanted))
        else:
            self.manifest = self._read()
            self._refuse_others(wanted)
        for part in (*self.path.glob(".lxt-*.part"), *self.path.glob("*/.lxt-*.part")):
            part.unlink()  # what a killed run was writing
        self._clean()

    def close(self) -> None:
        """Let other runs use the folder."""
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.close()

    @property
    def finished(self) -> bool:
        """Whether the last block is part of the tally."""
        return "counts" in self.manifest

    def done(self) -> set[int]:
        """The blocks that need not be computed."""
        return {*range(self._folded()), *self._waiting()}

    def add(self, block: int, tally: Tally) -> None:
        """Keep a block's tally.

        Raises:
            OSError: the disk is full, or doesn't let us write; what was there stays.
        """
        self._store(f"block-{block:08d}.safetensors", tally)

    def fold(self, least: int = 1) -> None:
        """Add to the tally what follows it without a gap, if that is at least so many blocks."""
        start, waiting = self._folded(), self._waiting()
        end = start
        while end in waiting:
            end += 1
        if end - start < max(least, 1):
            return
        total = self._load(f"tally-{start:08d}.safetensors") if start else None
        for block in range(start, end):
            part = self._load(f"block-{block:08d}.safetensors")
            total = part if total is None else total.then(part)
        if total is not None:
            self._store(f"tally-{end:08d}.safetensors", total)
        self._clean()

    def finish(self, counts: Mapping[str, Any]) -> None:
        """Note that all is done, and what was read."""
        self.manifest = {**self.manifest, "counts": dict(counts)}
        self._write(_MANIFEST, _json(self.manifest))

    @property
    def saved(self) -> dict[str, Any] | None:
        """What was written for readers, all of it; None while it is written."""
        return self.manifest.get("saved")

    @saved.setter
    def saved(self, what: Mapping[str, Any] | None) -> None:
        if what != self.saved:
            self.manifest = {**self.manifest, "saved": what}
            self._write(_MANIFEST, _json(self.manifest))

    def tally(self) -> Tally:
        """What the folder's tally holds.

        Raises:
            ValueError: nothing yet.
        """
        end = self._folded()
        if not end:
            raise ValueError(f"{self.path} holds no tally yet; run `lxt label` again with the same arguments")
        return self._load(f"tally-{end:08d}.safetensors")

    def put(self, name: str, content: str | bytes) -> None:
        """Write a file of the folder."""
        self._write(name, content if isinstance(content, bytes) else content.encode("utf-8", "replace"))

    def _read(self) -> dict[str, Any]:
        try:
            manifest = json.loads((self.path / _MANIFEST).read_bytes())
            if manifest["format"] != FORMAT:
                raise ValueError(f"{self.path} has format {manifest['format']}, and this lxt reads {FORMAT}")
        except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.path / _MANIFEST} is no manifest of `lxt label` ({error!r})") from None
        return manifest

    def _refuse_others(self, wanted: Mapping[str, Any]) -> None:
        was, is_ = self.manifest["settings"], wanted["settings"]
        other = [key for key in {**was, **is_} if was.get(key) != is_.get(key)]
        if other:
            parts = (
                f"{key} was {one} and is now {two}"
                for key in other
                for one, two in [_shown(was.get(key), is_.get(key))]
            )
            raise ValueError(
                f"{self.path} holds results of something else: {'; '.join(parts)}. Choose another folder, or delete it"
            )

    def _numbers(self, kind: str) -> set[int]:
        found = (_FILE.fullmatch(file.name) for file in self.path.iterdir())
        return {int(match[2]) for match in found if match and match[1] == kind}

    def _folded(self) -> int:
        return max(self._numbers("tally"), default=0)

    def _waiting(self) -> set[int]:
        end = self._folded()
        return {block for block in self._numbers("block") if block >= end}

    def _clean(self) -> None:
        end = self._folded()
        for kind in ("tally", "block"):
            for number in self._numbers(kind):
                if number < end:
                    (self.path / f"{kind}-{number:08d}.safetensors").unlink()

    def _store(self, name: str, tally: Tally) -> None:
        from safetensors.torch import save

        self._write(name, save(tally.tensors()))

    def _load(self, name: str) -> Tally:
        from safetensors import SafetensorError
        from safetensors.torch import load

        path = self.path / name
        try:
            return Tally.of(load(path.read_bytes()))
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{path} is damaged ({error}); delete it and run again") from error

    def _write(self, name: str, content: bytes) -> None:
        try:
            write(self.path / name, content)
            _sync((self.path / name).parent)
        except OSError as error:
            advice = (
                f"cannot write the results ({os.strerror(error.errno or 0)}); make room there or permit it, and run "
                "again with the same arguments: the finished blocks are kept"
            )
            raise OSError(error.errno, advice, str(self.path / name)) from error


def _locked(folder: Path) -> Any:
    file = open(folder / ".lock", "a")  # held for as long as the run lasts
    try:
        import fcntl
    except ImportError:  # Windows: two runs of one folder are not told apart there
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise OSError(error.errno, "another run is writing its results there; wait for it", str(folder)) from None
    return file


def _sync(folder: Path) -> None:
    """A rename is safe once its folder is."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def _shown(was: Any, is_: Any) -> tuple[str, str]:
    """Both, from a little before they begin to differ."""
    one, two = json.dumps(was), json.dumps(is_)
    same = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
    start = max(same - 20, 0)

    def shown(text: str) -> str:
        part = text[start : start + 40]
        return ("…" if start else "") + part + ("…" if start + 40 < len(text) else "")

    return shown(one), shown(two)
