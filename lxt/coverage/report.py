"""The report: docs/architectures.md, a table that a user can search, and the same numbers as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lxt.coverage.proof import SAME_LOGITS, SAME_RELEVANCE, Record, largest
from lxt.coverage.reasons import REASONS
from lxt.coverage.subjects import TASKS

__all__ = ["as_markdown", "counts", "write"]

PROVEN, PARTLY, FAILED = "✓", "~", "✗"
_TITLES = {
    "causal": "Causal language models",
    "masked": "Masked language models",
    "sequence": "Sequence classification",
    "seq2seq": "Sequence to sequence",
    "image": "Image classification",
    "image-text": "Image and text to text",
    "token": "Token classification (types that the tables above don't have)",
    "question": "Question answering (types that the tables above don't have)",
    "audio": "Audio classification (audio encoders)",
    "ctc": "Speech recognition by CTC (types that the table above doesn't have)",
    "speech": "Speech to text, encoder-decoder (types that the tables above don't have)",
}


def write(records: Sequence[Record], path: Path) -> tuple[Path, Path]:
    """Write the table to `path` (.md), and the numbers beside it (.json)."""
    numbers = path.with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_markdown(records), encoding="utf-8")
    rows = [record.to_dict() for record in records]
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    numbers.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    return path, numbers


def counts(records: Sequence[Record]) -> list[tuple[str, int, int]]:
    """(task, proven, all) for each task that there are records of."""
    tasks = [task for task in TASKS if any(record.task == task for record in records)]
    return [
        (task, sum(r.proven for r in records if r.task == task), sum(r.task == task for r in records)) for task in tasks
    ]


def as_markdown(records: Sequence[Record]) -> str:
    """The whole page."""
    versions = " / ".join(sorted({record.versions for record in records}))
    parts = [_INTRODUCTION.format(versions=versions)]
    rows = [f"| [{_TITLES[t]}](#{_anchor(_TITLES[t])}) | {proven} | {total} |" for t, proven, total in counts(records)]
    parts.append("\n".join(["| task | proven | of |", "|---|---|---|", *rows]))
    for task, _, _ in counts(records):
        parts.append(f"## {_TITLES[task]}\n\n{_table([record for record in records if record.task == task])}")
    return "\n\n".join(parts) + "\n"


_INTRODUCTION = f"""# Architectures

Written by `make coverage`, measured with {{versions}}; don't edit. Every type in the mappings of transformers is built
tiny, with random weights and zero biases in float64, and patched. **{PROVEN}** means that all of this holds:

1. the patched model's logits are those of the bare one (to {SAME_LOGITS:g} of the largest);
2. relevance sums to the explained logit (to {SAME_RELEVANCE:g}), under `cp`, and under `attnlrp` with the softmax path
   stopped;
3. the auditor, which shares no code with the rules, finds the same relevance (to {SAME_RELEVANCE:g} of the largest),
   under both and under `attnlrp`;
4. no operation was met that has no rule;
5. relevance is the same with gradient checkpointing, where the model has it.

**{PARTLY}** means that the model runs under the rules, but something of this doesn't hold, **{FAILED}** that it does
not run; the reason stands beside it. Relevance is summed over all embeddings, pixels, sound and learned tokens.
Numbers that a model's code adds, such as computed positions, count as biases. A row
says nothing about other attention implementations than the model's default one, or about other precisions:
`lxt check MODEL` tries your own model."""


def _anchor(title: str) -> str:
    kept = "".join(letter for letter in title.lower() if letter.isalnum() or letter in " -")
    return "-".join(kept.split())


def _table(records: Sequence[Record]) -> str:
    titles = ("type", "", "class", "logits", "conservation", "auditor", "checkpointing", "reason")
    rows = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for record in records:
        cells = (
            f"`{record.type}`",
            mark(record),
            record.architecture,
            _number(record.logits),
            _number(_worst(record.conservation)),
            _number(_worst(record.audit)),
            _number(record.checkpointing) if record.stage == "done" else "",
            _reason(record),
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def mark(record: Record) -> str:
    """The sign in the table."""
    if record.proven:
        return PROVEN
    return PARTLY if record.stage in ("audit", "checkpointing", "done") else FAILED


def _worst(numbers: dict[str, float]) -> float | None:
    name = largest(numbers)
    return None if name is None else numbers[name]


def _number(value: float | None) -> str:
    return "–" if value is None else "0" if value == 0 else f"{value:.0e}"


def _reason(record: Record) -> str:
    if record.proven:
        return ""
    reason = REASONS.get(record.key) or "; ".join(record.reasons())
    return " ".join(reason.replace("|", "\\|").replace("<", "&lt;").split())
