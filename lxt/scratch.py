"""A folder for temporary weights that doesn't outlive the process.

1. It is removed when nobody needs it any more, at exit, and on SIGTERM.
2. A process that is killed outright can't do that. Its folder is locked as long as it lives, so the next one that
writes to the same place sees which folders have nobody left, and removes those.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
import weakref
from pathlib import Path
from types import FrameType
from typing import Any

from lxt.memory import format_bytes

__all__ = ["Scratch"]

PREFIX = "lxt-weights-"


class Scratch:
    """A new folder inside `parent`, which exists as long as this object or the process does.

    Args:
        parent: made if it isn't there; folders of dead processes in it are removed.
        needed: bytes that will be written.

    Raises:
        OSError: `parent` is no folder that can be written to, or its disk hasn't got `needed` bytes.
    """

    def __init__(self, parent: Path, needed: int) -> None:
        try:
            parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"offload_folder={str(parent)!r} can't be made: {error.strerror}; give a folder") from error
        remove_abandoned(parent)
        free = shutil.disk_usage(parent).free
        if free < needed:
            raise OSError(
                f"{format_bytes(needed)} of weights have to be written to {parent}, whose disk has "
                f"{format_bytes(free)} left, {format_bytes(needed - free)} too little; give an offload_folder on a "
                "larger disk"
            )
        self.path, lock = _locked_folder(parent)
        self._remove = weakref.finalize(self, _remove, self.path, lock, os.getpid())
        _remove_on_sigterm(self._remove)

    def __deepcopy__(self, memo: dict[int, Any]) -> Scratch:
        return self  # a copy of the model reads the same weights, and the folder stays for both

    def remove(self) -> None:
        """Remove it now; harmless when done twice."""
        self._remove()


def remove_abandoned(parent: Path) -> list[Path]:
    """Remove the folders in `parent` whose process is gone; returns which."""
    found = []
    for folder in sorted(parent.glob(f"{PREFIX}*")):
        lock = _lock(folder)
        if lock is not None:
            _remove(folder, lock, os.getpid())
            found.append(folder)
    return found


def _locked_folder(parent: Path) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        lock = _lock(folder)
        if lock is not None and folder.exists():
            return folder, lock  # else somebody took it for abandoned before it was locked


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the folder until it is closed or the process dies; None where another holds it."""
    try:
        import fcntl
    except ImportError:  # Windows: nothing tells there who is alive
        return -1 if not any(folder.iterdir()) else None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove(folder: Path, lock: int, process: int) -> None:
    if os.getpid() != process:
        return  # a forked child: the folder is its parent's
    shutil.rmtree(folder, ignore_errors=True)
    if lock >= 0:
        os.close(lock)


def _remove_on_sigterm(remove: weakref.finalize[..., Any]) -> None:
    """SIGTERM ends Python without its exit handlers, unless the program has a handler, which then decides."""
    if threading.current_thread() is not threading.main_thread():
        return  # signal handlers can be set there only; the next run cleans up
    before = signal.getsignal(signal.SIGTERM)
    if before is not signal.SIG_DFL and getattr(before, "__module__", None) != __name__:
        return

    def on_sigterm(number: int, frame: FrameType | None) -> None:
        remove()
        if callable(before):
            before(number, frame)
            return
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, on_sigterm)
