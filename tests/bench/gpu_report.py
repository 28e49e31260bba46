"""For gpu.py: what was measured as Markdown, what is wrong first, then the bars, then a table per section."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["failures", "markdown", "wrong"]

Row = dict[str, Any]
HIDDEN = ("ms", "lowest", "highest", "status", "name", "kernel", "tokens", "method", "part", "configuration")
KINDS = ("device", "ms", "kernels' ms", "seconds", "seconds to compile")  # which of them a row has
SILENT = ("timed", "warmed up")
LISTS = ("largest of them", "products")


def wrong(rows: list[Row]) -> list[Row]:
    """The comparisons that failed, or took the process with them."""
    return [row for row in rows if row["status"].startswith("failed") or row["status"] == "did not end"]


def failures(state: dict[str, Any]) -> list[str]:
    """The kernels that are wrong; also that the comparisons were not made to the end."""
    compared = state["sections"].get("correctness")
    if compared is None:
        return []
    found = [f"{row['name']}: {row['status']}" for row in wrong(compared["rows"])]
    late = sum(row["status"] == "no time left" for row in compared["rows"])
    if late or compared["ended"] != "done":
        found.append(f"not compared to the end ({compared['ended']}; no time left for {late} comparisons)")
    return found


def markdown(state: dict[str, Any], titles: dict[str, str], lengths: dict[str, int], floors: dict[str, float]) -> str:
    """All of it.

    Args:
        state: by section how it ended, its seconds and rows.
        titles: of the sections.
        lengths: "attribution", "launches" and "long": the tokens that the bars are about.
        floors: by rules, the operations' ratio to plain's: what is left if nothing but products took time.
    """
    lines = ["# GPU measurements", ""]
    if broken := failures(state):
        lines += ["**Wrong kernels:**", "", *[f"- {text}" for text in broken], ""]
    elif "correctness" in state["sections"]:
        compared = [row for row in state["sections"]["correctness"]["rows"] if row["status"] == "ok"]
        lines += [f"Every kernel agrees with its eager twin in {len(compared)} comparisons.", ""]
    lines += ["| bar | measured | |", "|---|---|---|", *bars(state, lengths, floors), ""]
    for name, part in state["sections"].items():
        found = {"correctness": agreement, "kernels": choices}.get(name, table)(part["rows"])
        lines += [f"## {titles[name]}", "", f"{part['ended']}, {part['seconds']:.0f} s", "", *found, ""]
    lines.append("Times in ms: median (lowest-highest) of interleaved rounds, CUDA events.")
    return "\n".join(lines) + "\n"


def bars(state: dict[str, Any], lengths: dict[str, int], floors: dict[str, float]) -> Iterator[str]:
    """One line of a table for each bar: the best way to run, and whether it is met."""

    def rows(section: str) -> list[Row]:
        return [row for row in state["sections"].get(section, {"rows": []})["rows"] if row["status"] == "ok"]

    def best(found: list[Row], key: str, of: Callable[[Row], bool]) -> Row | None:
        return min((row for row in found if key in row and of(row)), key=lambda row: row[key], default=None)

    def line(
        bar: str, row: Row | None, value: Callable[[Row], float], met: Callable[[float], bool], more: str = ""
    ) -> str:
        if row is None:
            return f"| {bar} | not measured{more} | |"
        number = value(row)
        return f"| {bar} | {number:.3g} ({row['method']}){more} | {'met' if met(number) else '**missed**'} |"

    long, short, longest = lengths["attribution"], lengths["launches"], lengths["long"]
    for rules, most in (("attnlrp", 0.86), ("cp", 0.70)):
        more = f"; matrix products alone: {floors[rules]:.2f}"
        for whole in (True, False):

            def ours(row: Row, rules: str = rules, whole: bool = whole) -> bool:
                here = row["method"].startswith(rules) and row.get("tokens") == long
                return here and row["method"].endswith("attribute()") == whole

            what = f"{rules}, {'attribute()' if whole else 'forward and backward alone'}, T = {long}"
            row = best(rows("attribution"), "/ plain", ours)
            yield line(f"{what}: at most {most} of plain", row, lambda r: r["/ plain"], lambda n, m=most: n <= m, more)
            row = best(rows("attribution"), "/ upstream", ours)
            yield line(f"{what}: at least 1.2 x upstream", row, lambda r: 1 / r["/ upstream"], lambda n: n >= 1.2)
        shares = best(
            rows("attribution"),
            "not products",
            lambda row, rules=rules: row["method"].startswith(rules) and row["tokens"] == long,
        )
        bar = f"{rules}, T = {long}: at most 10 % of the kernels' time in others than products"
        yield line(bar, shares, lambda r: 100 * r["not products"], lambda n: n <= 10)
        quick = best(
            rows("graphs") + rows("compiled"),
            "/ upstream",
            lambda row, rules=rules: row["method"].startswith(rules) and row["tokens"] == short,
        )
        bar = f"{rules}, T = {short}: at least 2 x upstream"
        yield line(bar, quick, lambda r: 1 / r["/ upstream"], lambda n: n >= 2)
    there = [row for row in rows("long") if row.get("tokens") == longest and not row["method"].startswith("plain")]
    fits = best(there, "peak GiB", lambda row: True)
    yield line(f"T = {longest} with checkpointing fits (GiB)", fits, lambda r: r["peak GiB"], lambda n: True)


def table(rows: list[Row]) -> Iterator[str]:
    """A table for each kind of row, and a list of what failed behind them."""
    kinds: dict[tuple[bool, ...], list[Row]] = {}
    for row in rows:
        if row["status"] == "ok":
            kinds.setdefault(tuple(key in row for key in KINDS), []).append(row)
    for found in kinds.values():
        columns = list(dict.fromkeys(key for row in found for key in row if key not in HIDDEN))
        yield "| | ms | " + " | ".join(columns) + " |"
        yield "|---|---|" + "---|" * len(columns)
        for row in found:
            yield f"| {row['name']} | {_time(row)} | " + " | ".join(_cell(key, row.get(key)) for key in columns) + " |"
        yield ""
    yield from _failed(rows)


def agreement(rows: list[Row]) -> Iterator[str]:
    """For each kernel and dtype the largest error and its twin's; gpu.json has every comparison."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    yield "| | comparisons | " + " | ".join(f"{dtype}: largest error (twin's)" for dtype in dtypes) + " |"
    yield "|---|---|" + "---|" * len(dtypes)
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        found = [row for row in rows if row["kernel"] == kernel and row["status"] == "ok"]
        cells = []
        for dtype in dtypes:
            here = [row for row in found if row["dtype"] == dtype]
            largest = [max(row[key] for row in here) for key in ("error", "twin's error")] if here else []
            cells.append("{:.2g} ({:.2g})".format(*largest) if here else "")
        yield f"| {kernel} | {len(found)} | {' | '.join(cells)} |"
    yield ""
    yield from _failed(rows)


