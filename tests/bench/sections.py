"""For cpu.py: what is measured. Each section returns a table; each is given its seconds, and keeps to them roughly."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import footprint
import methods
import packages
import starting
import torch
from subjects import GROUPED, LLAMA_1B, WIDE, Shape, build, embeddings, shared_copy
from table import Row, Table
from timing import Case, Timing, interleaved

import lxt

__all__ = ["SECTIONS", "Section", "Sizes"]

PLAIN = "plain forward + backward"
RATIO = f"ratio to {PLAIN}"
OPERATOR_MODE = "operator mode alone, attnlrp"
COMPILED = Path(__file__).resolve().parent / "compiled.py"
SHORT_LLAMA_1B = replace(LLAMA_1B, layers=4)  # all 16 take 10 seconds a run
BARS = {"attnlrp": 0.92, "cp": 0.76}  # of attribute(), 12 layers of 1024, 256 tokens


@dataclass(frozen=True)
class Sizes:
    """Everything that a trial run makes smaller."""

    wide: Shape = WIDE
    grouped: Shape = GROUPED
    llama: Shape = SHORT_LLAMA_1B
    deep: int = 24
    tokens: int = 256
    long: int = 1024
    longer: int = 4096
    peak: int = 1024
    targets: int = 8
    steps: int = packages.STEPS
    processes: int = 7
    rounds: tuple[int, int] = (2, 9)
    compiled: bool = True
    dtypes: Mapping[str, torch.dtype] = field(
        default_factory=lambda: {"float32": torch.float32, "bfloat16": torch.bfloat16}
    )


@dataclass(frozen=True)
class Section:
    """One table's measurement.

    Attributes:
        share: of the time, in seconds out of those of all sections.
    """

    name: str
    share: float
    run: Callable[[Sizes, float], Table]


def start(sizes: Sizes, seconds: float) -> Table:
    """`import lxt`, and what the next steps take."""
    rows = []
    for statement, bar in (("import lxt", 0.3), ("import lxt; lxt.monkey_patch", None), ("import torch", None)):
        times = sizes.processes if bar else min(sizes.processes, 3)  # the others take a second each, and have no bar
        value, low, high = starting.import_seconds(statement, times)
        rows.append(Row(f"`{statement}`", value, low, high, rounds=times, bar=bar))
    heavy, count = starting.loaded_by_import()
    note = f"`import lxt` loads {count} modules, and of {', '.join(starting.HEAVY)} {', '.join(heavy) or 'none'}."
    return Table("start", "Import", "seconds", rows, f"Fresh processes, files in the page cache. {note}")


def patching(sizes: Sizes, seconds: float) -> Table:
    """`monkey_patch` itself."""
    model = build(replace(sizes.wide, hidden=64, mlp=176, heads=4, kv_heads=4, vocabulary=64), torch.float32)
    rows = []
    for rules in BARS:
        value, low, high = starting.patching_ms_per_100_modules(model, rules, sizes.processes)
        rows.append(Row(rules, value, low, high, rounds=sizes.processes, bar=50))
    modules = sum(1 for _ in model.modules())
    return Table("patching", "Patching", "ms per 100 modules", rows, f"A Llama of {modules} modules.")


def saved(sizes: Sizes, seconds: float) -> Table:
    """What the backward needs."""
    bars = {None: None, "gradient": None, "attnlrp": 16.2, "cp": 8.5}
    rows = [
        Row(
            rules or "plain",
            footprint.saved_kib_per_token_and_layer(sizes.grouped, torch.bfloat16, sizes.tokens, rules),
            bar=bar,
        )
        for rules, bar in bars.items()
    ]
    return Table(
        "saved",
        "Saved for backward",
        "KiB per token and layer",
        rows,
        f"{_words(sizes.grouped)}, bfloat16, T = {sizes.tokens}; each storage once, without parameters; "
        "what one layer more adds.",
    )


def peak(sizes: Sizes, seconds: float) -> Table:
    """The process's memory."""
    rows = []
    for name in footprint.METHODS:
        rows.append(_peak(sizes, name, False))
    for name in ("plain", "attnlrp, attribute()"):
        rows.append(_peak(sizes, name, True))
    return Table(
        "peak",
        "Peak memory above the model",
        "MiB",
        rows,
        f"{_words(_shallow(sizes))}, bfloat16, T = {sizes.peak}. A process for each; "
        "the largest resident memory during the run, less that before it.",
    )


