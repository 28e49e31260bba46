"""Numbers for a page: 16-bit integers with a scale for each series, in base64.

A series is what is compared with itself: a layer's tokens, a head's tokens. Its largest number gets ±32767, so that
every number is right to 1/65534 of the largest, in 2.7 bytes.
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["MISSING", "floats", "integers", "packed"]

MISSING = -32768  # what NaN becomes: not known, which is not 0
_LARGEST = 32767


def packed(series: Tensor) -> dict[str, Any]:
    """[series, number] as `{"shape", "scale", "data"}`; NaN is kept as not known."""
    values = series.detach().double()
    known = torch.nan_to_num(values, nan=0.0)
    most = known.abs().amax(-1, keepdim=True) if values.shape[1] else values.new_zeros(len(values), 1)
    # The scale as the page reads it: rounding it later would move every number.
    scale = torch.from_numpy(_as_read(most / _LARGEST)).double()
    steps = torch.where(scale > 0, known / scale.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    whole = steps.round().clamp(-_LARGEST, _LARGEST)
    whole = torch.where(values.isnan(), float(MISSING), whole).to(torch.int16)
    return {"shape": list(values.shape), "scale": floats(scale), "data": _text(whole.numpy(), "<i2")}


def floats(values: Tensor) -> dict[str, Any]:
    """Numbers as 32-bit floats; as 64-bit ones where a float64 model gives some that are beyond those."""
    numbers = _as_read(values)
    return {"bytes": numbers.itemsize, "data": _text(numbers, f"<f{numbers.itemsize}")}


def _as_read(values: Tensor) -> np.ndarray:
    sizes = values.detach().double().abs()
    narrow = torch.finfo(torch.float32)
    fits = (sizes == 0) | ((sizes >= narrow.tiny) & (sizes <= narrow.max))
    return values.detach().to(torch.float32 if bool(fits.all()) else torch.float64).numpy()


def integers(values: Tensor) -> dict[str, Any]:
    """Whole numbers from 0 on, in as few bytes as the largest needs."""
    size = 2 if not values.numel() or int(values.max()) < 2**16 else 4
    return {"bytes": size, "data": _text(values.detach().numpy(), f"<u{size}")}


def _text(values: np.ndarray, kind: str) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype=kind).tobytes()).decode()
