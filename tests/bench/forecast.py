"""What explainer.forecast says against what an attribution takes: memory and time, each in a process of its own.

    python tests/bench/forecast.py [--layers 8] [--hidden 512] [--dtype float32] [--tokens 512 2048] [--json FILE]

The peak is the process's resident memory (VmHWM, reset before) less what it had before its first attribution. One
thread, random weights.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

NAMES = ("llama", "gpt2", "gemma3", "qwen3_moe")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--models", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--checkpoints", nargs="+", default=["off", "layer", "nested"])
    parser.add_argument("--latents", nargs="*", default=[])
    parser.add_argument("--rules", default="attnlrp")
    parser.add_argument("--keep-malloc", action="store_true", help="leave the C library's allocator as it is")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measured(options)))
        return
    rows = []
    print("| model | tokens | checkpoint | forecast MiB | measured MiB | ratio | forecast s | measured s |")
    print("|---|---|---|---|---|---|---|---|")
    for name in options.models:
        for tokens in options.tokens:
            for checkpoint in options.checkpoints:
                argv = [*sys.argv, "--one", f"{name}:{tokens}:{checkpoint}"]
                done = subprocess.run([sys.executable, *argv], capture_output=True, text=True, check=False)
                if done.returncode:
                    print(f"| {name} | {tokens} | {checkpoint} | {done.stderr.splitlines()[-1]} |||||")
                    continue
                row = json.loads(done.stdout.splitlines()[-1])
                rows.append(row)
                print(
                    f"| {name} | {tokens} | {checkpoint} | {row['forecast'] / 2**20:.0f} "
                    f"| {row['measured'] / 2**20:.0f} | {row['forecast'] / row['measured']:.2f} "
                    f"| {row['forecast_seconds']:.1f} | {row['seconds']:.1f} |",
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


def measured(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    import lxt
    from lxt.memory import give_back_freed

    name, tokens, checkpoint = options.one.split(":")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if not options.keep_malloc:
        give_back_freed()
    model = build(name, options, int(tokens)).to(getattr(torch, options.dtype)).eval().requires_grad_(False)
    explainer = lxt.Attributor(model, rules=options.rules, checkpoint=checkpoint)
    ids = torch.randint(0, 1000, (1, int(tokens)))
    forecast = explainer.forecast(ids, latents=options.latents)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before, start = status("VmRSS"), time.perf_counter()
    explainer.attribute(ids, latents=options.latents)
    return {
        "model": name,
        "tokens": int(tokens),
        "checkpoint": checkpoint,
        "forecast": forecast.devices["cpu"].needed,
        "measured": status("VmHWM") - before,
        "forecast_seconds": forecast.seconds,
        "seconds": time.perf_counter() - start,
    }


def build(name: str, options: argparse.Namespace, tokens: int) -> Any:
    import transformers as tf

    hidden, heads = options.hidden, options.hidden // 64
    common: dict[str, Any] = {
        "vocab_size": 32000,
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4,
        "num_hidden_layers": options.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(heads // 2, 1),
        "max_position_embeddings": max(tokens, 4096),
    }
    special = {"bos_token_id": 0, "eos_token_id": 1}
    if name == "llama":
        return tf.LlamaForCausalLM(tf.LlamaConfig(**common))
    if name == "gemma3":
        more = {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 512}
        return tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**common, **more))
    if name == "qwen3_moe":
        more = {"head_dim": 64, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": hidden}
        return tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**common, **more))
    return tf.GPT2LMHeadModel(
        tf.GPT2Config(
            vocab_size=32000,
            n_embd=hidden,
            n_layer=options.layers,
            n_head=heads,
            n_positions=max(tokens, 1024),
            **special,
        )
    )


def status(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()
