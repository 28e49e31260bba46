"""What neurons (or heads) stand for, as the pictures and the explorer take it: checked before anything is drawn."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from lxt.attribution import Attribution
    from lxt.neurons.results import Neurons

__all__ = ["Labels", "check", "labelled"]

Labels: TypeAlias = "Neurons | Mapping[tuple[int, int], str]"
"""What `lxt.neurons.load(folder)` gives, or (layer, neuron) -> what it stands for."""


def labelled(labels: Labels) -> str:
    """Which latent the labels are of: `neuron` or `head`."""
    return "neuron" if isinstance(labels, Mapping) else labels.latent


def check(labels: Labels | None, attribution: Attribution, what: str, latents: tuple[str, ...]) -> None:
    """Refuse what isn't labels of these latents; warn where they are of a model with another name.

    Args:
        labels: what the user gave.
        attribution: what it is shown with.
        what: the method that shows it.
        latents: of which it shows labels.

    Raises:
        TypeError: no labels, such as the name of their folder, or names that aren't of (layer, neuron).
        ValueError: labels of another latent.
    """
    if labels is None:
        return
    if isinstance(labels, (str, os.PathLike)):
        raise TypeError(f"labels= takes what lxt.neurons.load({os.fspath(labels)!r}) gives, not the folder's name")
    if isinstance(labels, Mapping):
        for key in labels:
            if not (isinstance(key, tuple) and list(map(type, key)) == [int, int]):
                raise TypeError(f"labels= maps (layer, neuron), such as (2, 17), to what it stands for; got {key!r}")
        return
    if not hasattr(labels, "manifest"):
        raise TypeError(f"labels= takes what lxt.neurons.load(folder) gives, or a dict, got {type(labels).__name__}")
    if labels.latent not in latents:
        raise ValueError(
            f"labels= are of {labels.latent}s, and {what} shows those of {' and '.join(latents)}s; give the folder of "
            f"`lxt label --latent {latents[0]}`" + ("; explore(path, labels=) shows both" if what != "explore" else "")
        )
    name = str(labels.manifest["settings"]["model_name"])
    if os.path.basename(name.rstrip("/")) != os.path.basename(attribution.model.rstrip("/")):
        warnings.warn(
            f"the labels are of {name!r} and the explanation is of {attribution.model!r}; if these are not the same "
            f"weights, the labels belong to other {labels.latent}s",
            stacklevel=4,
        )
