"""What latents cost: time of attribute() with them as a ratio to attribute() without, interleaved in one process.

    python tests/bench/tracing.py [--tokens 256] [--rounds 9] [--threads 1] [--dtype float32] [--tiny]

The Llama of cpu.py, 12 layers, random weights. Without latents the last layer runs for the explained position alone;
with heads or neurons of that layer it runs for all, whatever is read. "last layer in full" is that alone.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import torch
from subjects import TINY, WIDE, build, embeddings, machine
from timing import interleaved

from lxt import Keep
from lxt.attributor import Attributor

CASES = {
    "no latents": (),
    "residual": ("residual",),
    "residual, head": ("residual", "head"),
    "residual, head, neuron (top 20)": ("residual", "head", Keep("neuron", top=20)),
    "residual, head, neuron": ("residual", "head", "neuron"),
    "attn_out, residual_mid, mlp_out": ("attn_out", "residual_mid", "mlp_out"),
}


def main() -> None:
    """Print a line for each case."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--tiny", action="store_true", help="a trial run")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = TINY if options.tiny else WIDE
    model = build(shape, getattr(torch, options.dtype))
    given = embeddings(model, 16 if options.tiny else options.tokens)
    explainer = Attributor(model, checkpoint="off")
    last = (Keep("head", layers=(shape.layers - 1,)),)
    clock = time.process_time if options.threads == 1 else time.perf_counter  # others run on this machine too

    def case(latents):
        return lambda: contextlib.nullcontext(lambda: explainer.attribute(given, target=5, latents=latents))

    cases = {name: case(latents) for name, latents in CASES.items()} | {"last layer in full": case(last)}
    rounds = (2, 2) if options.tiny else (options.rounds, options.rounds)
    print(machine())
    for timing in interleaved(cases, "no latents", 1e9, rounds, clock):
        low, high = min(timing.ratios), max(timing.ratios)
        print(f"{timing.name:34s} {timing.median:7.3f} s  {timing.ratio:5.3f}  ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
