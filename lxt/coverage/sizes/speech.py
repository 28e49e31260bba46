"""Tiny sizes of speech types."""

from __future__ import annotations

from lxt.coverage.sizes.tiny import Tiny

__all__ = ["SPEECH"]

SPEECH: dict[str, Tiny] = {}
