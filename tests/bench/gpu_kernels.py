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
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from gpu_cases import BF16, SHORT, Case, Sizes, cases, timed
from gpu_rows import READY, Clock, Rows, summary
from torch import Tensor

__all__ = ["ceilings", "correctness", "timing"]


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
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def correctness(rows: Rows, device: torch.device, large: Sizes, odd: Sizes, one_dtype: bool = False) -> None:
    """Every kernel against its twin, in every dtype of each case or in its first alone."""
    for case in cases(large, odd):
        for dtype in case.dtypes[: 1 if one_dtype else None]:
            name = f"{case.kernel}: {case.label}, {SHORT[dtype]}"
            rows.attempt(name, partial(_compared, case, dtype, device), kernel=case.kernel, dtype=SHORT[dtype])


def _compared(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    kernel, twin = kernel_of(case.kernel), getattr(import_module("lxt.rules"), case.kernel)
    if kernel is None:
        return {"status": "no kernel"}
    random = torch.Generator(device).manual_seed(0)
    leaves, constants = ([make(dtype, random) for make in makers] for makers in (case.leaves, case.constants))
    sent: list[Tensor] = []  # the coefficients of the outputs, once their shapes are known
    outputs, once, _ = _calculated(case.call, twin, leaves, constants, sent, random)
    wide, more, back = ([_widened(x) for x in given] for given in (leaves, constants, sent))
    exact_outputs, exact, _ = _calculated(case.call, twin, wide, more, back, random)
    given = [*leaves, *constants, *sent]
    before = [x.clone() for x in given]
    with poisoned():
        found = _calculated(case.call, partial(kernel, **case.options), leaves, constants, sent, random)
    if any(not torch.equal(a, b) for a, b in zip(given, before, strict=True)):
        raise AssertionError("the kernel wrote into what it was given")
    if any(not torch.equal(a, b) for a, b in zip(found[1], found[2], strict=True)):
        raise AssertionError("the second backward differs from the first")
    actual, expected, reference = found[0] + found[1], outputs + once, exact_outputs + exact
    if [(x.shape, x.dtype) for x in actual] != [(x.shape, x.dtype) for x in expected]:
        raise AssertionError(f"shapes and dtypes {[(list(x.shape), x.dtype) for x in actual]} are not the twin's")
    errors, twins = ([_error(x, r) for x, r in zip(xs, reference, strict=True)] for xs in (actual, expected))
    step = torch.finfo(dtype).eps
    if not all(error <= 2 * least + 4 * step for error, least in zip(errors, twins, strict=True)):
        raise AssertionError(f"errors {errors} where the twin has {twins}")
    exactly = case.same_output and (device.type == "cuda" or dtype == torch.float32)  # interpreted, 16 bits are cut off
    if leaves and exactly and any(not torch.equal(a, b) for a, b in zip(found[0], outputs, strict=True)):
        raise AssertionError("the forward differs from the twin's in its last bits")
    return {"error": max(errors), "twin's error": max(twins), "step of the dtype": step}


def _calculated(
    call: Callable[..., Any],
    function: Callable[..., Any],
    leaves: list[Tensor],
    constants: list[Tensor],
    sent: list[Tensor],
    random: torch.Generator,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Outputs, and the leaves' coefficients by a first and a second backward of `sent`, which is filled if empty."""
    given = [x.detach().requires_grad_() for x in leaves]
    result = call(function, *given, *constants)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    if not given:
        return outputs, [], []
    if not sent:
        sent += [torch.randn(y.shape, generator=random, device=y.device).to(y.dtype) for y in outputs]
    once = torch.autograd.grad(outputs, given, sent, retain_graph=True, allow_unused=True)
    twice = torch.autograd.grad(outputs, given, sent, allow_unused=True)
    # None is right where a rule stops: then for the twin, too, or their numbers of coefficients differ.
    first, second = ([c for c in found if c is not None] for found in (once, twice))
    return [y.detach() for y in outputs], first, second


def _widened(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _error(x: Tensor, reference: Tensor) -> float:
    if not x.numel():
        return 0.0
    r = reference.double()
    return ((x.double() - r).abs() / (r.abs() + r.square().mean().sqrt())).max().item()


def configurations(constants: dict[str, Any]) -> Iterator[dict[str, int]]:
    """The few that are timed beside what ships: tiles from half to four times as large, 4 or 8 warps.

    Args:
        constants: the kernel's, as it was launched.
    """
    if "QUERIES" in constants:
        sizes = ((64, 64, 2), (64, 64, 3), (128, 64, 2), (128, 64, 3), (64, 128, 2), (128, 128, 2))
        tiles = [{"QUERIES": q, "KEYS": k, "num_stages": s} for q, k, s in sizes]
    elif "TOKENS" in constants:
        tiles = [{"TOKENS": n} for n in (8, 16, 32, 64)]
    else:
        name = "ROWS" if constants.get("ROWS", 1) > 1 else "BLOCK"  # short rows share a program
        tiles = [{name: constants[name] * n // 2} for n in (1, 2, 4, 8)]
    for tile in tiles:
        for warps in (4, 8):
            yield {**tile, "num_warps": warps}


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, to be repeated without what is around it."""

    kernel: Any
    rest: tuple[Any, ...]
    constants: dict[str, Any]
    changes: dict[str, int] = field(default_factory=dict)

    def __call__(self) -> None:
        module = import_module("lxt.triton_kernels.launch")
        with module.configured(self.kernel, **self.changes):
            module.launch(self.kernel, *self.rest)


@dataclass(frozen=True)
class Part:
    """The forward or the backward of a kernel or of its twin: how to run it, and the bytes that it reads and writes."""

    run: Callable[[], object]
    moved: int = 0


def _launches(run: Callable[[], object], differentiable: bool) -> dict[str, list[Launch]]:
    """What `run` launches in its forward and its backward."""
    found: dict[str, list[Launch]] = {}
    launch = import_module("lxt.triton_kernels.launch").launch

    def record(kernel: Any, grid: Any, arguments: Any, constants: Any, warps: int = 4) -> None:
        part = "backward" if differentiable and not kernel.__name__.startswith("forward") else "forward"
        found.setdefault(part, []).append(Launch(kernel, (grid, arguments, constants, warps), constants))
        launch(kernel, grid, arguments, constants, warps)

    modules = [module for module in _modules() if hasattr(module, "launch")]
    for module in modules:
        setattr(module, "launch", record)  # noqa: B010  type checkers know no such attribute of a module
    try:
        run()
    finally:
        for module in modules:
            setattr(module, "launch", launch)  # noqa: B010
    return found


def _candidates(launches: dict[str, list[Launch]]) -> Iterator[tuple[str, str, Part]]:
    """(part, configuration, how to run it), what ships first."""
    for part, each in launches.items():
        tensors = [{x.data_ptr(): x.nbytes for x in one.rest[1] if isinstance(x, Tensor)} for one in each]
        moved = sum(size for found in tensors for size in found.values())
        for changes in ({}, *configurations(each[0].constants)):
            changed = [replace(one, changes=changes) for one in each]
            label = ", ".join(f"{name} {value}" for name, value in changes.items()) or "as shipped"
            yield part, label, Part(lambda changed=changed: [one() for one in changed], moved)


def timing(
    rows: Rows, device: torch.device, sizes: Sizes, ceiling: dict[str, float], failed: set[str], repeats: int = 8
) -> None:
    """The time of every kernel that is right, in bf16, beside its twin's.

    Args:
        rows: where they go.
        device: where the kernels run.
        sizes: of the model.
        ceiling: the measured "GB/s" and "TFLOP/s", if they were measured.
        failed: kernels that are wrong.
        repeats: runs in each of three rounds.
    """
    clock = Clock(device, flush=True)
    for case, operations in timed(sizes):
        name = f"{case.kernel} {case.label}".strip()
        if case.kernel in failed:
            rows.attempt(name, lambda: {"status": "not timed: it is wrong"})
        elif kernel_of(case.kernel) is not None and rows.left() > 0:
            rows.attempt(name, partial(_time, rows, name, case, operations, clock, ceiling, device, repeats))


def _time(
    rows: Rows,
    name: str,
    case: Case,
    operations: float,
    clock: Clock,
    ceiling: dict[str, float],
    device: torch.device,
    repeats: int,
) -> dict[str, Any]:
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

    tried = [("forward", "twin", Part(twin))] + ([("backward", "twin", Part(backward(twin)))] if leaves else [])
    tried += _candidates(_launches(both, bool(leaves)))
    candidates: dict[tuple[str, str], Part] = {}
    for part, label, candidate in tried:

        def ready(part: str = part, label: str = label, candidate: Part = candidate) -> dict[str, Any]:
            candidate.run()  # compiles; fails where a program has too little shared memory
            clock.wait()
            candidates[part, label] = candidate
            return {"status": READY}

        rows.attempt(f"{name}, {part}, {label}", ready)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in candidates}
    for _ in range(3):
        for key, candidate in candidates.items():
            times[key] += clock.many(candidate.run, repeats)
    for (part, label), candidate in candidates.items():
        found: dict[str, Any] = {"kernel": name, "part": part, "configuration": label, **summary(times[part, label])}
        if label != "twin":
            if (part, "twin") in times:
                found["twin's time / this"] = statistics.median(times[part, "twin"]) / found["ms"]
            unit, amount = ("TFLOP/s", operations * 1e-9) if operations else ("GB/s", candidate.moved * 1e-6)
            found[unit] = amount / found["ms"]
            if unit in ceiling:
                found["of the ceiling"] = found[unit] / ceiling[unit]
        rows.write(f"{name}, {part}, {label}", **found)
    return {"status": "timed"}
