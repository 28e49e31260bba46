"""tests/bench/gpu.py: its dry run on the CPU, what it counts, and that it finds a wrong kernel."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

BENCH = Path(__file__).parent / "bench"
CPU = torch.device("cpu")
sys.path.insert(0, str(BENCH))
try:
    cases, kernels, model, report, rows = (
        importlib.import_module(f"gpu_{name}") for name in ("cases", "kernels", "model", "report", "rows")
    )
    gpu = importlib.import_module("gpu")
finally:
    sys.path[:] = [place for place in sys.path if place != str(BENCH)]

TINY = model.Shape(layers=2, hidden=32, mlp=48, heads=4, kv_heads=2, vocabulary=61)
RULES = [None, "attnlrp", "cp"]
LENGTHS = {"attribution": 16, "launches": 8, "long": 24}


def run(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(BENCH / "gpu.py"), "--out", str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=out, env=environment)  # not from the checkout


def test_dry_run(tmp_path):
    done = run(tmp_path, "--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    text, state = (tmp_path / "gpu.md").read_text(), json.loads((tmp_path / "gpu.json").read_text())
    assert done.stdout.endswith(text.split("\n## ")[0] + "\n")
    sections = state["sections"]
    assert list(sections) == ["machine", "correctness", "kernels", "attribution", "graphs", "long", "compiled"]
    bad = [
        f"{name}: {row['name']}: {row['status']}"
        for name, part in sections.items()
        for row in part["rows"]
        if row["status"].startswith(("failed", "did not", "no time"))
    ]
    assert not bad
    assert {part["ended"] for part in sections.values()} == {"done"}
    assert "Every kernel agrees with its eager twin" in text
    assert "| T = 16, cp, kernels fast, attribute() |" in text
    for part in sections.values():
        for row in part["rows"]:
            assert "lowest" not in row or row["lowest"] <= row["ms"] <= row["highest"]
    timed = [row for row in sections["attribution"]["rows"] if row.get("tokens") == 16 and "ms" in row]
    measured = {row["method"]: row for row in timed}
    assert all("/ plain" in row for name, row in measured.items() if name != "plain")
    assert measured["attnlrp, kernels fast"]["differs from kernels off by"] == 0
    for line in text.splitlines():
        assert not line.startswith("|") or line.endswith("|")
    assert len(timed_configurations(sections["kernels"]["rows"])) >= 5


def timed_configurations(found: list[dict]) -> set[str]:
    return {row["configuration"] for row in found if row.get("configuration") and row["status"] == "ok"}


@pytest.mark.gpu
def test_kernels_on_the_gpu(tmp_path):
    done = run(tmp_path, "--sections", "machine", "correctness")
    assert done.returncode == 0, done.stdout + done.stderr


def test_without_a_gpu_it_says_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = run(tmp_path)
    assert done.returncode == 1
    assert "--dry-run" in done.stderr


def one(name: str, label: str):
    sizes = cases.Sizes(tokens=16, hidden=32, mlp=48, heads=4, kv_heads=2, width=8)
    return next(case for case in cases.cases(sizes, sizes) if case.kernel == name and label in case.label)


def compared(tmp_path, monkeypatch, case, kernel=None):
    monkeypatch.setattr(kernels, "cases", lambda *_: [replace(case, dtypes=(torch.float32,))])
    right = kernels.kernel_of(case.kernel)
    if kernel is not None:
        monkeypatch.setattr(kernels, "kernel_of", lambda _: lambda *args, **options: kernel(right, *args, **options))
    kernels.correctness(rows.Rows(tmp_path / "rows", 60), CPU, None, None)
    (row,) = rows.read(tmp_path / "rows").values()
    return row["status"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted only where there is no GPU")
class TestWrongKernels:
    def test_a_right_one(self, tmp_path, monkeypatch):
        assert compared(tmp_path, monkeypatch, one("rms_norm", "llama")) == "ok"

    def test_one_number_in_one_row(self, tmp_path, monkeypatch):
        def kernel(right, x, *rest, **options):
            spoilt = torch.ones_like(x)
            spoilt[3, 5] = 1.001
            return right(x * spoilt + (x - x * spoilt).detach(), *rest, **options)

        assert compared(tmp_path, monkeypatch, one("rms_norm", "llama"), kernel).startswith(
            "failed: AssertionError: er"
        )

    def test_the_forward_in_its_last_bit(self, tmp_path, monkeypatch):
        def kernel(right, *given, **options):
            y = right(*given, **options)
            return y + (torch.nextafter(y, y + 1) - y).detach()

        status = compared(tmp_path, monkeypatch, one("identity", "silu"), kernel)
        assert status == "failed: AssertionError: the forward differs from the twin's in its last bits"

    def test_a_backward_that_writes_into_what_it_saved(self, tmp_path, monkeypatch):
        class Writes(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.x = x
                return x.clone()

            @staticmethod
            def backward(ctx, c):
                ctx.x.data.zero_()
                return c

        def kernel(right, x, *rest, **options):
            return right(Writes.apply(x), *rest, **options)

        status = compared(tmp_path, monkeypatch, one("identity", "silu"), kernel)
        assert status == "failed: AssertionError: the kernel wrote into what it was given"


def test_rows_are_kept_whatever_happens(tmp_path):
    path = tmp_path / "rows"
    first = rows.Rows(path, 60)

    def dies():
        assert rows.read(path)["b"]["status"] == "did not end"
        raise KeyboardInterrupt

    first.attempt("a", lambda: {"ms": 1.0}, kernel="x")
    with pytest.raises(KeyboardInterrupt):
        first.attempt("b", dies)
    first.attempt("c", lambda: 1 / 0)
    with path.open("a") as file:
        file.write('{"name": "d", "sta')
    second = rows.Rows(path, 60)
    for name in "abcd":
        second.attempt(name, lambda: {"ms": 2.0})
    second.attempt("a", lambda: {"ms": 3.0}, again=True)
    rows.Rows(path, 0).attempt("e", lambda: {}, needs=1)
    found = rows.read(path)
    assert found["a"] == {"name": "a", "status": "ok", "ms": 3.0}
    assert found["b"]["status"] == "did not end"
    assert found["c"]["status"] == "failed: ZeroDivisionError: division by zero"
    assert found["e"]["status"] == "no time left"


class Watch(TorchDispatchMode):
    """Notes torch's operations and the shapes of their tensors."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append((function.overloadpacket, [x.shape for x in args if isinstance(x, torch.Tensor)]))
        return function(*args, **kwargs or {})


