"""For gpu.py: upstream's lxt 2.1 beside ours in one process, on transformers 5.

Upstream patches transformers' classes for good, so it is given copies of them: the module loaded a second time.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["patched_by_upstream"]


class _Table(dict):
    """What upstream 2.1 makes of the attention table, a plain dict, with the method that transformers 5 calls."""

    def get_interface(self, name: str, default: Callable) -> Callable:
        return self.get(name, default)


def patched_by_upstream(model: Any, rules: str, path: str) -> Any:
    """The model, its classes exchanged for copies of transformers' own that upstream has patched.

    Args:
        model: a Llama, which is changed.
        rules: "attnlrp" or "cp".
        path: the folder that holds upstream's `lxt`.

    Raises:
        ImportError: no upstream there, or one that can't be imported.
    """
    patches = _upstream_patches(path)
    module: Any = _copied_module(rules)
    module.ALL_ATTENTION_FUNCTIONS = _Table(module.ALL_ATTENTION_FUNCTIONS.items())
    gated, attend = (
        (patches.gated_mlp_forward, patches.patch_attention)
        if rules == "attnlrp"
        else (patches.cp_gated_mlp_forward, patches.patch_cp_attention)
    )
    done = (
        patches.patch_method(gated, module.LlamaMLP),
        patches.patch_method(patches.rms_norm_forward, module.LlamaRMSNorm),
        attend(module),
    )
    if not all(done):
        raise RuntimeError(f"upstream patched {done} of Llama's MLP, norm and attention")
    module.ALL_ATTENTION_FUNCTIONS = _Table(module.ALL_ATTENTION_FUNCTIONS)
    for part in model.modules():
        if type(part).__module__ == "transformers.models.llama.modeling_llama":
            part.__class__ = getattr(module, type(part).__name__)
    return model


def _copied_module(rules: str) -> ModuleType:
    from transformers.models.llama import modeling_llama

    name = f"transformers.models.llama.modeling_llama_{rules}"
    spec = importlib.util.spec_from_file_location(name, modeling_llama.__file__)
    if spec is None or spec.loader is None:
        raise ImportError(f"{modeling_llama.__file__} can't be loaded a second time")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _upstream_patches(path: str) -> ModuleType:
    """Upstream's lxt.efficient.patches. It is called lxt as we are, so it is imported while we are out of the way.

    Its packages are stood in for: their own code imports its map of BERT, which fails with transformers 5.
    """
    folder = Path(path) / "lxt"
    if not (folder / "efficient" / "patches.py").exists():
        raise ImportError(f"UPSTREAM_LXT={path}, where no lxt/efficient/patches.py lies")

    def ours() -> list[str]:
        return [name for name in sys.modules if name == "lxt" or name.startswith("lxt.")]

    kept = {name: sys.modules.pop(name) for name in ours()}
    try:
        for name, place in (("lxt", folder), ("lxt.efficient", folder / "efficient")):
            sys.modules[name] = ModuleType(name)
            sys.modules[name].__path__ = [str(place)]
        return importlib.import_module("lxt.efficient.patches")
    finally:
        for name in ours():
            del sys.modules[name]
        sys.modules.update(kept)
