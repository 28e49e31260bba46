"""Attention modules whose rotary embedding, a dozen operations in their modeling file, runs as one."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lxt.attention import SEEN_BY_THE_MODE
from lxt.composites import Composite
from lxt.mode import unwatched
from lxt.patches._forwards import rebound
from lxt.rules import rotary

__all__ = ["rotary_attention"]


def _fused(apply: Callable) -> Callable:
    """`apply_rotary_pos_emb` of a modeling file, in one operation where it does what lxt.rules.rotary does."""
    turns_all, turns_part = _is_half_turn(apply, 8), _is_half_turn(apply, 4)

    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        fits = not (args or kwargs) and cos.dim() == 3 and q.dim() == k.dim() == 4 and q.dtype == k.dtype == cos.dtype
        known = turns_all if cos.shape[-1] == q.shape[-1] else turns_part
        if fits and known and q.requires_grad and k.requires_grad:
            return _turned(q, cos, sin), _turned(k, cos, sin)
        return apply(q, k, cos, sin, *args, **kwargs)

    return apply_rotary_pos_emb


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """All of each head, or as much of its beginning as there are angles for."""
    size = cos.shape[-1]
    if size == x.shape[-1]:
        return unwatched(rotary, x, cos, sin)
    return torch.cat((unwatched(rotary, x[..., :size], cos, sin), x[..., size:]), -1)


@functools.cache
def _is_half_turn(apply: Callable, size: int) -> bool:
    """Whether the function turns pairs that lie half of `size` apart, in the first `size` numbers of a head of 8.

    It is tried, since modeling files write it in several ways, and some turn neighbours instead.
    """

    def numbers(first: float, last: float, *shape: int) -> Tensor:
        return torch.linspace(first, last, math.prod(shape), device="cpu", dtype=torch.float32).view(shape)

    q, k, angles = numbers(-2, 2, 1, 2, 4, 8), numbers(3, -1, 1, 1, 4, 8), numbers(0.1, 3, 1, 4, size)
    cos, sin = angles.cos(), angles.sin()
    try:
        with torch.no_grad():
            return all(
                torch.equal(found, _turned(x, cos, sin)) for x, found in zip((q, k), apply(q, k, cos, sin), strict=True)
            )
    except (RuntimeError, TypeError, ValueError):
        return False


_rebound = rebound(apply_rotary_pos_emb=_fused)


def rotary_attention(module: nn.Module, composite: Composite) -> Callable | None:
    """The attention's own forward with a fused rotary embedding.

    None under implementations that aren't torch operations: those have a forward of their own (lxt.interfaces).
    """
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
    return _rebound(module, composite) if implementation in SEEN_BY_THE_MODE else None