def watched(rules, tokens):
    built = model.build(TINY, CPU)
    context = model.patched(built, rules, "off")() if rules else nullcontext()
    with model.without_mask(), context, Watch() as watch:
        model.step(built, built.model, model.prompt(built, tokens))
    return watch.seen


@pytest.mark.parametrize("rules", RULES)
def test_operations_are_those_of_the_linear_layers(rules):
    tokens = 16
    linear = sum(2 * a[0] * a[1] * b[1] for name, (a, b, *_) in products(watched(rules, tokens)))
    attention = TINY.layers * tokens**2 * TINY.hidden * (3 if rules == "cp" else 6)
    assert model.operations(TINY, tokens, rules) == linear + attention


def products(seen):
    return [(name, shapes) for name, shapes in seen if name is torch.ops.aten.mm]


@pytest.mark.parametrize("rules", RULES)
def test_nothing_waits_for_the_gpu(rules):
    """What reads a number back can't be captured in a CUDA graph."""
    aten = torch.ops.aten
    names = {name for name, _ in watched(rules, 8)}
    assert aten.mm in names
    assert not {aten._local_scalar_dense, aten.nonzero, aten.is_nonzero, aten.item} & names


STAND_IN = """
import os, sys, time
from pathlib import Path
file = Path(sys.argv[sys.argv.index("--out") + 1]) / "machine.jsonl"
left = {names!r}[len(file.read_text().splitlines()):]
if left:
    file.open("a").write('{{"name": "' + left[0] + '", "status": "ok"}}\\n')
{end}
"""
ENDS = {
    "loses its GPU": ("ab", f"sys.exit({rows.RESTART} if len(left) > 1 else 0)", "done"),
    "dies of a signal once": ("ab", "os.kill(os.getpid(), 9) if len(left) > 1 else sys.exit(0)", "done"),
    "dies before its first row": ("", "os.kill(os.getpid(), 9)", "failed with status -9: "),
    "fails": ("a", "sys.exit('no such file')", "failed with status 1: no such file"),
    "hangs": ("a", "time.sleep(60)", "out of time"),
}