def choices(rows: list[Row]) -> Iterator[str]:
    """For each kernel's forward and backward the twin, what ships and the fastest; gpu.json has all of them."""
    parts: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if row["status"] == "ok":
            parts.setdefault((row["kernel"], row["part"]), {})[row["configuration"]] = row
    yield "| | twin, ms | as shipped, ms | reaches | of the ceiling | fastest, ms | configuration |"
    yield "|---|---|---|---|---|---|---|"
    for (kernel, part), found in parts.items():
        twin, shipped = found.get("twin"), found.get("as shipped")
        ours = [row for label, row in found.items() if label != "twin"]
        if not ours:
            continue
        fastest = min(ours, key=lambda row: row["ms"])
        reached = next(
            (f"{shipped[unit]:.4g} {unit}" for unit in ("GB/s", "TFLOP/s") if shipped and unit in shipped), ""
        )
        share = f"{shipped['of the ceiling']:.0%}" if shipped and "of the ceiling" in shipped else ""
        cells = (_time(twin), _time(shipped), reached, share, _time(fastest), fastest["configuration"])
        yield f"| {kernel}, {part} | {' | '.join(cells)} |"
    yield ""
    yield from _failed(rows)


def _failed(rows: list[Row]) -> Iterator[str]:
    yield from (f"- {row['name']}: {row['status']}" for row in rows if row["status"] not in ("ok", *SILENT))


def _time(row: Row | None) -> str:
    return f"{row['ms']:.4g} ({row['lowest']:.4g}-{row['highest']:.4g})" if row and "lowest" in row else ""


def _cell(column: str, value: Any) -> str:
    if value is None:
        return ""
    if column in LISTS:
        return "; ".join(f"{time:.3g} ms {name[:60].replace('|', '/')} x {count}" for name, count, time in value[:5])
    return f"{value:.3g}" if isinstance(value, float) else str(value)
