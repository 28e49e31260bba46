"""Time of one attribution against the plain forward and backward of the same model, interleaved in one process.

    python tests/bench/speed.py [--layers 12] [--hidden 1024] [--tokens 256] [--dtype float32] [--rounds 5]

Random weights: time needs no trained ones. The baseline computes the last position's logits only, as lxt does, and
its weights are frozen, so that the difference is the rules and nothing else. One thread.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

import lxt
from lxt.lastlayer import only_at


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dtype = getattr(torch, options.dtype)
    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 11 // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=options.hidden // 64,
        vocab_size=32000,
    )
    model = LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)
    embeds = torch.randn(1, options.tokens, options.hidden).to(dtype)

    def once(rules: str | None, narrow: bool = False, patch_map: lxt.PatchMap | None = None) -> float:
        last = only_at(model.model.layers[-1] if narrow else None, torch.tensor([[options.tokens - 1]]))
        patch = lxt.monkey_patch(model.model, rules, patch_map) if rules else nullcontext()
        x = embeds.clone().requires_grad_()
        with patch, last:  # in this order: a fused layer would stand in for the narrowed one
            start = time.perf_counter()
            hidden = model.model(inputs_embeds=x, use_cache=False).last_hidden_state
            model.lm_head(hidden[:, -1]).max().backward()
            return time.perf_counter() - start

    def attributed(rules: str) -> float:
        explainer = lxt.Attributor(model, rules=rules)
        start = time.perf_counter()
        explainer.attribute(embeds.clone())
        return time.perf_counter() - start

    def forward() -> float:
        start = time.perf_counter()
        with torch.no_grad():
            model.lm_head(model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state[:, -1])
        return time.perf_counter() - start

    runs: dict[str, Callable[[], float]] = {
        "plain forward + backward": lambda: once(None),
        "plain forward, no gradient": forward,
        "plain, last layer for the last position": lambda: once(None, narrow=True),
        "attnlrp": lambda: once("attnlrp"),
        "attnlrp, last layer for the last position": lambda: once("attnlrp", narrow=True),
        "attnlrp, operator mode alone": lambda: once("attnlrp", patch_map=lxt.PatchMap()),
        "attnlrp, attribute()": lambda: attributed("attnlrp"),
        "cp": lambda: once("cp"),
        "cp, last layer for the last position": lambda: once("cp", narrow=True),
        "cp, attribute()": lambda: attributed("cp"),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(options.rounds + 1):
        for name, run in runs.items():
            seconds = run()
            if round_:  # the first round warms up
                times[name].append(seconds)
    print(
        f"Llama, {options.layers} layers, hidden {options.hidden}, T = {options.tokens}, {options.dtype}, sdpa, "
        f"one thread; torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}"
    )
    baseline = times["plain forward + backward"]
    print("| | ratio to plain | spread | seconds |\n|---|---|---|---|")
    for name, measured in times.items():
        ratios = sorted(a / b for a, b in zip(measured, baseline, strict=True))
        print(
            f"| {name} | {statistics.median(ratios):.2f} | {ratios[0]:.2f}-{ratios[-1]:.2f} "
            f"| {statistics.median(measured):.2f} |"
        )


if __name__ == "__main__":
    main()
