"""lxt explains transformer models by layer-wise relevance propagation: one forward, one backward.

>>> import lxt
>>> explainer = lxt.load("tiny")
>>> explainer.attribute("I have 5 cats and 3 dogs. My cats love to play with my").show()  # doctest: +SKIP

The names below are loaded when they are first used, so that `import lxt` stays cheap: it takes neither torch nor
transformers with it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lxt import audit, neurons, steering
    from lxt.attribution import Attribution
    from lxt.attributor import Attributor
    from lxt.composites import ATTN_LRP, CP_LRP, GRADIENT, Composite, Epsilon, Gamma
    from lxt.declaring import declare
    from lxt.latents import Features, Keep
    from lxt.mode import UnknownOperation
    from lxt.opening import load
    from lxt.patching import PatchHandle, monkey_patch
    from lxt.patchmap import PatchMap
    from lxt.qkrelevance import AttentionRelevance
    from lxt.sentences import Similarity, similarity
    from lxt.steps import Steps
    from lxt.targets import Target

__all__ = [
    "ATTN_LRP",
    "CP_LRP",
    "GRADIENT",
    "AttentionRelevance",
    "Attribution",
    "Attributor",
    "Composite",
    "Epsilon",
    "Features",
    "Gamma",
    "Keep",
    "PatchHandle",
    "PatchMap",
    "Similarity",
    "Steps",
    "Target",
    "UnknownOperation",
    "audit",
    "declare",
    "load",
    "monkey_patch",
    "neurons",
    "similarity",
    "steering",
]

__version__ = "3.0.0.dev0"

_HOME = {
    "ATTN_LRP": "lxt.composites",
    "AttentionRelevance": "lxt.qkrelevance",
    "Attribution": "lxt.attribution",
    "Attributor": "lxt.attributor",
    "CP_LRP": "lxt.composites",
    "Composite": "lxt.composites",
    "Epsilon": "lxt.composites",
    "Features": "lxt.latents",
    "GRADIENT": "lxt.composites",
    "Gamma": "lxt.composites",
    "Keep": "lxt.latents",
    "PatchHandle": "lxt.patching",
    "PatchMap": "lxt.patchmap",
    "Similarity": "lxt.sentences",
    "Steps": "lxt.steps",
    "Target": "lxt.targets",
    "UnknownOperation": "lxt.mode",
    "declare": "lxt.declaring",
    "load": "lxt.opening",
    "monkey_patch": "lxt.patching",
    "similarity": "lxt.sentences",
}


def __getattr__(name: str) -> object:
    if name in ("audit", "neurons", "steering"):
        return import_module(f"lxt.{name}")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'lxt' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
