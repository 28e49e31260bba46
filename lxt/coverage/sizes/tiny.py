"""Tiny: what a type needs beyond the general shrinker to be built small, and to be run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

__all__ = ["Tiny"]


@dataclass(frozen=True)
class Tiny:
    """One type's entry.

    Attributes:
        config: fields of the tiny configuration; a mapping for a sub-configuration's fields.
        default: arguments without which the default configuration can't be made.
        inputs: (model) -> the forward's keyword arguments, in place of the task's, or added to them.
        prepare: (model) -> what must be done to the built model, as zeroing a buffer that is added somewhere.
        sources: names of parameters that are added to activations and so receive relevance: learned queries, tokens.
        weights: names of parameters to leave at the model's own initialisation.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    default: Mapping[str, Any] = field(default_factory=dict)
    inputs: Callable[[nn.Module], dict[str, Tensor | Any]] | None = None
    prepare: Callable[[nn.Module], None] | None = None
    sources: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