def speed(dtype: str, sizes: Sizes, seconds: float) -> Table:
    """All methods at the length of the bars."""
    model = build(sizes.wide, sizes.dtypes[dtype])
    embeds = embeddings(model, sizes.tokens)
    cases = _ours(model, embeds) | {
        "plain forward": partial(methods.forward, model, embeds),
        "attnlrp, patched by hand": partial(methods.patched, model, embeds, "attnlrp"),
        "cp, patched by hand": partial(methods.patched, model, embeds, "cp"),
        OPERATOR_MODE: partial(methods.patched, model, embeds, "attnlrp", lxt.PatchMap()),
    }
    missing = []
    for rules in BARS:
        try:
            cases[f"upstream lxt 2.1, {rules}"] = packages.upstream(model, embeds, rules)
        except packages.NotInstalled as error:
            missing.append(Row(f"upstream lxt 2.1, {rules}", note=str(error)))
    timings = interleaved(cases, PLAIN, seconds, sizes.rounds)
    bars: dict[str, float | None] = {f"{rules}, attribute()": bar for rules, bar in BARS.items()}
    rows = _rows(timings, bars | {OPERATOR_MODE: 1.08})
    fused = {timing.name: timing for timing in timings}
    overhead = _between(fused[OPERATOR_MODE], fused["attnlrp, patched by hand"])
    rows = [replace(row, note=f"{overhead:.2f} of fused") if row.name == OPERATOR_MODE else row for row in rows]
    return Table(
        f"speed-{dtype}",
        f"Time, {dtype}, T = {sizes.tokens}",
        RATIO,
        rows + missing,
        f"{_words(sizes.wide)}, SDPA. `patched by hand` is the baseline's program on the patched model; `attribute()` "
        "patches by itself, and runs the last layer for the explained position alone.",
    )


def long(dtype: str, sizes: Sizes, seconds: float) -> Table:
    """The second length that has a bar."""
    model = build(sizes.wide, sizes.dtypes[dtype])
    timings = interleaved(_ours(model, embeddings(model, sizes.long)), PLAIN, seconds, sizes.rounds)
    return Table(
        f"long-{dtype}",
        f"Time, {dtype}, T = {sizes.long}",
        RATIO,
        _rows(timings, {"cp, attribute()": 0.72}),
        f"{_words(sizes.wide)}, SDPA.",
    )


def longer(sizes: Sizes, seconds: float) -> Table:
    """Where attention's T x T products are a large part."""
    shape = replace(sizes.wide, layers=min(2, sizes.wide.layers))
    model = build(shape, torch.bfloat16)
    timings = interleaved(_ours(model, embeddings(model, sizes.longer)), PLAIN, seconds, sizes.rounds)
    return Table("longer", f"Time, bfloat16, T = {sizes.longer}", RATIO, _rows(timings), f"{_words(shape)} only, SDPA.")


def depth(sizes: Sizes, seconds: float) -> Table:
    """A shallow and a deep model."""
    rows = []
    for layers in (2, sizes.deep):
        model = build(replace(sizes.wide, layers=layers), torch.bfloat16)
        part = seconds * (layers if layers > 2 else 4) / (sizes.deep + 4)
        timings = interleaved(_ours(model, embeddings(model, sizes.tokens)), PLAIN, part, sizes.rounds)
        rows += [replace(row, name=f"{layers} layers: {row.name}") for row in _rows(timings)]
    return Table(
        "depth",
        "Depth",
        RATIO,
        rows,
        f"{_words(sizes.wide, layers=False)}, bfloat16, T = {sizes.tokens}; ratios to the same depth.",
    )


def checkpointing(sizes: Sizes, seconds: float) -> Table:
    """Each layer's forward runs again in the backward."""
    model = build(_shallow(sizes), torch.bfloat16)
    embeds = embeddings(model, sizes.tokens)
    usual = _ours(model, embeds)
    cases = usual | {f"{name}, checkpointing": _checkpointed(model, case) for name, case in usual.items()}
    timings = interleaved(cases, PLAIN, seconds, sizes.rounds)
    return Table(
        "checkpointing",
        "Gradient checkpointing",
        RATIO,
        _rows(timings),
        f"{_words(_shallow(sizes))}, bfloat16, T = {sizes.tokens}, without reentry; all ratios to {PLAIN} without it.",
    )


def llama(sizes: Sizes, seconds: float) -> Table:
    """A shape that people use."""
    model = build(sizes.llama, torch.bfloat16)
    timings = interleaved(_ours(model, embeddings(model, sizes.tokens)), PLAIN, seconds, sizes.rounds)
    layers = f", with {sizes.llama.layers} of its {LLAMA_1B.layers} layers" * (sizes.llama.layers < LLAMA_1B.layers)
    return Table(
        "llama-1b",
        "Llama-3.2-1B's shape",
        RATIO,
        _rows(timings),
        f"Random weights{layers}: {_words(sizes.llama)}, bfloat16, T = {sizes.tokens}.",
    )


def targets(sizes: Sizes, seconds: float) -> Table:
    """K targets out of one forward."""
    model = build(_shallow(sizes), torch.float32)
    embeds = embeddings(model, sizes.tokens)
    count, one = sizes.targets, "one target, attribute()"
    cases: dict[str, Case] = {
        one: partial(methods.attribute, model, embeds),
        f"{count} targets, attribute_targets()": partial(methods.many_targets, model, embeds, count),
        f"{count} targets, attribute() for each": partial(methods.one_by_one, model, embeds, count),
    }
    timings = interleaved(cases, one, seconds, sizes.rounds)
    return Table(
        "targets",
        f"{count} targets of one prompt",
        "ratio to one target",
        _rows(timings),
        f"attnlrp, {_words(_shallow(sizes))}, float32, T = {sizes.tokens}. "
        f"One forward and {count} backwards, against {count} of each.",
    )


