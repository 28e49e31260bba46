"""What `lxt coverage` does: run the proofs with a progress bar, print the counts, write the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lxt.coverage.proof import Record
from lxt.coverage.report import counts, write
from lxt.coverage.runner import Limits, run
from lxt.coverage.subjects import SAMPLE, TASKS, Subject, all_subjects

__all__ = ["cover", "selected"]


def selected(tasks: Sequence[str], types: Sequence[str], sample: bool) -> list[Subject]:
    """The subjects that were asked for.

    Raises:
        ValueError: a task that isn't known, or a type that isn't in transformers' mappings for the tasks.
    """
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise ValueError(f"unknown task {unknown[0]!r}; allowed: {', '.join(TASKS)}")
    subjects = [subject for subject in all_subjects() if not tasks or subject.task in tasks]
    missing = set(types) - {subject.type for subject in subjects}
    if missing:
        where = f"for {', '.join(tasks)}" if tasks else "for any task that is covered"
        raise ValueError(
            f"transformers has no type {', '.join(sorted(missing))} {where}; `lxt coverage --list` names them"
        )
    return [s for s in subjects if (not types or s.type in types) and (not sample or s.key in SAMPLE)]


def cover(
    subjects: Sequence[Subject], records: Path, report: Path | None, workers: int, limits: Limits
) -> list[Record]:
    """Run what has no record yet, and print what came out."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("proving", total=len(subjects))

        def show(record: Record) -> None:
            progress.advance(bar)
            progress.update(bar, description=record.key)
            if not record.proven:
                progress.console.print(f"{record.key}: {'; '.join(record.reasons())}", markup=False, highlight=False)

        found = run(subjects, records, workers, limits, show)
    table = Table("task", "proven", "of")
    for task, proven, total in counts(found):
        table.add_row(task, str(proven), str(total))
    Console().print(table)
    if report is not None:
        for path in write(found, report):
            console.print(f"written: {path}", highlight=False)
    return found
