"""Run a command in a memory cgroup: beyond its limit it loses its page cache first, and is killed then."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


class NoCgroup(Exception):
    """This machine lets nobody make a memory cgroup; says why."""


@dataclass(frozen=True)
class Run:
    """How a command ended.

    Attributes:
        status: its exit status; -9 where the kernel killed it for its memory.
        output: what it printed.
        seconds: how long it took.
        anonymous: the most memory, in bytes, that wasn't page cache; sampled ten times a second.
    """

    status: int
    output: str
    seconds: float
    anonymous: int


def run_limited(command: Sequence[str], limit: int, cpus: int = 2) -> Run:
    """Run `command` with at most `limit` bytes, page cache included, on so many CPUs.

    Raises:
        NoCgroup: this machine doesn't permit it.
    """
    group, version = _make(limit)
    try:
        with tempfile.TemporaryFile("w+") as output:
            started = time.perf_counter()

            def enter() -> None:
                (group / "cgroup.procs").write_text(str(os.getpid()))
                os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cpus])

            child = subprocess.Popen(
                command,
                stdout=output,
                stderr=sys.stderr,
                preexec_fn=enter,
                env=os.environ | {"OMP_NUM_THREADS": str(cpus), "HF_HUB_OFFLINE": "1"},
            )
            anonymous = 0
            while child.poll() is None:
                anonymous = max(anonymous, _anonymous(group, version))
                time.sleep(0.1)
            seconds = time.perf_counter() - started
            output.seek(0)
            return Run(child.returncode, output.read(), seconds, anonymous)
    finally:
        _drop(group)


def _make(limit: int) -> tuple[Path, int]:
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    first = next((path for _, names, path in lines if "memory" in names.split(",")), None)
    unified = next((path for number, _, path in lines if number == "0"), "/")
    name = f"lxt-bench-{os.getpid()}"
    try:
        if first is not None:
            group = ROOT / "memory" / first.strip("/") / name
            group.mkdir()
            (group / "memory.limit_in_bytes").write_text(str(limit))
            return group, 1
        group = ROOT / unified.strip("/") / name
        if "memory" not in (group.parent / "cgroup.subtree_control").read_text().split():
            raise NoCgroup(f"the memory controller isn't on for children of {group.parent}")
        group.mkdir()
        (group / "memory.max").write_text(str(limit))
        if (group / "memory.swap.max").exists():
            (group / "memory.swap.max").write_text("0")
        return group, 2
    except OSError as error:
        raise NoCgroup(f"no memory cgroup can be made here: {error}") from error


def _anonymous(group: Path, version: int) -> int:
    key = "rss" if version == 1 else "anon"
    lines = (group / "memory.stat").read_text().splitlines()
    return next((int(line.split()[1]) for line in lines if line.split()[0] == key), 0)


def _drop(group: Path) -> None:
    for _ in range(50):  # the kernel lets go of a killed process a little later
        try:
            group.rmdir()
            return
        except OSError:
            time.sleep(0.1)
