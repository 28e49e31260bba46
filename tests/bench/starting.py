"""For cpu.py: what happens before the first attribution: `import lxt`, and patching a model."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

from timing import median_seconds

import lxt

__all__ = ["HEAVY", "import_seconds", "loaded_by_import", "patching_ms_per_100_modules"]

HEAVY = ("matplotlib", "numpy", "rich", "tokenizers", "torch", "transformers", "triton")


def import_seconds(statement: str, processes: int) -> tuple[float, float, float]:
    """Median, lowest and highest of fresh processes; of which one before has brought the files into memory."""
    code = f"import time; start = time.perf_counter()\n{statement}\nprint(time.perf_counter() - start)"  # clock inside

    def once() -> float:
        return float(_python(code))

    once()
    return median_seconds(once, processes)


def loaded_by_import() -> tuple[list[str], int]:
    """Which of HEAVY `import lxt` loads, and how many modules in all."""
    found = json.loads(
        _python(
            "import sys, json; before = set(sys.modules); import lxt; new = set(sys.modules) - before\n"
            f"print(json.dumps([sorted(set({HEAVY!r}) & new), len(new)]))"
        )
    )
    return found[0], found[1]


def patching_ms_per_100_modules(model: Any, rules: str, times: int) -> tuple[float, float, float]:
    """Milliseconds of `monkey_patch(model)`, and of nothing else; median, lowest, highest."""
    modules = sum(1 for _ in model.modules())

    def once() -> float:
        start = time.perf_counter()
        handle = lxt.monkey_patch(model, rules)
        seconds = time.perf_counter() - start
        handle.remove()
        return seconds * 1000 * 100 / modules

    once()
    return median_seconds(once, times)


def _python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
