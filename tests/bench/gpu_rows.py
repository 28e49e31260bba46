"""The rows of one section of gpu.py, written as they are measured, and the clock.

A row is written before it is measured, as "did not end", and again with its numbers. So a section that runs out of time
or dies keeps what it has and says where it was, and one that is started again goes on behind it.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["READY", "RESTART", "Clock", "Rows", "read", "summary"]

RESTART = 75  # exit status of a section whose GPU context is lost: the next process goes on
UNFINISHED = "did not end"
READY = "warmed up"  # not measured yet: measured again after a restart


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The last row of each name, in the order in which they began; none if there is no such file."""
    found: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # the process was ended while it wrote
            continue
        found[row["name"]] = row
    return found


class Rows:
    """Where a section writes its rows, and how long it may go on.

    Args:
        path: a file with a row per line; rows that are there already are not measured again.
        seconds: what the section may take.
    """

    def __init__(self, path: Path, seconds: float) -> None:
        self._path, self._end = path, time.monotonic() + seconds
        self._before = {name: row["status"] for name, row in read(path).items() if row["status"] != READY}

    def left(self) -> float:
        return self._end - time.monotonic()

    def write(self, name: str, status: str = "ok", **fields: Any) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps({"name": name, "status": status, **fields}) + "\n")

    def attempt(
        self,
        name: str,
        function: Callable[[], dict[str, Any]],
        needs: float = 0.0,
        again: bool = False,
        **known: Any,
    ) -> None:
        """Write what `function` returns, or why it returned nothing.

        Args:
            name: of the row.
            function: gives the fields; may set "status".
            needs: seconds that it will take, about.
            again: measure it although it was, before a restart: others need it beside them.
            known: fields that the row has in any case.
        """
        if self._before.get(name, "ok" if again else None) != ("ok" if again else None):
            return
        if self.left() < needs:
            self.write(name, "no time left", **known)
            return
        self.write(name, UNFINISHED, **known)
        try:
            fields = function()
        except Exception as error:  # also AssertionError: a wrong kernel
            self.write(name, _reason(error), **known)
            error.__traceback__ = None  # its frames hold tensors
            _recover()
            return
        self.write(name, **{**known, **fields})


def _reason(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"failed: {type(error).__name__}: {' / '.join(lines[:3])[:400]}"


def _recover() -> None:
    """Free what failed; end the process if the GPU answers nothing any more, as after an illegal access."""
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception:
        sys.exit(RESTART)


class Clock:
    """Milliseconds between two CUDA events; without a GPU, those of the processor's clock."""

    def __init__(self, device: torch.device, flush: bool = False) -> None:
        self._gpu = device.type == "cuda"
        size = 2**29 if self._gpu else 1  # ten times what an H200 caches; meanwhile the launches get ahead of the GPU
        self._flush = torch.empty(size, dtype=torch.uint8, device=device) if flush else None

    def once(self, run: Callable[[], object]) -> float:
        """A run from an idle device, with the time in which the device waits for launches."""
        self.wait()
        if not self._gpu:
            start = time.perf_counter()
            run()
            return 1000 * (time.perf_counter() - start)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def many(self, run: Callable[[], object], count: int) -> list[float]:
        """`count` runs with cold caches, without a wait in between: of the kernels, not of their launches."""
        if not self._gpu:
            return [self.once(run) for _ in range(count)]
        events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(count)]
        self.wait()
        for begin, end in events:
            if self._flush is not None:
                self._flush.zero_()
            begin.record()
            run()
            end.record()
        self.wait()
        return [begin.elapsed_time(end) for begin, end in events]

    def wait(self) -> None:
        if self._gpu:
            torch.cuda.synchronize()


def summary(milliseconds: list[float]) -> dict[str, float]:
    return {"ms": statistics.median(milliseconds), "lowest": min(milliseconds), "highest": max(milliseconds)}
