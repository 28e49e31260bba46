"""Amounts of memory: as text, what a device has left, what this process holds, and an allocator that gives back."""

from __future__ import annotations

import ctypes
import functools
import re
import sys
from pathlib import Path

import torch

__all__ = ["available", "format_bytes", "give_back_freed", "parse_bytes", "resident"]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {f"{unit}i": 1024**power for power, unit in enumerate("kmgt", start=1)}
_M_MMAP_THRESHOLD = -3  # of glibc's mallopt
# Bytes: from this size on a block is the system's again once freed, which costs page faults when the next comes. With
# 2^20, layers whose tensors are just smaller left 20 MiB of holes; with 2^17 short prompts took a third more time.
_LARGE = 2**18


def parse_bytes(amount: str | int) -> int:
    """An amount of memory in bytes: "4GiB", "500 MB", "2G", or a number of bytes.

    Raises:
        ValueError: it is none.
    """
    if isinstance(amount, int) and not isinstance(amount, bool) and amount > 0:
        return amount
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", str(amount).lower())
    if not isinstance(amount, str) or found is None or found[2] not in _UNITS or float(found[1]) <= 0:
        raise ValueError(f"not an amount of memory: {amount!r}; give bytes, or text like '4GiB', '500MB', '2G'")
    return int(float(found[1]) * _UNITS[found[2]])


def format_bytes(count: float) -> str:
    """As people read it: "3.2 GiB"."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(size) >= 1000 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.0f} {units[0]}" if units[0] == "B" or abs(size) >= 100 else f"{size:.1f} {units[0]}"


def available(device: torch.device) -> int:
    """Bytes that can still be had on the device, what torch or the system would give up for them included."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return sys.maxsize  # no way to ask
    return max(0, min([_left_on_machine(), *_left_in_cgroups()]))


def resident() -> int:
    """Bytes that belong to this process alone; files that are mapped, as weights may be, aren't among them."""
    found = _amounts(Path("/proc/self/status"))
    if "RssAnon" in found:
        return found["RssAnon"]
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@functools.cache
def give_back_freed() -> None:
    """Have the C library return large blocks to the system when they are freed; for the rest of the process.

    glibc by itself keeps blocks of up to 32 MiB for later, in pieces that later tensors don't fit: a process then takes
    two to three times the memory that its tensors need at once. Elsewhere this changes nothing.
    """
    if sys.platform != "linux":
        return
    try:
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)
    except (AttributeError, OSError):  # musl has none, and doesn't need it
        return


def _left_on_machine() -> int:
    found = _amounts(Path("/proc/meminfo"))
    return found.get("MemAvailable", sys.maxsize)


def _left_in_cgroups() -> list[int]:
    """What each memory cgroup around this process has left; files in the page cache don't count, they make room."""
    left = []
    for line in _text(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, used, total = Path("/sys/fs/cgroup"), "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            root, limit = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
            used, total = "memory.usage_in_bytes", "total_"
        else:
            continue
        group = root / path.strip("/")
        for folder in (group, *group.parents):
            most, now = _text(folder / limit).strip(), _text(folder / used).strip()
            if most.isdigit() and now.isdigit():
                counts = _counts(folder / "memory.stat")
                files = sum(counts.get(f"{total}{kind}_file", 0) for kind in ("active", "inactive"))
                left.append(int(most) - int(now) + files)
            if folder == root:
                break
    return left


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _counts(path: Path) -> dict[str, int]:
    return {name: int(value) for name, _, value in (line.partition(" ") for line in _text(path).splitlines())}


def _amounts(path: Path) -> dict[str, int]:
    """Lines such as `MemAvailable:  1234 kB`, in bytes."""
    return {name: int(number) * 1024 for name, number in re.findall(r"^(\w+):\s+(\d+) kB", _text(path), re.MULTILINE)}
