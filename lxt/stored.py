"""What a checkpoint's files hold, by the names that the model has for it: read from headers, no weight is touched."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["Header", "Stored", "read_header", "stored_weights"]

# https://huggingface.co/docs/safetensors: the names of its types
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """A checkpoint.

    Attributes:
        in_place: parameter -> the dtype it is stored in, for those that safetensors files hold as the model has them.
            Others are put together from several tensors, or lie in files of another kind.
    """

    in_place: Mapping[str, torch.dtype | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Header:
    """The beginning of a safetensors file.

    Attributes:
        start: where the tensors' bytes begin.
        tensors: name -> dtype, shape and data_offsets, counted from `start`.
    """

    start: int
    tensors: Mapping[str, Mapping[str, Any]]


def read_header(file: str | Path) -> Header:
    """The header of a safetensors file.

    Raises:
        ValueError: it is none, as a pointer of Git LFS to one.
    """
    size = Path(file).stat().st_size
    with Path(file).open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if not 0 < length <= size - 8:
            raise ValueError(f"{file} is no safetensors file, or only a part of one")
        tensors = json.loads(opened.read(length))
    tensors.pop("__metadata__", None)
    return Header(8 + length, tensors)


def stored_weights(name: str, empty: nn.Module) -> Stored:
    """What the checkpoint of that name holds.

    Args:
        name: a folder, or a name on the hub, whose files are fetched.
        empty: the model on the meta device.
    """
    files = _safetensors(name)
    headers = {key: tensor for file in files for key, tensor in read_header(file).tensors.items()}
    known = _names_in_model(empty, headers)
    tied: Mapping[str, str] = getattr(empty, "all_tied_weights_keys", None) or {}
    dtypes = {target: DTYPES.get(headers[source]["dtype"]) for target, source in known.items()}
    return Stored(dtypes | {target: dtypes[source] for target, source in tied.items() if source in dtypes})


def _safetensors(name: str) -> list[str]:
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
    from transformers.utils.hub import cached_file

    missing: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False}
    index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, **missing)
    if index is not None:
        shards = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
        return [file for shard in shards if (file := cached_file(name, shard)) is not None]
    one = cached_file(name, SAFE_WEIGHTS_NAME, **missing)
    return [] if one is None else [one]


def _names_in_model(empty: Any, headers: Mapping[str, Any]) -> dict[str, str]:
    """Parameter -> the tensor that is it, by transformers' own renaming, but for what it puts together."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(empty)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    own = empty.state_dict()
    found = {}
    for source in headers:
        target, converted = rename_source_key(source, renamings, converters, empty.base_model_prefix, own)
        if target not in own and source in own:
            target, converted = source, None
        if target in own and converted is None:
            found[target] = source
    return found
