"""All GPU measurements in one run of under 8 minutes: correctness first, then time, memory and TFLOP/s.

    python tests/bench/gpu.py [--out out/gpu] [--sections NAME ...] [--seconds 470] [--dry-run]

Needs one NVIDIA GPU, torch >= 2.11, transformers >= 5.17 and triton >= 3.6; no network, and no installation: it takes
the checkout that it lies in. UPSTREAM_LXT in the environment names a folder that holds upstream's `lxt`, to compare
with. Time is that of CUDA events. Each section runs in a process of its own and writes a line of JSON for each row as
it is measured, so that what fails, hangs or runs out of memory takes nothing else with it; after each section
gpu.md and gpu.json are written again. Exits with 1 if a kernel is wrong. `--dry-run` takes the same ways on the CPU
with tiny sizes and interpreted kernels; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DRY = "--dry-run" in sys.argv
START = time.monotonic()
sys.path.insert(0, str(HERE.parents[1]))  # for lxt, installed or not

import gpu_kernels  # noqa: E402  what is above must come first
import gpu_model  # noqa: E402
import gpu_report  # noqa: E402
import torch  # noqa: E402
from gpu_cases import Sizes  # noqa: E402
from gpu_rows import RESTART, Rows, read  # noqa: E402
from subjects import Shape  # noqa: E402

# Transformers would take kernels.py here for the package of that name.
sys.path[:] = [place for place in sys.path if Path(place).resolve() != HERE]


ODD = Sizes(tokens=37, hidden=1000, mlp=333, heads=6, kv_heads=2, width=80)  # they fill no tile


@dataclass(frozen=True)
class Sized:
    """Everything that a dry run makes smaller."""

    shape: Shape = gpu_model.LLAMA_8B
    square: int = 8192
    copied: int = 2**32
    products: int = 2048  # tokens
    compared: int = 512
    odd: Sizes = ODD
    timed: int = 8192
    lengths: tuple[int, ...] = (2048, 128, 512, 8192)
    profiled: tuple[int, ...] = (2048,)
    launches: int = 128
    compiled: int = 4  # layers
    backend: str = "inductor"
    long: tuple[int, ...] = (32768, 131072)

    def sizes(self, tokens: int) -> Sizes:
        s = self.shape
        return Sizes(tokens, s.hidden, s.mlp, s.heads, s.kv_heads, s.hidden // s.heads)


TINY = Sized(
    shape=Shape(layers=2, hidden=32, mlp=48, heads=4, kv_heads=2, vocabulary=61),
    square=64,
    copied=2**12,
    products=16,
    compared=16,
    odd=Sizes(tokens=5, hidden=20, mlp=7, heads=2, kv_heads=1, width=10),
    timed=16,
    lengths=(16, 8),
    profiled=(16,),
    launches=8,
    compiled=1,
    backend="aot_eager",
    long=(16, 24),
)
SECONDS = {  # of each section, in the order in which they run; what one leaves over goes to those behind it
    "machine": 35,
    "correctness": 75,
    "kernels": 45,
    "attribution": 90,
    "graphs": 30,
    "long": 140,
    "compiled": 55,
}
GRACE = 5  # seconds in which a section may end the row that it is at
TITLES = {
    "machine": "Machine, and what it reaches",
    "correctness": "Kernels against their eager twins",
    "kernels": "Time of each kernel, bfloat16, {timed} tokens",
    "attribution": "Llama-3.1-8B's shape, bfloat16, random weights",
    "graphs": "T = {launches}, as one CUDA graph",
    "long": "Long contexts, every layer checkpointed",
    "compiled": "T = {launches}, torch.compile, {compiled} of the layers",
}


def section(name: str, out: Path, seconds: float, sized: Sized) -> None:
    """Measure one section, in this process."""
    device = torch.device("cpu" if DRY else "cuda")
    rows = Rows(out / f"{name}.jsonl", seconds - (time.monotonic() - START))
    upstream = os.environ.get("UPSTREAM_LXT")
    if name == "machine":
        gpu_kernels.ceilings(rows, device, sized.sizes(sized.products), sized.square, sized.copied)
    elif name == "correctness":
        gpu_kernels.correctness(rows, device, sized.sizes(sized.compared), sized.odd, one_dtype=DRY)
    elif name == "kernels":
        measured = read(out / "machine.jsonl").values()
        ceiling = {unit: max((row.get(unit, 0.0) for row in measured), default=0.0) for unit in ("GB/s", "TFLOP/s")}
        ceiling = {unit: value for unit, value in ceiling.items() if value}
        failed = {row["kernel"] for row in gpu_report.wrong(list(read(out / "correctness.jsonl").values()))}
        gpu_kernels.timing(rows, device, sized.sizes(sized.timed), ceiling, failed, repeats=1 if DRY else 8)
    elif name == "attribution":
        gpu_model.attribution(rows, device, sized.shape, sized.lengths, sized.profiled, upstream)
    elif name == "graphs":
        gpu_model.graphs(rows, device, sized.shape, sized.launches, upstream)
    elif name == "long":
        gpu_model.long_contexts(rows, device, sized.shape, sized.long)
    else:
        shape = replace(sized.shape, layers=sized.compiled)
        gpu_model.compiled(rows, device, shape, sized.launches, sized.backend, upstream)


def run(name: str, out: Path, seconds: float) -> tuple[str, float]:
    """Run a section in its own process; how it ended, and after how many seconds."""
    file, log = out / f"{name}.jsonl", out / f"{name}.log"
    file.write_text("")
    log.write_text("")
    environment = {key: value for key, value in os.environ.items() if key not in ("LXT_KERNELS", "TRITON_INTERPRET")}
    environment["HF_HUB_OFFLINE"] = "1"
    if DRY:
        environment["TRITON_INTERPRET"] = "1"  # read when triton is imported
    if name == "long":
        environment["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # little memory is left beside them
    start = time.monotonic()
    while (left := seconds - (time.monotonic() - start)) > 0:
        before = file.stat().st_size
        command = [sys.executable, str(HERE / "gpu.py"), "--section", name, "--out", str(out), "--seconds", str(left)]
        command += ["--dry-run"] * DRY
        with log.open("a") as to:
            try:
                ended = subprocess.run(command, stdout=to, stderr=to, timeout=left + GRACE, env=environment).returncode
            except subprocess.TimeoutExpired:
                break
        if ended == 0:
            return "done", time.monotonic() - start
        if (ended > 0 and ended != RESTART) or file.stat().st_size == before:
            last = (log.read_text().strip().splitlines() or [""])[-1]
            return f"failed with status {ended}: {last}", time.monotonic() - start
    return "out of time", time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="the folder of gpu.md and gpu.json")
    parser.add_argument("--sections", nargs="+", choices=list(SECONDS), default=list(SECONDS), metavar="NAME")
    parser.add_argument("--seconds", type=float, default=470, help="of everything together")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU: whether it works, not how fast")
    parser.add_argument("--section", choices=list(SECONDS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    sized = TINY if DRY else Sized()
    if options.section:
        section(options.section, options.out, options.seconds, sized)
        return
    if not DRY and not torch.cuda.is_available():
        sys.exit("torch finds no GPU here; --dry-run runs tiny sizes on the CPU")
    options.out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    state: dict[str, Any] = {"sections": {}}
    titles = {name: title.format(**vars(sized)) for name, title in TITLES.items()}
    lengths = {"attribution": sized.lengths[0], "launches": sized.launches, "long": sized.long[-1]}
    plain, *ours = (gpu_model.operations(sized.shape, sized.lengths[0], rules) for rules in (None, "attnlrp", "cp"))
    floors: dict[str, float] = dict(zip(("attnlrp", "cp"), (each / plain for each in ours), strict=True))
    for place, name in enumerate(options.sections):
        left = options.seconds - (time.monotonic() - start)
        later = sum(SECONDS[other] for other in options.sections[place + 1 :])
        allowed = left if DRY else min(left, max(SECONDS[name], left - later))
        print(f"{name}: at most {allowed:.0f} s", flush=True)
        ended, took = run(name, options.out, allowed) if allowed > 5 else ("no time left", 0.0)
        print(f"{name}: {ended}, {took:.0f} s", flush=True)
        rows = list(read(options.out / f"{name}.jsonl").values()) if took else []
        state["sections"][name] = {"ended": ended, "seconds": took, "rows": rows}
        text = gpu_report.markdown(state, titles, lengths, floors)
        (options.out / "gpu.md").write_text(text)
        (options.out / "gpu.json").write_text(json.dumps(state, indent=1) + "\n")
    print(text.split("\n## ")[0])
    if gpu_report.failures(state):
        sys.exit(1)


if __name__ == "__main__":
    main()
