"""The CPU benchmarks run with tiny sizes, their tables are well-formed, and the bars that need no clock hold."""

import json
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parent / "bench"
MODULES = ("footprint", "packages", "starting", "subjects", "table", "timing")


@pytest.fixture(scope="module")
def bench():
    """The scripts' modules, which import each other as scripts do."""
    sys.path.insert(0, str(BENCH))
    try:
        return {name: __import__(name) for name in MODULES}
    finally:
        sys.path.remove(str(BENCH))  # before a model is built, where transformers would take kernels.py for a package


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    """(the page, the JSON, the messages) of a run with tiny sizes."""
    page = tmp_path_factory.mktemp("bench") / "benchmarks.md"
    page.write_text("before\n<!-- cpu: written by `make bench` -->\nold\n<!-- cpu: end -->\nafter\n")
    done = subprocess.run(
        [sys.executable, BENCH / "cpu.py", "--tiny", "--report", page], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return page.read_text(), json.loads(page.with_suffix(".json").read_text()), done.stderr


def test_a_trial_run_writes_between_the_marks(trial):
    page, _, _ = trial
    assert page.startswith("before\n<!-- cpu: written")
    assert page.endswith("<!-- cpu: end -->\nafter\n")
    assert "old" not in page


def test_every_row_has_a_figure_or_a_reason(trial):
    _, found, _ = trial
    rows = [(table["section"], row) for table in found["tables"] for row in table["rows"]]
    assert len({section for section, _ in rows}) == len(found["tables"]) >= 15
    for section, row in rows:
        if row["value"] is None:
            assert re.match("not installed|left out|not there", row["note"]), (section, row)
        else:
            assert row["value"] >= 0
            assert row["low"] is None or row["low"] <= row["value"] <= row["high"]
        assert row["verdict"] == ("" if row["bar"] is None or row["value"] is None else
                                  "met" if row["value"] <= row["bar"] else "missed")  # fmt: skip


def test_the_markdown_tables_are_well_formed(trial):
    page, found, _ = trial
    assert page.count("\n### ") == len(found["tables"]) + 1  # and that of the bars
    for block in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
        assert len({line.count("|") for line in block.splitlines()}) == 1, block


def test_the_bars_stand_next_to_what_was_measured(trial):
    _, found, _ = trial
    bars = {(t["section"], r["name"]): r["bar"] for t in found["tables"] for r in t["rows"] if r["bar"] is not None}
    assert {value for value in bars.values()} == {0.3, 50, 16.2, 8.5, 0.92, 0.76, 0.72, 1.08}
    for dtype in ("float32", "bfloat16"):
        assert bars[f"speed-{dtype}", "attnlrp, attribute()"] == 0.92
        assert bars[f"speed-{dtype}", "cp, attribute()"] == 0.76
        assert bars[f"long-{dtype}", "cp, attribute()"] == 0.72


def test_the_machine_is_named_by_its_processor_only(trial):
    page, found, _ = trial
    assert set(found["machine"]) >= {"processor", "cores", "threads", "torch", "transformers"}
    assert str(Path.home()) + "/" not in page
    assert str(BENCH) not in page


def test_ratios_are_taken_within_interleaved_rounds(bench):
    seconds = iter([1, 1, 1, 10, 5, 20, 30, 40, 60])  # the machine is slower in the second round
    now, order = 0.0, []

    def case(name):
        @contextmanager
        def ready():
            def run():
                nonlocal now
                order.append(name)
                now += next(seconds)

            yield run

        return ready

    cases = {name: case(name) for name in ("plain", "a", "b")}
    plain, a, b = bench["timing"].interleaved(cases, "plain", 0, rounds=(2, 2), clock=lambda: now)
    assert order == ["plain", "a", "b"] * 2 + ["a", "b", "plain"]
    assert plain.ratios == (1, 1)
    assert a.seconds == (5, 30)
    assert a.ratios == (5 / 10, 30 / 60)
    assert b.ratios == (20 / 10, 40 / 60)
    assert b.ratio == (20 / 10 + 40 / 60) / 2


def test_the_number_of_rounds_fits_the_time(bench):
    now, count = 0.0, 0

    @contextmanager
    def case():
        def run():
            nonlocal now, count
            now, count = now + 2, count + 1

        yield run

    (timing,) = bench["timing"].interleaved({"plain": case}, "plain", 12, rounds=(1, 9), clock=lambda: now)
    assert (len(timing.seconds), count) == (5, 6)  # the first warms up


@pytest.mark.parametrize(("rules", "most"), [("attnlrp", 16.2), ("cp", 8.5)])
def test_what_a_layer_saves_for_the_backward(bench, rules, most):
    shape = bench["subjects"].GROUPED
    assert bench["footprint"].saved_kib_per_token_and_layer(shape, torch.bfloat16, 64, rules) <= most


def test_saved_tensors_are_counted_once_and_without_parameters(bench):
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.hidden = x * 2  # not by save_for_backward: no hook sees it
            return x * x

        @staticmethod
        def backward(ctx, gradient):
            return gradient * ctx.hidden

    class Inner(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(64), requires_grad=False)

        def forward(self, inputs_embeds, use_cache):
            x = inputs_embeds.exp()  # saves its output
            y = x * x * self.weight  # saves the same tensor, twice; the weight
            return type("Output", (), {"last_hidden_state": Square.apply(y.sin())})  # y; and what Square keeps

    model = torch.nn.Module()
    model.model, model.dtype = Inner(), torch.float32
    model.config = type("Config", (), {"hidden_size": 64, "initializer_range": 1.0})
    assert bench["footprint"].saved_bytes(model, 8, None) == 3 * 8 * 64 * 4


def test_what_import_loads(bench):
    heavy, count = bench["starting"].loaded_by_import()
    assert heavy == []
    assert count < 50


def test_checkpointing_in_the_benchmark_really_recomputes(bench):
    import methods

    model = bench["subjects"].build(bench["subjects"].TINY, torch.float32)
    embeds = bench["subjects"].embeddings(model, 8)
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))  # it stops once all is known
    plain = methods.step(model, embeds)
    assert len(calls) == 1
    with methods.checkpointed(model):
        again = methods.step(model, embeds)
    assert len(calls) == 3
    assert torch.equal(plain, again)
    assert not any(module.training for module in model.modules())


