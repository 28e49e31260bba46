"""Tiny sizes of seq2seq types."""

from __future__ import annotations

from lxt.coverage.sizes.tiny import Tiny

__all__ = ["SEQ2SEQ"]

SEQ2SEQ: dict[str, Tiny] = {}
