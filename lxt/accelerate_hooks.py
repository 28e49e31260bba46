"""accelerate's hooks on a module, as far as lxt looks at them: which bring its weights, and where it computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["computing_device", "loading_hooks"]


def loading_hooks(module: nn.Module) -> list[Any]:
    """Those that bring weights when the module runs; none for a module that has its weights."""
    return [hook for hook in _hooks(module) if getattr(hook, "offload", False)]


def computing_device(module: nn.Module) -> torch.device:
    """Where accelerate has the module compute; the CPU where it says nothing."""
    places = (getattr(hook, "execution_device", None) for hook in _hooks(module))
    return torch.device(next((place for place in places if place is not None), "cpu"))  # 0 is a GPU's number


def _hooks(module: nn.Module) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else [*getattr(hook, "hooks", (hook,))]
