"""Runs the proofs: each subject in a process of its own, with a limit of time and of memory, several at a time.

A process is forked from one that has imported torch and transformers already, so a subject costs its own work only.
Finished records are in a JSON-lines file, one flushed line each: a run that was cut off goes on after the last one.
Records of other versions of torch or transformers are done again; those of another state of lxt are not noticed.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from lxt.coverage.proof import Record, prove, versions
from lxt.coverage.subjects import Subject

__all__ = ["Limits", "read_records", "run"]


# A model's own module imports in milliseconds once these are there, which take seconds.
_IMPORTED_ONCE = (
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.bart.modeling_bart",
    "transformers.models.vit.modeling_vit",
    "lxt.coverage.proof",
)


@dataclass(frozen=True)
class Limits:
    """What one subject may take.

    Attributes:
        seconds: of wall time.
        memory: resident bytes.
    """

    seconds: float = 120.0
    memory: int = 3 * 2**30


@dataclass
class _Running:
    subject: Subject
    process: BaseProcess
    results: Connection
    start: float


def run(
    subjects: Sequence[Subject],
    path: Path,
    workers: int = 2,
    limits: Limits = Limits(),
    done: Callable[[Record], None] = lambda record: None,
    work: Callable[[Subject], Record] = prove,
) -> list[Record]:
    """Prove the subjects that `path` has no record of yet, and append their records to it.

    Args:
        subjects: what to prove.
        path: the JSON-lines file; made if it isn't there.
        workers: processes at a time.
        limits: of each.
        done: called with each record as it comes.
        work: what a process does, a function of a module.

    Returns:
        The records of all `subjects`, old and new, in their order.
    """
    records = {record.key: record for record in read_records(path) if record.versions == versions()}
    waiting = [subject for subject in subjects if subject.key not in records]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_IMPORTED_ONCE))
    running: list[_Running] = []
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        if file.tell() and not path.read_bytes().endswith(b"\n"):
            file.write("\n")  # the last line was cut short
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    running.append(_start(context, waiting.pop(0), work))
                wait([job.results for job in running], timeout=0.2)
                for record in _finished(running, limits):
                    records[record.key] = record
                    file.write(json.dumps(record.to_dict()) + "\n")
                    file.flush()
                    done(record)
        finally:
            for job in running:
                _kill(job)
    return [records[subject.key] for subject in subjects if subject.key in records]


def read_records(path: Path) -> list[Record]:
    """The records of a JSON-lines file, the last of each subject; a line cut short by a crash is left out."""
    if not path.exists():
        return []
    records: dict[str, Record] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            continue
        record = Record.from_dict(values)
        records[record.key] = record
    return list(records.values())


def _start(context: ForkServerContext, subject: Subject, work: Callable[[Subject], Record]) -> _Running:
    results, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(work, subject, sender), daemon=True)
    process.start()
    sender.close()
    return _Running(subject, process, results, time.monotonic())


def _work(work: Callable[[Subject], Record], subject: Subject, results: Connection) -> None:
    import warnings

    import torch
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    results.send(work(subject))


def _finished(running: list[_Running], limits: Limits) -> Iterable[Record]:
    """The records of jobs that have ended or were ended; takes them off the list."""
    for job in list(running):
        seconds = time.monotonic() - job.start
        record = _received(job)
        if record is None and job.process.is_alive():
            reason = _over(job, seconds, limits)
            if not reason:
                continue
            record = _stopped(job, reason, seconds)
        elif record is None:
            record = _stopped(job, f"the process died with exit status {job.process.exitcode}", seconds)
        running.remove(job)
        _kill(job)
        yield record


def _received(job: _Running) -> Record | None:
    try:
        return job.results.recv() if job.results.poll() else None
    except EOFError:
        job.process.join(1)
        return None


def _over(job: _Running, seconds: float, limits: Limits) -> str:
    if seconds > limits.seconds:
        return f"took more than {limits.seconds:.0f} s"
    used = _resident(job.process.pid)
    return (
        f"took {used / 2**30:.1f} GiB of memory, more than {limits.memory / 2**30:.1f}" if used > limits.memory else ""
    )


def _resident(pid: int | None) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):  # gone, or a system without /proc: no memory limit there
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _stopped(job: _Running, reason: str, seconds: float) -> Record:
    subject = job.subject
    names = (subject.task, subject.type, subject.architecture)
    return Record(*names, "limits", reason, seconds=round(seconds, 2), versions=versions())


def _kill(job: _Running) -> None:
    if job.process.is_alive():
        job.process.kill()
    job.process.join()
    job.results.close()
