"""For gpu.py: a whole model of Llama-3.1-8B's shape, explained by lxt and by what lxt is compared with.

Random weights: time needs no trained ones. The baseline is the plain model's forward and backward with frozen weights,
SDPA and the last position's logits only. All methods run interleaved on one set of weights; a ratio is the median over
rounds of two neighbours in one round.

Operations are counted, not measured: two for each multiplication of the linear layers, and half of the T x T products
of causal attention (two forward, four backward; under CP one, and no backward into gate, queries and keys). What
attention computes again in its backward is not counted.
"""

from __future__ import annotations

import importlib
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gpu_rows import READY, Clock, Rows, summary
from gpu_upstream import patched_by_upstream
from subjects import Shape, config, made_in, shared_copy
from torch import Tensor, nn

import lxt

__all__ = ["LLAMA_8B", "attribution", "compiled", "graphs", "long_contexts", "operations"]

MODES = ("off", "exact", "fast")
# By their names: matrix products and attention, torch's and ours. All others only move numbers.
PRODUCTS = re.compile(
    r"gemm|gemv|nvjet|cutlass|xmma|cublas|splitk|flash|fmha|sdpa|attention|statistics_kernel|value_kernel",
    re.IGNORECASE,
)
Step = Callable[[Tensor], Tensor]


LLAMA_8B = Shape(layers=32, hidden=4096, mlp=14336, heads=32, kv_heads=8, vocabulary=128256)


def operations(shape: Shape, tokens: int, rules: str | None) -> float:
    """Floating-point operations of a forward and a backward that explain the last position; `rules` None is plain."""
    h, kv = shape.hidden, shape.hidden // shape.heads * shape.kv_heads
    linear = 2 * tokens * (2 * h * h + 2 * h * kv + 3 * h * shape.mlp)
    stopped = 2 * tokens * (h * h + h * kv + h * shape.mlp) if rules == "cp" else 0
    product = tokens * tokens * h
    layer = 2 * linear - stopped + (3 if rules == "cp" else 6) * product
    return float(shape.layers * layer + 4 * h * shape.vocabulary)


def build(shape: Shape, device: torch.device) -> Any:
    """The model in bf16, its weights made on the device."""
    from transformers import LlamaForCausalLM

    rope = {"rope_type": "default", "rope_theta": 500000.0}
    with made_in(torch.bfloat16), torch.device(device):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            config(shape, max_position_embeddings=131072, rope_parameters=rope, tie_word_embeddings=False)
        )
    for name, parameter in model.named_parameters():  # whatever this version of transformers makes of them
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.02)
        else:
            nn.init.ones_(parameter)
        assert parameter.dtype == torch.bfloat16, name
    model.set_attn_implementation("sdpa")
    return model.eval().requires_grad_(False)


def prompt(model: Any, tokens: int) -> Tensor:
    """[1, token, hidden], random embeddings of the size that the model's have."""
    device = model.lm_head.weight.device
    random = torch.Generator(device).manual_seed(tokens)
    shape = (1, tokens, model.config.hidden_size)
    return (0.02 * torch.randn(shape, generator=random, device=device)).to(model.lm_head.weight.dtype)


def explained(model: Any, hidden: Tensor) -> Tensor:
    return model.lm_head(hidden[:, -1]).max()


def step(model: Any, decoder: Any, embeds: Tensor) -> Tensor:
    """The coefficients of the last position's largest logit; `decoder` is model.model, or that compiled."""
    x = embeds.detach().requires_grad_()
    hidden = decoder(inputs_embeds=x, use_cache=False).last_hidden_state
    return torch.autograd.grad(explained(model, hidden), x)[0]


def forward(model: Any, embeds: Tensor) -> Tensor:
    with torch.no_grad():
        return explained(model, model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state)


def documented(model: Any, embeds: Tensor) -> Tensor:
    """Upstream's quickstart: the logits of all positions."""
    x = embeds.detach().requires_grad_()
    logits = model(inputs_embeds=x, use_cache=False).logits
    return torch.autograd.grad(logits[0, -1, :].max(), x)[0]


@contextmanager
def kernels(mode: str) -> Iterator[None]:
    before = os.environ.get("LXT_KERNELS")
    os.environ["LXT_KERNELS"] = mode
    try:
        yield
    finally:
        os.environ.pop("LXT_KERNELS")
        if before is not None:
            os.environ["LXT_KERNELS"] = before


@dataclass(frozen=True)
class Method:
    """One way to explain: `context` is entered before the clock starts, `run` is timed."""

    name: str
    run: Step
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    rules: str | None = None


def patched(model: Any, rules: str, mode: str) -> Callable[[], AbstractContextManager[Any]]:
    @contextmanager
    def enter() -> Iterator[None]:
        with kernels(mode), lxt.monkey_patch(model.model, rules):
            yield

    return enter


