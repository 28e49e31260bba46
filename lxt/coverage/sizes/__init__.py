"""What single types need beyond the general shrinker: one table per field of use."""

from __future__ import annotations

from lxt.coverage.sizes.encoders import ENCODERS
from lxt.coverage.sizes.grids import GRIDS
from lxt.coverage.sizes.listening import LISTENING
from lxt.coverage.sizes.multimodal import MULTIMODAL
from lxt.coverage.sizes.seq2seq import SEQ2SEQ
from lxt.coverage.sizes.speech import SPEECH
from lxt.coverage.sizes.text import TEXT
from lxt.coverage.sizes.tiny import Tiny
from lxt.coverage.sizes.vision import VISION

__all__ = ["Tiny", "tiny_of"]

_TINY = TEXT | ENCODERS | SEQ2SEQ | LISTENING | SPEECH | VISION | MULTIMODAL | GRIDS


def tiny_of(model_type: str, task: str = "") -> Tiny:
    """The entry of a type, `task/type` before `type`; an empty one where there is none."""
    return _TINY.get(f"{task}/{model_type}") or _TINY.get(model_type) or Tiny()