@pytest.mark.parametrize("how", ENDS)
def test_a_section_that(how, tmp_path, monkeypatch):
    """A stand-in for a section's process: at each start it writes the next row and ends."""
    names, end, expected = ENDS[how]
    (tmp_path / "gpu.py").write_text(STAND_IN.format(names=names, end=end))
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    monkeypatch.setattr(gpu, "GRACE", 0)
    assert gpu.run("machine", tmp_path, 2.0)[0] == expected
    assert "".join(rows.read(tmp_path / "machine.jsonl")) == names


@pytest.mark.parametrize("rules", ["attnlrp", "cp"])
def test_upstream_beside_ours(rules):
    path = os.environ.get("UPSTREAM_LXT")
    if not path:
        pytest.skip("UPSTREAM_LXT names no folder with upstream's lxt")
    built = model.build(TINY, CPU).float()
    other = importlib.import_module("gpu_upstream").patched_by_upstream(model.shared_copy(built), rules, path)
    assert other.lm_head.weight is built.lm_head.weight
    embeds = model.prompt(built, 8)
    plain = model.step(built, built.model, embeds)
    theirs = model.documented(other, embeds)
    with model.patched(built, rules, "off")():
        torch.testing.assert_close(model.step(built, built.model, embeds), theirs, rtol=1e-3, atol=1e-6)
    assert torch.equal(model.step(built, built.model, embeds), plain)  # ours is not touched
    assert not torch.allclose(plain, theirs, rtol=0.1)


def state(**sections: list[dict]) -> dict:
    return {
        "sections": {
            name: {
                "ended": "done",
                "seconds": 1.0,
                "rows": [{"name": str(i), "status": "ok"} | row for i, row in enumerate(found)],
            }
            for name, found in sections.items()
        }
    }


def test_bars_take_the_best_row_of_their_kind():
    found = state(
        attribution=[
            {"tokens": 16, "method": "attnlrp, kernels off", "/ plain": 0.9, "/ upstream": 0.8},
            {"tokens": 16, "method": "attnlrp, kernels fast", "/ plain": 0.85, "/ upstream": 0.85},
            {"tokens": 8, "method": "attnlrp, kernels fast", "/ plain": 0.5, "/ upstream": 0.5},
            {"tokens": 16, "method": "cp, kernels off, attribute()", "/ plain": 0.71},
            {"tokens": 16, "method": "cp, kernels off", "not products": 0.11},
        ],
        graphs=[{"tokens": 8, "method": "cp, kernels off, CUDA graph", "/ upstream": 0.5}],
        long=[{"tokens": 24, "method": "plain", "peak GiB": 9.0}],
    )
    lines = list(report.bars(found, LENGTHS, {"attnlrp": 1.0, "cp": 0.8}))

    def line(*words: str) -> str:
        (text,) = [text for text in lines if all(word in text for word in words)]
        return text

    assert "0.85 (attnlrp, kernels fast); matrix products alone: 1.00 | met |" in line("attnlrp, forward", "plain")
    assert "| 1.25 (attnlrp, kernels off) | met |" in line("attnlrp, forward", "upstream")
    assert "| 0.71 (cp, kernels off, attribute()); matrix products alone: 0.80 | **missed** |" in line(
        "cp, attr", "plain"
    )
    assert "| 11 (cp, kernels off) | **missed** |" in line("cp", "10 %")
    assert "| 2 (cp, kernels off, CUDA graph) | met |" in line("cp, T = 8")
    assert "not measured" in line("fits")  # plain's is no answer


def test_wrong_kernels_come_first():
    rows_ = [
        {"kernel": "a", "dtype": "bf16", "error": 0.25, "twin's error": 0.125},
        {"kernel": "a", "dtype": "bf16", "error": 0.5, "twin's error": 0.0625},
        {"kernel": "b", "dtype": "fp32", "status": "failed: x"},
        {"kernel": "c", "dtype": "fp32", "status": "did not end"},
    ]
    text = report.markdown(state(correctness=rows_), {"correctness": "Kernels"}, LENGTHS, {"attnlrp": 1.0, "cp": 0.8})
    assert text.startswith("# GPU measurements\n\n**Wrong kernels:**\n\n- 2: failed: x\n- 3: did not end\n")
    assert "| a | 2 | 0.5 (0.12) |  |\n| b | 0 |  |  |\n" in text
    assert report.failures(state(correctness=[{"kernel": "a"}])) == []
    assert report.failures(state(correctness=[{"kernel": "a", "status": "no time left"}])) != []