def methods(model: Any, upstream: str | None) -> list[Method]:
    """The plain model, lxt with its kernels off and on, and upstream where it is at hand."""
    found = [Method("plain", partial(step, model, model.model)), Method("plain forward", partial(forward, model))]
    for rules in ("attnlrp", "cp"):
        for mode in MODES:
            name = f"{rules}, kernels {mode}"
            found.append(Method(name, partial(step, model, model.model), patched(model, rules, mode), rules))
        explainer = lxt.Attributor(model, rules=rules)
        for mode in ("off", "fast"):
            name = f"{rules}, kernels {mode}, attribute()"
            run = lambda x, explainer=explainer: explainer.attribute(x).relevance  # noqa: E731
            found.append(Method(name, run, partial(kernels, mode), rules))
    if upstream:
        for rules in ("attnlrp", "cp"):
            other = patched_by_upstream(shared_copy(model), rules, upstream)
            found.append(Method(f"upstream {rules}", partial(documented, other), rules=rules))
    return found


def attribution(
    rows: Rows,
    device: torch.device,
    shape: Shape,
    lengths: tuple[int, ...],
    profiled: tuple[int, ...],
    upstream: str | None,
) -> None:
    """Every method at every length: time, memory, TFLOP/s, and the kernels' shares at the `profiled` lengths."""
    model = build(shape, device)
    every = _with_upstream(rows, model, upstream)
    for tokens in lengths:
        embeds = prompt(model, tokens)
        measure(rows, shape, model, embeds, every, 3 if tokens > 4096 else 5)
        if tokens in profiled:
            for method in every:
                if not any(word in method.name for word in ("forward", "attribute", "exact")):
                    name = f"T = {tokens}, {method.name}, by kernel"
                    rows.attempt(name, partial(by_kernel, method, embeds), needs=3, tokens=tokens, method=method.name)


def _with_upstream(rows: Rows, model: Any, upstream: str | None) -> list[Method]:
    try:
        return methods(model, upstream)
    except Exception as error:  # upstream needs packages, and a transformers, that may be missing
        rows.write("upstream", f"not importable: {type(error).__name__}: {error}")
        return methods(model, None)


def measure(rows: Rows, shape: Shape, model: Any, embeds: Tensor, every: list[Method], rounds: int) -> None:
    """One row for each method at this length; the first run of each warms up and shows memory and the result."""
    device, tokens = embeds.device, embeds.shape[1]
    clock, results, ready = Clock(device), {}, {}
    for method in every:
        key = f"T = {tokens}, {method.name}"

        def warm(method: Method = method) -> dict[str, Any]:
            before = _empty(device)
            with method.context():
                results[method.name] = method.run(embeds).detach()
                clock.wait()
            peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else 0
            ready[method.name] = {"peak GiB beside the weights": peak / 2**30}
            return {"status": READY}

        rows.attempt(key, warm, again=True, tokens=tokens, method=method.name)
    times: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(rounds):
        if rows.left() < 0 and all(times.values()):
            break
        for method in every:
            if method.name in ready:
                with method.context():
                    times[method.name].append(clock.once(lambda run=method.run: run(embeds)))
    for method in every:
        if method.name not in ready:
            continue
        found: dict[str, Any] = {"tokens": tokens, "method": method.name, **summary(times[method.name])}
        for label, other in (("/ plain", "plain"), ("/ upstream", f"upstream {method.rules}")):
            if other in times and other != method.name:
                pairs = zip(times[method.name], times[other], strict=True)
                found[label] = statistics.median(a / b for a, b in pairs)
        if "forward" not in method.name and "attribute" not in method.name and "upstream" not in method.name:
            found["TFLOP/s"] = operations(shape, tokens, method.rules) * 1e-9 / found["ms"]
        off = results.get(f"{method.rules}, kernels off")
        if off is not None and method.rules and results[method.name].shape == off.shape:
            found["differs from kernels off by"] = _difference(results[method.name], off)
        rows.write(f"T = {tokens}, {method.name}", **found, **ready[method.name])


def _difference(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|"""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def _empty(device: torch.device) -> int:
    """Start to watch the memory; gives the bytes in use."""
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def by_kernel(method: Method, embeds: Tensor) -> dict[str, Any]:
    """How much of the kernels' time goes into products, and which other kernels take most of it."""
    on_gpu = embeds.device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with method.context():
        method.run(embeds)
        with torch.profiler.profile(activities=[activity]) as profile:
            method.run(embeds)
            Clock(embeds.device).wait()
    events = [event for event in profile.key_averages() if not on_gpu or "CUDA" in str(event.device_type)]
    times = {event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total) for event in events}
    counts = {event.key: event.count for event in events}
    total = sum(times.values())
    others = sorted((name for name in times if not PRODUCTS.search(name)), key=lambda name: -times[name])
    return {
        "kernels' ms": total / 1000,
        "launches": sum(counts.values()),
        "not products": sum(times[name] for name in others) / max(total, 1e-9),
        "largest of them": [[name[:150], counts[name], times[name] / 1000] for name in others[:12]],
        "products": [
            [name[:150], counts[name], times[name] / 1000]
            for name in sorted(set(times) - set(others), key=lambda name: -times[name])[:12]
        ],
    }