def other_packages(sizes: Sizes, seconds: float) -> Table:
    """Inseq and Captum."""
    model = build(replace(_shallow(sizes), layers=min(2, sizes.wide.layers)), torch.float32)
    embeds = embeddings(model, sizes.tokens)
    quick, slow = _ours(model, embeds), f"Captum's integrated gradients, {sizes.steps} steps"
    inseq, missing = "Inseq's input_x_gradient, per explained token", []
    try:
        # a model of its own: what Inseq does to the one it is given must not reach the others
        quick[inseq] = packages.inseq(shared_copy(model), sizes.tokens)
    except packages.NotInstalled as error:
        missing.append(Row(inseq, note=f"{error}; an earlier measurement of 0.7.1 gave 1.12"))
    timings = interleaved(quick, PLAIN, seconds / 4, sizes.rounds)
    try:
        both: dict[str, Case] = {PLAIN: quick[PLAIN], slow: packages.captum(model, embeds, sizes.steps)}
        timings.append(interleaved(both, PLAIN, seconds * 3 / 4, (1, sizes.rounds[1]))[1])
    except packages.NotInstalled as error:
        missing.append(Row(slow, note=f"{error}; an earlier measurement gave 35"))
    return Table(
        "packages",
        "Other packages",
        RATIO,
        _rows(timings) + missing,
        f"{_words(sizes.wide, layers=False)}, {model.config.num_hidden_layers} layers, float32, T = {sizes.tokens}.",
    )


def compiled(sizes: Sizes, seconds: float) -> Table:
    """What compiled.py prints, if it is there: it starts a compiler, so it has a process of its own."""
    empty = Table("compiled", "torch.compile", RATIO)
    if not sizes.compiled:
        return replace(empty, rows=[Row("compiled.py", note="left out of a trial run")])
    if not COMPILED.exists():
        return replace(empty, rows=[Row("compiled.py", note="not there")])
    try:
        done = subprocess.run([sys.executable, COMPILED], capture_output=True, text=True, timeout=max(2 * seconds, 60))
    except subprocess.TimeoutExpired:
        return replace(empty, rows=[Row("compiled.py", note="took too long")])
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return replace(empty, rows=[Row("compiled.py", note=f"failed: {last}")])
    return replace(empty, note=done.stdout.strip())


SECTIONS = (
    Section("start", 12, start),
    Section("patching", 3, patching),
    Section("saved", 12, saved),
    Section("speed-float32", 85, partial(speed, "float32")),
    Section("speed-bfloat16", 65, partial(speed, "bfloat16")),
    Section("long-float32", 75, partial(long, "float32")),
    Section("long-bfloat16", 50, partial(long, "bfloat16")),
    Section("longer", 40, longer),
    Section("depth", 25, depth),
    Section("checkpointing", 20, checkpointing),
    Section("llama-1b", 25, llama),
    Section("targets", 20, targets),
    Section("packages", 40, other_packages),
    Section("peak", 45, peak),
    Section("compiled", 40, compiled),
)


def _ours(model: object, embeds: torch.Tensor) -> dict[str, Case]:
    return {
        PLAIN: partial(methods.plain, model, embeds),
        "attnlrp, attribute()": partial(methods.attribute, model, embeds, "attnlrp"),
        "cp, attribute()": partial(methods.attribute, model, embeds, "cp"),
    }


def _checkpointed(model: object, case: Case) -> Case:
    @contextmanager
    def both() -> Iterator[Callable[[], object]]:
        with methods.checkpointed(model), case() as run:
            yield run

    return both


def _rows(timings: Sequence[Timing], bars: Mapping[str, float | None] | None = None) -> list[Row]:
    return [
        Row(
            timing.name,
            timing.ratio,
            min(timing.ratios),
            max(timing.ratios),
            timing.median,
            len(timing.ratios),
            (bars or {}).get(timing.name),
        )
        for timing in timings
    ]


def _between(one: Timing, other: Timing) -> float:
    """The median ratio of two methods, round by round."""
    return replace(one, ratios=tuple(a / b for a, b in zip(one.seconds, other.seconds, strict=True))).ratio


def _peak(sizes: Sizes, name: str, checkpointing: bool) -> Row:
    label = f"{name}, checkpointing" if checkpointing else name
    try:
        return Row(label, footprint.peak_mib(_shallow(sizes), torch.bfloat16, sizes.peak, name, checkpointing))
    except RuntimeError as error:
        return Row(label, note=f"failed: {error}")


def _shallow(sizes: Sizes) -> Shape:
    return replace(sizes.wide, layers=min(4, sizes.wide.layers))


def _words(shape: Shape, layers: bool = True) -> str:
    heads = f"{shape.heads} heads" + f" ({shape.kv_heads} of keys and values)" * (shape.heads != shape.kv_heads)
    return f"{shape.layers} layers, " * layers + f"hidden size {shape.hidden}, MLP {shape.mlp}, {heads}"
