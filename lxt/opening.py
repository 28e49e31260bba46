"""lxt.load: an Attributor for a model by its name, its folder or itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lxt.attributor import Attributor
from lxt.composites import Composite, resolve
from lxt.fitting import Choice, checked
from lxt.loading import budget_of, device_of, dtype_of, model_of, processor_of

__all__ = ["load"]


def load(
    name_or_model: str | Path | nn.Module,
    tokenizer: Any = None,
    rules: str | Composite = "attnlrp",
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    memory: str | int | None = None,
    gpu_memory: str | int | None = None,
    offload_folder: str | Path | None = None,
    checkpoint: Choice | None = None,
) -> Attributor:
    """An Attributor for a model by name, folder or instance.

    >>> lxt.load("tiny").attribute("My cats love to play with my")  # doctest: +SKIP

    Args:
        name_or_model: "tiny" (bundled), a folder, a name on the hub, or a model instance, which is not copied.
        tokenizer: the tokenizer, or for models that see the processor; or its name. None is the model's own, and none
            at all for an instance.
        rules: a preset's name, or a Composite.
        device: where to put the model. None is a GPU if there is one, and leaves an instance where it is.
        dtype: as torch.dtype or its name. None is the checkpoint's own.
        memory: how much this process may take, such as "4GiB", or in bytes. The weights that leave no room to compute
            stay on disk and are read while they are needed; needs accelerate.
        gpu_memory: the same of the GPU. None is what it has left, if `memory` is given.
        offload_folder: where weights may be written, until the model is gone, that are stored in another form than
            the model has: experts one by one, or files that aren't safetensors.
        checkpoint: as in Attributor.

    Raises:
        ValueError: no such model, rules, dtype or checkpoint; a model that lxt cannot explain, or not in so little
            memory.
        OSError: the offload folder's disk is too small.
    """
    composite = resolve(rules)
    checked(checkpoint, None)
    kind = dtype_of(dtype)
    place = device_of(device)
    budget = budget_of(memory, gpu_memory, offload_folder, place)
    if isinstance(name_or_model, nn.Module):
        if gpu_memory is not None or offload_folder is not None:
            raise ValueError(
                "gpu_memory and offload_folder are for loading, and a model instance is where it is; load it by name, "
                "or give memory alone, within which it is then explained"
            )
        model = name_or_model
        if device is not None or kind is not None:
            model = model.to(device=place if device is not None else None, dtype=kind)
        given = processor_of(tokenizer, model) if isinstance(tokenizer, (str, Path)) else tokenizer
        return Attributor(model, given, composite, checkpoint=checkpoint, memory=memory)
    if not isinstance(name_or_model, (str, Path)):
        raise TypeError(f"lxt.load takes a name, a folder or a model instance, got {type(name_or_model).__name__}")
    name = str(name_or_model)
    if name == "tiny":
        from lxt import tiny

        name = str(tiny.path())
    model = model_of(name, kind, budget, offload_folder).eval()
    if place is not None and budget is None:
        model = model.to(place)
    if tokenizer is None or isinstance(tokenizer, (str, Path)):
        tokenizer = processor_of(name if tokenizer is None else tokenizer, model)
    attributor = Attributor(model, tokenizer, composite, checkpoint=checkpoint, memory=memory)
    if str(name_or_model) == "tiny":
        model.config.name_or_path = "tiny"
    return attributor