@contextmanager
def without_mask() -> Iterator[None]:
    """Transformers makes no mask for one unpadded prompt, but during a capture it can't look, and makes one."""
    module: Any = importlib.import_module("transformers.models.llama.modeling_llama")
    before = module.create_causal_mask
    module.create_causal_mask = lambda *args, **kwargs: None
    try:
        yield
    finally:
        module.create_causal_mask = before


def captured(method: Method, embeds: Tensor) -> tuple[Callable[[], object], Tensor]:
    """A CUDA graph of the forward and backward, and where it leaves its result."""
    with method.context(), without_mask():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                method.run(embeds)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = method.run(embeds)
    return graph.replay, result


def graphs(rows: Rows, device: torch.device, shape: Shape, tokens: int, upstream: str | None) -> None:
    """At a length where launches dominate: each of our forwards and backwards as one CUDA graph."""
    model = build(shape, device)
    embeds = prompt(model, tokens)
    every = [m for m in _with_upstream(rows, model, upstream) if "attribute" not in m.name and "forward" not in m.name]
    found = [*every]
    for method in every:
        if method.name.startswith("upstream"):
            continue
        name = f"{method.name}, CUDA graph"

        def capture(method: Method = method, name: str = name) -> dict[str, Any]:
            if device.type == "cuda":
                replay, result = captured(method, embeds)
            else:
                with without_mask(), method.context():  # a dry run: what would be captured
                    result = method.run(embeds)
                replay = partial(method.run, embeds)

            def run(x: Tensor) -> Tensor:
                replay()
                return result

            found.append(Method(name, run, rules=method.rules))
            return {"status": READY}

        rows.attempt(f"capture of {method.name}", capture)
    measure(rows, shape, model, embeds, found, 9)


def compiled(rows: Rows, device: torch.device, shape: Shape, tokens: int, backend: str, upstream: str | None) -> None:
    """torch.compile of the patched decoder in one graph; of fewer layers, as compiling takes time with each."""
    model = build(shape, device)
    embeds = prompt(model, tokens)
    every = [m for m in _with_upstream(rows, model, upstream) if "attribute" not in m.name and "forward" not in m.name]
    found = [m for m in every if m.rules is None or m.name.startswith("upstream") or m.name.endswith("kernels off")]
    with kernels("off"), ExitStack() as kept:
        for rules in ("attnlrp", "cp", None):

            def compile_one(rules: str | None = rules) -> dict[str, Any]:
                own = shared_copy(model)  # stays patched, as a compiled model's patch should
                handle = kept.enter_context(lxt.monkey_patch(own.model, rules)) if rules else None
                decoder = torch.compile(own.model, fullgraph=True, dynamic=False, backend=backend)
                run = partial(step, own, decoder)
                start = time.perf_counter()
                try:
                    run(embeds)
                except Exception:
                    if handle is not None:
                        handle.remove()
                    raise
                found.append(Method(f"{rules or 'plain'}, compiled", run, rules=rules))
                return {"seconds to compile": time.perf_counter() - start}

            rows.attempt(f"compiling {rules or 'plain'}", compile_one, needs=10)
            measure(rows, shape, model, embeds, found, 9)  # after each, as the next may take all the time


def long_contexts(rows: Rows, device: torch.device, shape: Shape, lengths: tuple[int, ...]) -> None:
    """One run each, every layer checkpointed: seconds and peak memory."""
    model = build(shape, device)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in model.model.layers:
        layer.training = True  # of the layer object alone: transformers checkpoints in training only
    every = [m for m in methods(model, None) if "attribute" not in m.name and "exact" not in m.name]
    order = ["attnlrp, kernels fast", "cp, kernels fast", "plain", "attnlrp, kernels off", "cp, kernels off"]
    every = sorted((m for m in every if m.name in order), key=lambda m: order.index(m.name))
    short = prompt(model, 512)
    for method in every:
        rows.attempt(f"warm-up of {method.name}", lambda method=method: _warmed_up(method, short))
    for method in every:
        took = 0.0
        for tokens, before in zip(lengths, (lengths[0], *lengths), strict=False):

            def run(method: Method = method, tokens: int = tokens) -> dict[str, Any]:
                nonlocal took
                found = _once(method, prompt(model, tokens))
                took = found["seconds"]
                return found

            needs = took * (tokens / before) ** 1.7  # between linear and quadratic
            rows.attempt(f"T = {tokens}, {method.name}", run, needs, tokens=tokens, method=method.name)


def _warmed_up(method: Method, embeds: Tensor) -> dict[str, Any]:
    _once(method, embeds)
    return {"status": READY}


def _once(method: Method, embeds: Tensor) -> dict[str, Any]:
    device = embeds.device
    _empty(device)
    with method.context():
        milliseconds = Clock(device).once(lambda: method.run(embeds))
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return {"seconds": milliseconds / 1000, "peak GiB": peak / 2**30}
