"""Why a subject isn't proven, where the measured numbers alone don't say it; each reason was verified."""

from __future__ import annotations

__all__ = ["REASONS"]

# "task/type" -> one sentence for the table
REASONS: dict[str, str] = {}
