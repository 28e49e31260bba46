"""Which model a results folder belongs to: a hash of its configuration and all its weights, wherever they lie."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor

from lxt.accelerate_hooks import loading_hooks

__all__ = ["model_fingerprint"]

_SAID = {"architectures", "dtype", "transformers_version"}  # of a configuration, what computes nothing by itself
_PIECE = 1 << 24  # numbers that are copied at a time


def model_fingerprint(model: Any) -> str:
    """Equal for models of one class with the same configuration and weights, in the same precision.

    Weights that stay on the disk are read once, one after the other.
    """
    digest = hashlib.sha256(type(model).__name__.encode())
    digest.update(json.dumps(_computing(model.config.to_dict()), sort_keys=True, default=repr).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
        found = _offloaded(model, name) if value.device.type == "meta" else value
        if not isinstance(found, Tensor):  # no weights anywhere, or a quantiser's own state: counts by its shape
            continue
        for piece in found.detach().to(value.dtype).reshape(-1).split(_PIECE):
            digest.update(piece.contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _computing(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _computing(v) for k, v in value.items() if k not in _SAID and not str(k).startswith("_")}
    return [_computing(one) for one in value] if isinstance(value, (list, tuple)) else value


def _offloaded(model: Any, name: str) -> Tensor | None:
    """The weight that accelerate's hooks put into the module when it runs."""
    path, _, own = name.rpartition(".")
    return next((hook.weights_map[own] for hook in loading_hooks(model.get_submodule(path))), None)
