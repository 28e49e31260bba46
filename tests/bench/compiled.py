"""Time of a compiled patched model against the eager patched one and the compiled plain one.

    python tests/bench/compiled.py [--layers 4] [--hidden 512] [--tokens 128] [--rules attnlrp] [--rounds 7]

Interleaved in one process: forward and backward of the last position's logit of a Llama with random, frozen weights;
torch.compile with inductor, in one graph. Ratios, since the machine may be shared: median, lowest and highest over the
rounds. One thread.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import transformers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lxt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rules", default="attnlrp")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 11 // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=options.hidden // 64,
        vocab_size=32000,
        use_cache=False,
    )
    models = {name: LlamaForCausalLM(config).eval().requires_grad_(False) for name in ("plain", "patched")}
    models["patched"].load_state_dict(models["plain"].state_dict())
    embeds = torch.randn(1, options.tokens, options.hidden)

    def once(model: nn.Module) -> tuple[float, torch.Tensor]:
        x = embeds.clone().requires_grad_()
        start = time.perf_counter()
        model(inputs_embeds=x, logits_to_keep=1).logits[0, -1, 7].backward()
        return time.perf_counter() - start, x.grad

    with lxt.monkey_patch(models["patched"], options.rules):
        runs = dict(models) | {f"{name}, compiled": torch.compile(m, fullgraph=True) for name, m in models.items()}
        for name, model in runs.items():
            print(f"first call, {name}: {once(model)[0]:.1f} s")
        eager, compiled = (once(runs[name])[1] for name in ("patched", "patched, compiled"))
        print(f"largest difference, compiled to eager: {(compiled - eager).abs().max() / eager.abs().max():.1e}")
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(options.rounds):
            for name, model in runs.items():
                times[name].append(once(model)[0])
    print(
        f"Llama, {options.layers} layers, hidden {options.hidden}, T = {options.tokens}, float32, sdpa, one thread, "
        f"{options.rules}; torch {torch.__version__}, transformers {transformers.__version__}"
    )
    print("| | ratio | spread |\n|---|---|---|")
    for above, below in (
        ("patched, compiled", "patched"),
        ("patched, compiled", "plain, compiled"),
        ("patched", "plain"),
        ("plain, compiled", "plain"),
    ):
        ratios = sorted(a / b for a, b in zip(times[above], times[below], strict=True))
        print(f"| {above} / {below} | {statistics.median(ratios):.2f} | {ratios[0]:.2f}-{ratios[-1]:.2f} |")


if __name__ == "__main__":
    main()
