"""RecurrentGemma: gates that steer a linear recurrence, one of them with a square root of its own."""

from lxt.patchmap import PatchMap

__all__ = ["RECURRENT_GEMMA"]

# The root of 1 - a^2, a an exponential: a constant to every rule but the plain gradient, which it clips.
RECURRENT_GEMMA = PatchMap(
    architectures=("recurrent_gemma",),
    layers=("RecurrentGemmaDecoderLayer",),
    operations={"SqrtBoundDerivative": "linear"},
)
