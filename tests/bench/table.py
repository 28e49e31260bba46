"""For cpu.py: rows, and how they are written: Markdown between two marks of a page, and JSON beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Row", "Table", "as_json", "as_markdown", "write"]

BEGIN, END = "<!-- cpu: written by `make bench` -->", "<!-- cpu: end -->"


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        name: the method.
        value: in the table's unit; None where there is none, and `note` says why.
        low: the lowest of all rounds.
        high: the highest.
        seconds: the median, where the value is a ratio.
        rounds: how many were measured.
        bar: what the value must not exceed.
        note: what a reader should know.
    """

    name: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    seconds: float | None = None
    rounds: int | None = None
    bar: float | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        """Whether the bar is met: "met", "missed", or "" without a bar or value."""
        if self.bar is None or self.value is None:
            return ""
        return "met" if self.value <= self.bar else "missed"


@dataclass(frozen=True)
class Table:
    """Rows in one unit.

    Attributes:
        section: the name that `--sections` takes.
        unit: heads the column of values.
        note: under the title.
    """

    section: str
    title: str
    unit: str
    rows: list[Row] = field(default_factory=list)
    note: str = ""


def as_markdown(tables: Sequence[Table], machine: dict[str, Any]) -> str:
    """All tables, with the machine above and the bars of all of them first."""
    about = (
        f"{machine['processor']}, {machine['threads']} of {machine['cores']} cores used; torch {machine['torch']}, "
        f"transformers {machine['transformers']}, Python {machine['python']}, {machine['system']}."
    )
    if machine.get("note"):
        about += f" {machine['note']}"
    parts = [about]
    bars = [(table, row) for table in tables for row in table.rows if row.bar is not None]
    if bars:
        lines = ["| bar | measured | at most | |", "|---|---|---|---|"]
        for table, row in bars:
            exact = "" if row.value is None else f"{row.value:#.3g}"  # 0.724 misses a bar of 0.72
            measured = exact or row.note
            lines.append(f"| {table.title}: {row.name} | {measured} | {_number(row.bar, table.unit)} | {row.verdict} |")
        parts.append("### Bars\n\n" + "\n".join(lines))
    parts += [_table(table) for table in tables]
    return "\n\n".join(parts)


def as_json(tables: Sequence[Table], machine: dict[str, Any]) -> str:
    """The same figures, for programs."""
    found = [
        asdict(table) | {"rows": [asdict(row) | {"verdict": row.verdict} for row in table.rows]} for table in tables
    ]
    return json.dumps({"machine": machine, "tables": found}, indent=1) + "\n"


def write(page: Path, tables: Sequence[Table], machine: dict[str, Any]) -> None:
    """Put the tables between the marks of the page, and the JSON beside it.

    Raises:
        ValueError: the page has no marks.
    """
    text = page.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{page.name} has no place for the tables; give it the lines {BEGIN} and {END}")
    before, _, rest = text.partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{as_markdown(tables, machine)}\n\n{END}{rest.partition(END)[2]}")
    page.with_suffix(".json").write_text(as_json(tables, machine))


def _table(table: Table) -> str:
    timed = any(row.seconds is not None for row in table.rows)
    spread = any(row.low is not None for row in table.rows)
    head = ["", table.unit] + ["lowest-highest, rounds"] * spread + ["seconds"] * timed
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in table.rows:
        cells = [row.name, _number(row.value, table.unit) if row.value is not None else row.note]
        if row.bar is not None and row.value is not None:
            cells[1] += f" (≤ {_number(row.bar, table.unit)}: {row.verdict})"
        if row.value is not None and row.note:
            cells[0] += f" ({row.note})"
        if spread:
            cells.append(
                f"{_number(row.low, table.unit)}-{_number(row.high, table.unit)}, {row.rounds}"
                if row.low is not None and row.high is not None
                else ""
            )
        if timed:
            cells.append("" if row.seconds is None else f"{row.seconds:.3g}")
        lines.append(f"| {' | '.join(cells)} |")
    note = f"{table.note}\n\n" if table.note else ""
    return f"### {table.title}\n\n{note}" + "\n".join(lines)


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if "ratio" in unit or "seconds" in unit else f"{value:.1f}"
