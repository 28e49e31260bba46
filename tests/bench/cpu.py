"""The CPU benchmarks: time, memory and start-up of lxt against the plain model and other packages.

    python tests/bench/cpu.py [--sections NAME ...] [--seconds 480] [--threads 1] [--report docs/benchmarks.md] [--tiny]

Random weights: time needs no trained ones. Methods that are compared run interleaved in one process, and ratios are
taken within a round (timing.py). Prints each section's table when it is done; with --report the page's marked part is
written, and the same figures as JSON beside it. Missing a bar is printed, and is no failure: other work on the machine
moves figures. `--tiny` runs everything once with sizes that say nothing about speed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import torch
from sections import SECTIONS, Sizes
from subjects import TINY, machine
from table import Row, Table, as_markdown, write

ROOT = Path(__file__).resolve().parents[2]
# of what a trial run does, nothing takes long
SMALL = Sizes(
    wide=TINY,
    grouped=TINY,
    llama=TINY,
    deep=3,
    tokens=16,
    long=24,
    longer=32,
    peak=16,
    targets=3,
    steps=2,
    processes=1,
    rounds=(1, 1),
    compiled=False,
)


def main() -> None:
    """Run the sections that were asked for."""
    names = [section.name for section in SECTIONS]
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sections", nargs="+", default=names, choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--seconds", type=float, default=480, help="for all sections together, about")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", type=Path, help="the page whose marked part is written, and .json beside it")
    parser.add_argument("--note", default="", help="what else a reader should know of the machine")
    parser.add_argument("--tiny", action="store_true", help="a trial run")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tables = run(options.sections, options.seconds, SMALL if options.tiny else Sizes())
    about = machine() | ({"note": options.note} if options.note else {})
    if options.report:
        write(options.report, tables, about)
        print(f"wrote {options.report} and {options.report.with_suffix('.json').name}")
    else:
        print(as_markdown(tables, about))


def run(names: Sequence[str], seconds: float, sizes: Sizes) -> list[Table]:
    """The sections' tables; each gets its share of the time that is left."""
    tables: list[Table] = []
    waiting = [section for section in SECTIONS if section.name in names]
    end = time.monotonic() + seconds
    for number, section in enumerate(waiting):
        left, start = end - time.monotonic(), time.monotonic()
        share = left * section.share / sum(other.share for other in waiting[number:])
        if left <= 0:
            tables.append(Table(section.name, section.name, "", [Row(section.name, note="left out: no time left")]))
            continue
        print(f"lxt: {section.name} ({number + 1} of {len(waiting)}, about {share:.0f} s)", file=sys.stderr, flush=True)
        tables.append(section.run(sizes, share))
        print(f"lxt: {section.name} took {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return tables


if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # else transformers, which is imported later, takes kernels.py here for a package
    main()
