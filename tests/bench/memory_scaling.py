"""How memory grows with tokens and with layers, without checkpoints and with them: forecast, and measured.

    python tests/bench/memory_scaling.py [--plot docs/images/memory.png]
    python tests/bench/memory_scaling.py --long

Every point is a process of its own, as in forecast.py: a Llama with random weights in float32, one thread. `--long`
instead runs 32768 tokens through 12 layers in bfloat16 with nested checkpoints, in a memory cgroup of 3 GiB.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from memory_cgroup import NoCgroup, run_limited

HERE = Path(__file__)
HOW = ("off", "layer", "nested")
HIDDEN = 256
TOKENS, LAYERS = (256, 512, 1024, 2048), (4, 9, 16, 36)
FIXED_TOKENS, FIXED_LAYERS = 1024, 16  # of the other series
LIMIT = 3 * 2**30  # bytes, of the long run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--plot", type=Path, help="write the plot to this PNG")
    parser.add_argument("--json", type=Path, help="keep the points here, or read them if the file is there")
    parser.add_argument("--long", action="store_true", help="the long run in a cgroup")
    parser.add_argument("--tokens", type=int, default=32768, help="of the long run")
    parser.add_argument("--cpus", type=int, default=os.cpu_count() or 1, help="of the long run")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        print(json.dumps(long_inside(options.tokens, options.cpus)))
    elif options.long:
        long(options)
    else:
        scaling(options)


def scaling(options: argparse.Namespace) -> None:
    if options.json and options.json.exists():
        points = json.loads(options.json.read_text())
    else:
        once = functools.cache(point)  # the series share one
        wanted = [("tokens", tokens, FIXED_LAYERS, how) for tokens in TOKENS for how in HOW]
        wanted += [("layers", FIXED_TOKENS, layers, how) for layers in LAYERS for how in HOW]
        points: list[dict[str, Any]] = [{"series": series} | once(*rest) for series, *rest in wanted]
        if options.json:
            options.json.write_text(json.dumps(points, indent=1))
    for series, fixed in (("tokens", f"{FIXED_LAYERS} layers"), ("layers", f"{FIXED_TOKENS} tokens")):
        print(f"\n| {series} ({fixed}, hidden {HIDDEN}) | checkpoint | forecast MiB | measured MiB | ratio |")
        print("|---|---|---|---|---|")
        for one in (one for one in points if one["series"] == series):
            ahead, found = one["forecast"] / 2**20, one["measured"] / 2**20
            print(f"| {one[series]} | {one['checkpoint']} | {ahead:.0f} | {found:.0f} | {ahead / found:.2f} |")
    print("\n| measured memory against | checkpoint | line that fits best | furthest point from it |")
    print("|---|---|---|---|")
    for series, how, power in [*(("tokens", how, 1.0) for how in HOW), *(("layers", how, 1.0) for how in HOW)]:
        print(fit(points, series, how, power))
    print(fit(points, "layers", "nested", 0.5))
    if options.plot:
        plot(points, options.plot)


def point(tokens: int, layers: int, how: str) -> dict[str, Any]:
    """One attribution in a process of its own."""
    argv = [str(HERE.with_name("forecast.py")), "--one", f"llama:{tokens}:{how}"]
    argv += ["--hidden", str(HIDDEN), "--layers", str(layers)]
    done = subprocess.run(
        [sys.executable, *argv], capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)} failed: {done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{tokens} tokens, {layers} layers, {how}: {found['seconds']:.1f} s", file=sys.stderr, flush=True)
    return found | {"layers": layers}


def fit(points: list[dict[str, Any]], series: str, how: str, power: float) -> str:
    """A row: the line a + b · x^power through what was measured, by least squares."""
    import numpy as np

    mine = [one for one in points if one["series"] == series and one["checkpoint"] == how]
    x = np.array([one[series] for one in mine], dtype=float) ** power
    y = np.array([one["measured"] / 2**20 for one in mine])
    slope, start = np.polyfit(x, y, 1)
    off = abs(start + slope * x - y) / y
    name = series if power == 1 else f"√{series}"
    return f"| {name} | {how} | {start:.1f} + {slope:.3g} · {name} MiB | {off.max():.0%} |"


def plot(points: list[dict[str, Any]], path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.2), sharey=True)
    for axis, series in zip(axes, ("tokens", "layers"), strict=True):
        for colour, how in zip(("#c44e52", "#dd8452", "#4c72b0"), HOW, strict=True):
            mine = [one for one in points if one["series"] == series and one["checkpoint"] == how]
            x = [one[series] for one in mine]
            axis.plot(x, [one["forecast"] / 2**20 for one in mine], color=colour, label=f'checkpoint="{how}", forecast')
            axis.plot(x, [one["measured"] / 2**20 for one in mine], "o", color=colour, label="measured")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.yaxis.set_major_formatter("{x:.0f}")
        axis.set_xticks(sorted({one[series] for one in points if one["series"] == series}))
        axis.grid(alpha=0.3)
    guide(axes[0], [one for one in points if one["series"] == "tokens"], "tokens", "off", 1.0, "∝ tokens")
    guide(axes[1], [one for one in points if one["series"] == "layers"], "layers", "off", 1.0, "∝ layers")
    guide(axes[1], [one for one in points if one["series"] == "layers"], "layers", "nested", 0.5, "∝ √layers")
    axes[0].set(xlabel="tokens", ylabel="memory beside the weights, MiB", title=f"{FIXED_LAYERS} layers")
    axes[1].set(xlabel="layers", title=f"{FIXED_TOKENS} tokens")
    axes[0].legend(fontsize=8, frameon=False)
    figure.suptitle(f"Llama, hidden {HIDDEN}, float32: peak of one attribution", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def guide(axis: Any, points: list[dict[str, Any]], series: str, how: str, power: float, text: str) -> None:
    """A dotted line of the slope that is expected, through the last point."""
    mine = [one for one in points if one["checkpoint"] == how]
    x = [one[series] for one in mine]
    y = [mine[-1]["forecast"] / 2**20 * (value / x[-1]) ** power for value in x]
    axis.plot(x, y, ":", color="gray", linewidth=1)
    axis.annotate(text, (x[-2], y[-2]), xytext=(2, -12), textcoords="offset points", fontsize=8, color="gray")


def long(options: argparse.Namespace) -> None:
    command = [sys.executable, str(HERE), "--inside", "--tokens", str(options.tokens), "--cpus", str(options.cpus)]
    try:
        run = run_limited(command, LIMIT, options.cpus)
    except NoCgroup as error:
        raise SystemExit(f"not measured: {error}") from None
    if run.status:
        raise SystemExit(f"ended with status {run.status}; -9 is the kernel's, for want of memory")
    found = json.loads(run.output.splitlines()[-1])
    print("| tokens | limit | forecast | measured | most anonymous memory of the process | attribution | threads |")
    print("|---|---|---|---|---|---|---|")
    print(
        f"| {options.tokens} | {gib(LIMIT)} | {gib(found['forecast'])} | {gib(run.anonymous - found['before'])} "
        f"| {gib(run.anonymous)} | {found['seconds']:.0f} s | {options.cpus} |"
    )
    print(f"\n{gib(found['before'])} before the attribution; relevance finite: {found['finite']}")


def gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"


def long_inside(tokens: int, threads: int) -> dict[str, Any]:
    import torch
    import transformers as tf

    import lxt

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=12,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=tokens,
    )
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    explainer = lxt.Attributor(model, checkpoint="nested", memory=LIMIT)
    ids = torch.randint(0, 32000, (1, tokens))
    forecast = explainer.forecast(ids).devices["cpu"]
    print(forecast, file=sys.stderr, flush=True)
    before, started = anonymous(), time.perf_counter()
    out = explainer.attribute(ids)
    return {
        "forecast": forecast.needed,
        "before": before,
        "seconds": time.perf_counter() - started,
        "finite": bool(out.relevance.isfinite().all()),
    }


def anonymous() -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()
