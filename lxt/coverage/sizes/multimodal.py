"""Tiny sizes of multimodal types."""

from __future__ import annotations

from lxt.coverage.sizes.tiny import Tiny

__all__ = ["MULTIMODAL"]

MULTIMODAL: dict[str, Tiny] = {}
