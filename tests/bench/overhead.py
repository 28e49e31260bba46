"""What the rules cost beside their arithmetic: per operation, per layer, per patch; narrow models, where it shows.

    python tests/bench/overhead.py [--layers 32] [--hidden 64] [--tokens 16] [--rounds 20]

CPU time of one thread, plain and patched interleaved in one process, medians. Weights are random and frozen. The last
column is what the rules add to a layer's forward and backward; a wide model's arithmetic hides it.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
import timeit
from collections.abc import Callable
from contextlib import nullcontext

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
)

import lxt
from lxt.composites import ATTN_LRP
from lxt.mode import RuleMode

CALLS = 5000


class _Empty(TorchFunctionMode):
    """What torch asks for any mode at all."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


OPERATIONS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "x.shape": lambda x, w: x.shape,
    "x.view": lambda x, w: x.view(-1),
    "x + x": lambda x, w: x + x,
    "x * 2.0": lambda x, w: x * 2.0,
    "x * x": lambda x, w: x * x,
    "x.pow(2)": lambda x, w: x.pow(2),
    "torch.cat": lambda x, w: torch.cat((x, x)),
    "linear": lambda x, w: F.linear(x, w),
    "softmax": lambda x, w: torch.softmax(x, -1),
    "silu": lambda x, w: F.silu(x),
    "leaky_relu": lambda x, w: F.leaky_relu(x),
}


def operations() -> None:
    """Prints microseconds for each operation: plain, under an empty mode, under the rules."""
    x, w = torch.randn(4, 4, requires_grad=True), torch.randn(4, 4)
    print("| forward, us | plain | any mode | the rules |\n|---|---|---|---|")
    for name, operation in OPERATIONS.items():
        taken = []
        for mode in (nullcontext(), _Empty(), RuleMode(ATTN_LRP)):
            with mode:
                taken.append(min(timeit.repeat(lambda: operation(x, w), number=CALLS, repeat=5)) / CALLS * 1e6)  # noqa: B023
        print(f"| {name} | " + " | ".join(f"{microseconds:.1f}" for microseconds in taken) + " |")


def models(layers: int, hidden: int) -> dict[str, tuple[nn.Module, lxt.PatchMap | None]]:
    """Decoders with and without fused forwards; an empty map leaves everything to the mode."""
    llama = {
        "vocab_size": 300,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "eos_token_id": 2,
    }
    gptj = GPTJConfig(
        vocab_size=300, n_embd=hidden, n_layer=layers, n_head=4, rotary_dim=8, bos_token_id=1, eos_token_id=2
    )
    falcon = FalconConfig(vocab_size=300, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4)
    decoder = LlamaForCausalLM(LlamaConfig(**llama))
    return {
        "Llama, fused": (decoder, None),
        "Llama, the mode alone": (decoder, lxt.PatchMap()),
        "OLMo 2, no map": (Olmo2ForCausalLM(Olmo2Config(**llama)), None),
        "GPT-J, no map": (GPTJForCausalLM(gptj), None),
        "Falcon, no map": (FalconForCausalLM(falcon), None),
    }


def once(model: nn.Module, x: Tensor) -> float:
    """CPU seconds of a forward and a backward."""
    start = time.process_time()
    embeds = x.clone().requires_grad_()
    model(inputs_embeds=embeds, use_cache=False, logits_to_keep=1).logits[0, -1].max().backward()
    return time.process_time() - start


def layers_and_patches(layers: int, hidden: int, tokens: int, rounds: int) -> None:
    """Prints, for each model, the ratio to plain, what a layer costs more, and what patching costs."""
    print("\n| | ratio to plain | us more for each layer | patching, ms for 100 modules |\n|---|---|---|---|")
    for name, (model, patch_map) in models(layers, hidden).items():
        model.eval().requires_grad_(False)
        x = torch.randn(1, tokens, hidden)
        plain: list[float] = []
        patched: list[float] = []
        patching: list[float] = []
        for round_ in range(rounds + 2):
            seconds = once(model, x)
            start = time.process_time()
            handle = lxt.monkey_patch(model, "attnlrp", patch_map)
            patch = time.process_time() - start
            with handle:
                once(model, x)
                under_rules = once(model, x)
            if round_ > 1:  # the first two warm up
                plain.append(seconds)
                patched.append(under_rules)
                patching.append(patch)
        ratio = statistics.median(b / a for a, b in zip(plain, patched, strict=True))
        more = (statistics.median(patched) - statistics.median(plain)) / layers * 1e6
        modules = sum(1 for _ in model.modules())
        print(f"| {name} | {ratio:.2f} | {more:.0f} | {statistics.median(patching) / modules * 1e5:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{options.layers} layers, hidden {options.hidden}, T = {options.tokens}, float32, one thread; torch "
        f"{torch.__version__}, transformers {transformers.__version__}, {platform.machine()}\n"
    )
    operations()
    layers_and_patches(options.layers, options.hidden, options.tokens, options.rounds)


if __name__ == "__main__":
    main()