def test_many_targets_cost_one_forward(bench):
    import methods

    model = bench["subjects"].build(bench["subjects"].TINY, torch.float32)
    embeds = bench["subjects"].embeddings(model, 8)
    calls = []
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: calls.append(1))
    with methods.one_by_one(model, embeds, 3) as run:
        run()
    separate = len(calls)
    with methods.many_targets(model, embeds, 3) as run:
        run()
    assert separate == 3
    assert len(calls) - separate == 1


@pytest.mark.parametrize("rules", ["attnlrp", "cp"])
def test_upstream_in_the_benchmark_computes_the_same_relevance(bench, rules):
    import methods

    packages = bench["packages"]
    model = bench["subjects"].build(bench["subjects"].TINY, torch.float32)
    embeds = bench["subjects"].embeddings(model, 8)
    try:
        theirs = packages.upstream(model, embeds, rules)
    except packages.NotInstalled as error:
        pytest.skip(str(error))
    with theirs() as run:
        got = run()
    with methods.plain(model, embeds) as run:
        plain = run()
    with methods.patched(model, embeds, rules) as run:
        expected = run()
    assert (got - expected).norm() <= 64 * torch.finfo(torch.float32).eps * expected.norm()  # sums over 64 dimensions
    assert (plain - expected).norm() > 0.01 * expected.norm()  # upstream's patch reached its copy, and no other model


def test_the_page_has_a_place_for_the_tables(bench, tmp_path):
    table = bench["table"]
    page = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"
    assert table.BEGIN in page.read_text()
    assert table.END in page.read_text()
    (tmp_path / "page.md").write_text("nothing")
    with pytest.raises(ValueError, match=r"page\.md has no place"):
        table.write(tmp_path / "page.md", [], {})
