"""torchvision and zennit for the tests: installed, or in `.venv/apart`, where .ci/venv puts them.

They lie apart because PyPI's torchvision is built for torch with CUDA. Beside a CPU build its compiled operators don't
load, which `import torchvision` does not survive, nor does transformers, which imports torchvision if it finds it. Its
models need none of these operators: the two that it insists on are then declared here, without an implementation.
Afterwards the packages are hidden again, lest transformers decides otherwise in a test that comes later.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

APART = Path(sys.prefix) / "apart"
NAMES = ("torchvision.models.vision_transformer", "zennit.rules")


def import_apart(name: str) -> ModuleType:
    """One of NAMES; skips the test where it is not installed."""
    modules = _modules()
    if name not in modules:
        pytest.skip(f"{name.partition('.')[0]} is neither installed nor in .venv/apart: `.ci/venv test` puts it there")
    return modules[name]


@functools.cache  # torch accepts torchvision's declarations once in a process
def _modules() -> dict[str, ModuleType]:
    installed = importlib.util.find_spec("torchvision") is not None
    sys.path.append(str(APART))
    try:
        names = [name for name in NAMES if importlib.util.find_spec(name.partition(".")[0])]
        try:
            return {name: importlib.import_module(name) for name in names}
        except RuntimeError as error:
            if "operator torchvision::nms does not exist" not in str(error):
                raise
        schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        torch.library.define("torchvision::nms", schema)
        torch.library.define("torchvision::qnms", schema)
        return {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(APART))
        if not installed:
            for name in [name for name in sys.modules if name.partition(".")[0] in ("torchvision", "zennit")]:
                del sys.modules[name]
