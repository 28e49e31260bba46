"""What memory.py runs inside the memory cgroup; each prints one line of JSON at its end."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

BLOCK = 8 * 2**20  # bytes of a read
PASSES = 2


def rates(options: argparse.Namespace) -> dict[str, Any]:
    """Bytes/s of a file that isn't in the page cache, FLOP/s of bfloat16 matmuls at the layers' shapes."""
    file = max(options.model.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    buffer, count, started = bytearray(BLOCK), 0, time.perf_counter()
    with file.open("rb", buffering=0) as opened:
        while got := opened.readinto(buffer):
            count += got
    disk = count / (time.perf_counter() - started)
    config = json.loads((options.model / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    flops = seconds = 0.0
    linear = torch.nn.functional.linear
    for out, into, times in ((inner, hidden, 2), (hidden, inner, 1), (hidden, hidden, 2)):
        weight = torch.randn(out, into).bfloat16()
        x, gradient = torch.randn(options.tokens, into).bfloat16(), torch.randn(options.tokens, out).bfloat16()
        # Of three matmuls for each weight two go forward.
        flops += 3 * times * 2 * options.tokens * out * into
        seconds += times * (2 * _time(partial(linear, x, weight)) + _time(partial(torch.matmul, gradient, weight)))
    return {"disk": disk, "matmul": flops / seconds}


def placed(options: argparse.Namespace) -> dict[str, Any]:
    """With lxt's placement."""
    return _attribute(options, memory=f"{options.limit}GiB", offload_folder=options.model.parent / "offload")


def control(options: argparse.Namespace) -> dict[str, Any]:
    """Without it."""
    return _attribute(options)


def _attribute(options: argparse.Namespace, **placement: Any) -> dict[str, Any]:
    import lxt
    from lxt import tiny

    started = time.perf_counter()
    explainer = lxt.load(options.model, tokenizer=str(tiny.path()), **placement)
    load = time.perf_counter() - started
    ids = [[1 + (7 * i) % 500 for i in range(options.tokens)]]
    seconds, reads = [], []
    for _ in range(PASSES):
        before, started = _read(), time.perf_counter()
        out = explainer.attribute(ids, latents="residual")
        seconds.append(time.perf_counter() - started)
        reads.append(_read() - before)
    if options.save:
        save_file({"relevance": out.relevance, "residual": out.latents["residual"]}, options.save)
    places = getattr(explainer.model, "hf_device_map", {"": "mapped"})
    counted = {str(place): list(places.values()).count(place) for place in set(places.values())}
    return {"load": load, "seconds": seconds, "read": reads[0], "placement": f"parts {counted}"}


def _read() -> int:
    """Bytes that this process had read from the disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def _time(function: Callable[[], Any], rounds: int = 3) -> float:
    function()
    started = time.perf_counter()
    for _ in range(rounds):
        function()
    return (time.perf_counter() - started) / rounds


def main() -> None:
    """Run the worker of that name."""
    parser = argparse.ArgumentParser()
    parser.add_argument("worker", choices=["rates", "placed", "control"])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--limit", type=float, default=2.0)
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    print(json.dumps({"rates": rates, "placed": placed, "control": control}[options.worker](options)))


if __name__ == "__main__":
    main()
