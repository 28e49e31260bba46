"""For gpu.py: the machine's ceilings, every kernel against its eager twin, and the kernels' times.

Correctness. Kernel and twin run on the same numbers, the twin also in float64. An error is the largest of
|x - x64| / (|x64| + rms(x64)); a kernel's may be twice its twin's and four steps of its dtype. The backward runs twice,
and must give the same bits; memory is poisoned before; a forward that must be the model's is compared bit by bit.

Time. The launches of one forward and backward are recorded and repeated by themselves, caches cold, interleaved with
the twin and with the same kernel in other configurations.
"""

from __future__ import annotations

import pkgutil
import statistics
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from gpu_rows import READY, Clock, Rows, summary
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Sizes", "ceilings", "correctness", "timing"]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHORT = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
Maker = Callable[[torch.dtype, torch.Generator], Tensor]


@dataclass(frozen=True)
class Sizes:
    """Of what a kernel is given; `width` is that of a head."""

    tokens: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    width: int


def ceilings(rows: Rows, device: torch.device, sizes: Sizes, square: int, copied: int) -> None:
    """Who the machine is, its matrix products' TFLOP/s and its memory's GB/s.

    Args:
        rows: where they go.
        device: the machine's.
        sizes: of the model whose products are measured.
        square: rows and columns of the largest product.
        copied: bytes of the copy.
    """
    clock = Clock(device, flush=True)
    rows.attempt("machine", partial(_machine, device))

    def product(m: int, k: int, n: int) -> dict[str, Any]:
        a, b = (torch.randn(shape, device=device).to(BF16) for shape in ((m, k), (k, n)))
        clock.many(lambda: a @ b, 3)
        times = clock.many(lambda: a @ b, 20)
        return {"TFLOP/s": 2e-9 * m * k * n / statistics.median(times), **summary(times)}

    def copy() -> dict[str, Any]:
        source = torch.randn(copied // 4, device=device)
        target = torch.empty_like(source)
        clock.many(lambda: target.copy_(source), 3)
        times = clock.many(lambda: target.copy_(source), 20)
        return {"GB/s": 2e-6 * copied / statistics.median(times), **summary(times)}

    rows.attempt("copy", copy)
    rows.attempt(f"product, {square} x {square} x {square}", partial(product, square, square, square))
    for name, k, n in (
        ("query or output", sizes.hidden, sizes.heads * sizes.width),
        ("key or value", sizes.hidden, sizes.kv_heads * sizes.width),
        ("gate or up", sizes.hidden, sizes.mlp),
        ("down", sizes.mlp, sizes.hidden),
    ):
        rows.attempt(f"{name}, {sizes.tokens} x {k} x {n}", partial(product, sizes.tokens, k, n))


def _machine(device: torch.device) -> dict[str, Any]:
    import triton

    found = {"device": "CPU (a dry run)", "torch": torch.__version__, "triton": triton.__version__}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        asked = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        try:
            answer = subprocess.run(asked, capture_output=True, text=True, timeout=20).stdout.splitlines()[0]
        except (OSError, IndexError, subprocess.TimeoutExpired):
            answer = "unknown"
        found |= {
            "device": torch.cuda.get_device_name(device),
            "GiB": properties.total_memory / 2**30,
            "multiprocessors": properties.multi_processor_count,
            "driver, clock, power": answer,
        }
    return found


@dataclass(frozen=True)
class Case:
    """A call of a rule.

    Attributes:
        kernel: the rule's name.
        label: the sizes and options, in words.
        call: given the function, then the leaves and the constants.
        leaves: the activations.
        constants: weights, angles, masks.
        options: of the kernel alone, such as exact=False.
        same_output: whether the forward must be the twin's to the last bit.
    """

    kernel: str
    label: str
    call: Callable[..., Any]
    leaves: tuple[Maker, ...]
    constants: tuple[Maker, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (BF16, FP32, FP16)
    options: dict[str, Any] = field(default_factory=dict)
    same_output: bool = True


def dense(*shape: int) -> Maker:
    return lambda dtype, random: torch.randn(shape, generator=random, device=random.device).to(dtype)


def part(*shape: int) -> Maker:
    """The first half of rows twice as long, as from a fused projection."""
    return lambda dtype, random: dense(*shape[:-1], 2 * shape[-1])(dtype, random)[..., : shape[-1]]


def heads(batch: int, count: int, tokens: int, width: int) -> Maker:
    """[batch, head, token, width], which in memory is [batch, token, head, width]."""
    return lambda dtype, random: dense(batch, tokens, count, width)(dtype, random).transpose(1, 2)


def allowed(queries: int, keys: int) -> Maker:
    """A mask that lets each query see two keys out of three, and its first one."""

    def make(dtype: torch.dtype, random: torch.Generator) -> Tensor:
        mask = torch.rand(1, 1, queries, keys, generator=random, device=random.device) < 2 / 3
        mask[..., 0] = True
        return mask

    return make


def added(queries: int, keys: int) -> Maker:
    """The same mask as numbers to add."""

    def make(dtype: torch.dtype, random: torch.Generator) -> Tensor:
        mask = allowed(queries, keys)(dtype, random)
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -1e4)

    return make


def cases(large: Sizes, odd: Sizes) -> Iterator[Case]:
    """The model's sizes first, as time may run out."""
    gelu_tanh = partial(F.gelu, approximate="tanh")
    for sizes, make in ((large, dense), (odd, part)):
        n, h, m, kv, w = sizes.tokens, sizes.hidden, sizes.mlp, sizes.kv_heads, sizes.width
        size = f"{n} x {h}"
        for exact in (True, False):
            options, how = {"exact": exact}, "" if exact else ", fast"
            yield Case(
                "gated_product",
                f"silu, {n} x {m}{how}",
                lambda f, gate, up: f(gate, up, F.silu, "silu"),
                (make(n, m), make(n, m)),
                options=options,
                same_output=exact,
            )
            for style in ("llama", "gemma", "t5"):
                call = partial(_norm, style=style)
                dtypes = (BF16, FP32, FP16) if style == "llama" else (BF16,)
                weights = (dense(h),)
                yield Case(
                    "rms_norm", f"{style}, {size}{how}", call, (make(n, h),), weights, dtypes, options, same_output=exact
                )
                both = (make(n, h), dense(n, h))
                call = partial(_add_norm, style=style)
                yield Case(
                    "add_rms_norm", f"{style}, {size}{how}", call, both, weights, dtypes, options, same_output=exact
                )
        yield Case("rms_norm", f"heads, {n} x {kv} x {w}", _norm, (dense(n, kv, w),), (dense(w),))
        yield Case("identity", f"silu, {n} x {m}", lambda f, x: f(x, F.silu, "silu"), (make(n, m),))
        angles = (dense(1, n, w), dense(1, n, w))
        yield Case(
            "rotary", f"{kv} heads of {w}", lambda f, x, c, s: f(x, c, s, 0.25), (heads(2, kv, n, w),), angles
        )
        yield from attention(sizes)
        yield Case(
            "layer_norm",
            size,
            lambda f, x, weight, bias: f(x, (x.shape[-1],), weight, bias),
            (make(n, h),),
            (dense(h), dense(h)),
        )
        yield Case(
            "add_layer_norm",
            size,
            lambda f, x, residual, weight, bias: f(x, residual, (x.shape[-1],), weight, bias),
            (make(n, h), dense(n, h)),
            (dense(h), dense(h)),
        )
        yield Case("relevance", f"per token, {size}", lambda f, x, c: f(x, c), (), (make(n, h), make(n, h)))
        groups = h // w
        per_head = (make(n, groups * w), make(n, groups * w))
        yield Case(
            "relevance", f"per head, {size}", lambda f, x, c, g=groups: f(x, c, g), (), per_head
        )
    for name, function in (("gelu", F.gelu), ("gelu_tanh", gelu_tanh)):
        yield Case(
            "gated_product",
            f"{name}, fast",
            lambda f, gate, up, name=name, function=function: f(gate, up, function, name),
            (dense(odd.tokens, odd.mlp), dense(odd.tokens, odd.mlp)),
            dtypes=(BF16, FP32),
            options={"exact": False},
            same_output=False,
        )
    stop = partial(_gated, stop_gate=True)
    yield Case("gated_product", "silu, gate stopped", stop, (dense(odd.tokens, odd.mlp), dense(odd.tokens, odd.mlp)))
    for form in sorted(import_module("lxt.triton_kernels.activations").FORMS):
        call = partial(_identity, form=form)
        yield Case("identity", form, call, (dense(odd.tokens, odd.mlp),), dtypes=(BF16, FP32))
    yield Case("identity", "no tokens", lambda f, x: f(x, F.silu, "silu"), (dense(0, odd.mlp),), dtypes=(BF16,))


def _norm(f: Callable, x: Tensor, weight: Tensor, style: str = "llama") -> Tensor:
    return f(x, weight, 1e-6, style)


def _add_norm(f: Callable, x: Tensor, residual: Tensor, weight: Tensor, style: str = "llama") -> Any:
    return f(x, residual, weight, 1e-6, style)


def _gated(f: Callable, gate: Tensor, up: Tensor, stop_gate: bool) -> Tensor:
    return f(gate, up, F.silu, "silu", stop_gate)


def _identity(f: Callable, x: Tensor, form: str) -> Tensor:
    return f(x, F.silu, form)  # the forward is whatever it is given: only the backward knows the form


def attention(sizes: Sizes) -> Iterator[Case]:
    """Causal attention with shared keys; at odd sizes also with masks, a window and other widths of heads."""
    n, q, kv, w = sizes.tokens, sizes.heads, sizes.kv_heads, sizes.width

    def case(label: str, call: Callable, keys: int = n, width: int = w, mask: Maker | None = None, **more: Any) -> Case:
        masks = () if mask is None else (mask,)
        constants = (heads(2, q, n, width), heads(2, kv, keys, width), *masks)
        name = f"{label}, {q} heads of {width}, {n} queries, {keys} keys"
        return Case("value_attention", name, call, (heads(2, kv, keys, width),), constants, **more)

    yield case("causal", partial(_attend, is_causal=True))
    if n % 16 == 0:
        return
    few = {"dtypes": (BF16, FP32)}
    yield case("no mask", _attend, keys=2 * n + 3, **few)
    yield case("mask", _attend, mask=allowed(n, n + 5), keys=n + 5, **few)
    yield case("added mask", _attend, mask=added(n, n + 5), keys=n + 5, **few)
    yield case("window", partial(_attend, is_causal=True, window=n // 3), **few)
    for width in (64, 256):
        yield case("causal", partial(_attend, is_causal=True), width=width, dtypes=(BF16,))


def _attend(
    f: Callable, value: Tensor, query: Tensor, key: Tensor, mask: Tensor | None = None, **options: Any
) -> Tensor:
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(query.dtype)
    return f(query, key, value, mask, enable_gqa=True, **options)


def _modules() -> list[ModuleType]:
    package = import_module("lxt.triton_kernels")
    return [import_module(f"lxt.triton_kernels.{found.name}") for found in pkgutil.iter_modules(package.__path__)]


def kernel_of(name: str) -> Callable | None:
    """The kernel's function, None while there is none."""
    return next((getattr(module, name) for module in _modules() if name in module.__all__), None)


@contextmanager
def poisoned() -> Iterator[None]:
    """Meanwhile fresh memory holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def correctness(rows: Rows, device: torch.device, large: Sizes, odd: Sizes, most: int | None = None) -> None:
    """Every kernel against its twin; `most` cases of one dtype each for a dry run."""
    for case in list(cases(large, odd))[:most]:
        for dtype in case.dtypes[: None if most is None else 1]:
            name = f"{case.kernel}: {case.label}, {SHORT[dtype]}"
            rows.attempt(name, partial(_compared, case, dtype, device), kernel=case.kernel)


def _compared(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    kernel = kernel_of(case.kernel)
    if kernel is None:
        return {"status": "no kernel"}
    twin = getattr(import_module("lxt.rules"), case.kernel)
    random = torch.Generator(device).manual_seed(0)
    leaves, constants = ([make(dtype, random) for make in makers] for makers in (case.leaves, case.constants))
    sent: list[Tensor] = []

    def run(function: Callable, to: torch.dtype) -> list[Tensor]:
        given = [x.detach().to(to).requires_grad_() for x in leaves]
        rest = [x.to(to) if x.is_floating_point() else x for x in constants]
        result = case.call(function, *given, *rest)
        outputs = [result] if isinstance(result, Tensor) else list(result)
        if not given:
            return outputs
        if not sent:
            sent.extend(torch.randn(y.shape, generator=random, device=device).to(y.dtype) for y in outputs)
        grads = [c.to(y.dtype) for c, y in zip(sent, outputs, strict=True)]
        once = torch.autograd.grad(outputs, given, grads, retain_graph=True, allow_unused=True)
        twice = torch.autograd.grad(outputs, given, grads, allow_unused=True)
        pairs = [(a, b) for a, b in zip(once, twice, strict=True) if a is not None and b is not None]
        # Torch's own attention adds with atomics, so only a kernel's bits are compared.
        if function is not twin and any(not torch.equal(a, b) for a, b in pairs):
            raise AssertionError("the second backward differs from the first")
        if any(not torch.equal(a.to(b.dtype), b) for a, b in zip(grads, kept, strict=True) if kept):
            raise AssertionError("the backward wrote into what it was sent")
        return [y.detach() for y in outputs] + [a for a, _ in pairs]

    kept: list[Tensor] = []
    expected = run(twin, dtype)
    kept.extend(c.clone() for c in sent)
    before = [x.clone() for x in leaves + constants]
    with poisoned():
        actual = run(partial(kernel, **case.options), dtype)
    if any(not torch.equal(a, b) for a, b in zip(leaves + constants, before, strict=True)):
        raise AssertionError("the kernel wrote into its inputs")
    kept.clear()
    reference = run(twin, torch.float64)
    if [(x.shape, x.dtype) for x in actual] != [(x.shape, x.dtype) for x in expected]:
        raise AssertionError(f"shapes and dtypes {[(list(x.shape), x.dtype) for x in actual]} are not the twin's")
    step = torch.finfo(dtype).eps
    errors = [_error(x, r) for x, r in zip(actual, reference, strict=True)]
    least = [_error(x, r) for x, r in zip(expected, reference, strict=True)]
    if not all(a <= 2 * b + 4 * step for a, b in zip(errors, least, strict=True)):
        raise AssertionError(f"errors {errors} where the twin has {least}")
    outputs = len(reference) - len(leaves) if leaves else 0
    if case.same_output and any(not torch.equal(a, b) for a, b in zip(actual[:outputs], expected[:outputs], strict=True)):
        raise AssertionError("the forward differs from the twin's in its last bits")
    return {"error": max(errors), "twin's error": max(least), "step of the dtype": step}


def _error(x: Tensor, reference: Tensor) -> float:
    if not x.numel():
        return 0.0
    r = reference.double()
    return ((x.double() - r).abs() / (r.abs() + r.square().mean().sqrt())).max().item()


@dataclass(frozen=True)
class Configuration:
    """Other values of a kernel module's constants, and warps; none of both is what ships."""

    label: str = "as shipped"
    values: dict[str, Any] = field(default_factory=dict)
    warps: int | None = None


def configurations(kernel: str) -> list[Configuration]:
    """The few that are timed: tiles from half to four times, 4 or 8 warps."""
    if kernel in ("identity", "gated_product"):
        tiles = [(f"BLOCK {n}", {"BLOCK": n}) for n in (512, 1024, 2048, 4096)]
    elif kernel == "rotary":
        tiles = [(f"TOKENS {n}", {"TOKENS": n}) for n in (8, 16, 32)]
    elif kernel == "value_attention":
        tiles = [
            (f"{q} queries, {k} keys, {s} stages", {"tile": _attention_tile(q, k, s)})
            for q, k, s in ((64, 64, 2), (64, 64, 3), (128, 64, 2), (64, 128, 2), (128, 128, 2))
        ]
    else:
        tiles = [(f"TILE {n}", {"TILE": n}) for n in (1024, 2048, 4096, 8192)]
    return [Configuration()] + [
        Configuration(f"{label}, {warps} warps", values, warps) for label, values in tiles for warps in (4, 8)
    ]


def _attention_tile(queries: int, keys: int, stages: int) -> Callable:
    constants = {"QUERIES": queries, "KEYS": keys, "num_stages": stages}
    return lambda *given: (constants, 4)  # the warps are the configuration's


def timed(sizes: Sizes) -> Iterator[tuple[Case, float]]:
    """What is timed, and its floating-point operations where these and not the bytes are the limit."""
    n, h, m, q, kv, w = sizes.tokens, sizes.hidden, sizes.mlp, sizes.heads, sizes.kv_heads, sizes.width
    fast = {"exact": False}
    yield Case("rms_norm", "forward and backward", _norm, (dense(n, h),), (dense(h),), options=fast), 0
    yield Case("add_rms_norm", "", _add_norm, (dense(n, h), dense(n, h)), (dense(h),), options=fast), 0
    yield Case("gated_product", "", partial(_gated, stop_gate=False), (dense(n, m), dense(n, m)), options=fast), 0
    # Three products, half of each masked.
    constants = (heads(1, q, n, w), heads(1, kv, n, w))
    yield Case("value_attention", "", partial(_attend, is_causal=True), (heads(1, kv, n, w),), constants), 3 * q * n * n * w
    yield Case("rotary", "", lambda f, x, c, s: f(x, c, s, 0.25), (heads(1, q, n, w),), (dense(1, n, w),) * 2), 0
    yield Case("identity", "", partial(_identity, form="silu"), (dense(n, m),)), 0
    yield Case("layer_norm", "", lambda f, x, weight: f(x, (h,), weight), (dense(n, h),), (dense(h),)), 0
    yield Case("add_layer_norm", "", lambda f, x, r, v: f(x, r, (h,), v), (dense(n, h), dense(n, h)), (dense(h),)), 0
    yield Case("relevance", "per token", lambda f, x, c: f(x, c), (), (dense(n, h), dense(n, h))), 0
    yield Case("relevance", "per head", lambda f, x, c: f(x, c, q), (), (dense(n, q * w), dense(n, q * w))), 0


@contextmanager
def _changed(values: dict[str, Any]) -> Iterator[None]:
    """Every kernel module that has these names with these values."""
    kept = [(module, name, getattr(module, name)) for module in _modules() for name in values if hasattr(module, name)]
    for module, name, _ in kept:
        setattr(module, name, values[name])
    try:
        yield
    finally:
        for module, name, value in kept:
            setattr(module, name, value)


@dataclass(frozen=True)
class Part:
    """The forward or the backward of a kernel or of its twin: how to run it, and the bytes that it reads and writes."""

    run: Callable[[], object]
    moved: int = 0


def _launches(run: Callable[[], object], configuration: Configuration, differentiable: bool) -> dict[str, Part]:
    """The launches of `run`, to be repeated without what is around them."""
    found: dict[str, list[Part]] = {}
    launch = import_module("lxt.triton_kernels.launch").launch

    def record(kernel: Any, grid: Any, arguments: Any, constants: Any, warps: int = 4) -> None:
        again = partial(launch, kernel, grid, arguments, constants, configuration.warps or warps)
        tensors = {x.data_ptr(): x.numel() * x.element_size() for x in arguments if isinstance(x, Tensor)}
        again()
        name = "backward" if differentiable and not kernel.__name__.startswith("forward") else "forward"
        found.setdefault(name, []).append(Part(again, sum(tensors.values())))

    with _changed({**configuration.values, "launch": record}):
        run()
    return {
        name: Part(lambda parts=parts: [each.run() for each in parts], sum(each.moved for each in parts))
        for name, parts in found.items()
    }


def timing(rows: Rows, device: torch.device, sizes: Sizes, ceiling: dict[str, float], failed: set[str]) -> None:
    """The time of every kernel that is right, in bf16, beside its twin's.

    Args:
        rows: where they go.
        device: where the kernels run.
        sizes: of the model.
        ceiling: the measured "GB/s" and "TFLOP/s", if they were measured.
        failed: kernels that are wrong.
    """
    clock = Clock(device, flush=True)
    for case, operations in timed(sizes):
        name = f"{case.kernel} {case.label}".strip()
        if case.kernel in failed:
            rows.attempt(name, lambda: {"status": "not timed: it is wrong"})
        elif kernel_of(case.kernel) is not None and rows.left() > 0:
            _time(rows, name, case, operations, clock, ceiling, device)


def _time(
    rows: Rows,
    name: str,
    case: Case,
    operations: float,
    clock: Clock,
    ceiling: dict[str, float],
    device: torch.device,
) -> None:
    random = torch.Generator(device).manual_seed(0)
    leaves, constants = ([make(BF16, random) for make in makers] for makers in (case.leaves, case.constants))
    leaves = [x.detach().requires_grad_() for x in leaves]
    kernel = partial(kernel_of(case.kernel), **case.options)  # type: ignore[arg-type]
    twin = partial(case.call, getattr(import_module("lxt.rules"), case.kernel), *leaves, *constants)

    def backward(call: Callable[[], Any]) -> Callable[[], object]:
        outputs = call()
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        sent = [torch.randn_like(y) for y in outputs]
        return partial(torch.autograd.grad, outputs, leaves, sent, retain_graph=True, allow_unused=True)

    def both() -> None:
        call = partial(case.call, kernel, *leaves, *constants)
        _ = backward(call)() if leaves else call()

    candidates: dict[tuple[str, str], Part] = {}

    def ready(label: str, make: Callable[[], dict[str, Part]]) -> None:
        """Compile and run once; what can't be compiled, having too little shared memory say, becomes a row."""

        def prepare() -> dict[str, Any]:
            for part, made in make().items():
                made.run()
                clock.wait()
                candidates[part, label] = made
            return {"status": READY}

        rows.attempt(f"{name}, {label}", prepare)

    ready("twin", lambda: {"forward": Part(twin)} | ({"backward": Part(backward(twin))} if leaves else {}))
    for configuration in configurations(case.kernel):
        if rows.left() > 0:
            ready(configuration.label, partial(_launches, both, configuration, bool(leaves)))
    times: dict[tuple[str, str], list[float]] = {key: [] for key in candidates}
    for _ in range(3):
        for key, candidate in candidates.items():
            times[key] += clock.many(candidate.run, 8)
    for (part, label), candidate in candidates.items():
        found: dict[str, Any] = {"kernel": name, "part": part, "configuration": label, **summary(times[part, label])}
        if label != "twin":
            if (part, "twin") in times:
                found["twin's time / this"] = statistics.median(times[part, "twin"]) / found["ms"]
            unit, amount = ("TFLOP/s", operations * 1e-9) if operations else ("GB/s", candidate.moved * 1e-6)
            found[unit] = amount / found["ms"]
            if unit in ceiling:
                found["of the ceiling"] = found[unit] / ceiling[unit]
        rows.write(f"{name}, {label}, {part}", **found)
    for label in {label for _, label in candidates}:
        rows.write(f"{name}, {label}", "timed")
