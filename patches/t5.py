"""T5: RMSNorm without a cast, ReLU or gated MLP, relative position biases."""

from lxt.patches._forwards import rms_norm_forward
from lxt.patchmap import PatchMap

__all__ = ["T5"]

# wo may be kept in float32 while the rest is 16-bit; gated T5 MLPs therefore stay with the operator mode.
T5 = PatchMap(
    architectures=("t5",),
    forwards={"T5LayerNorm": rms_norm_forward("t5")},
    layers=("T5Block",),
    head="layer.0.SelfAttention.o",
)
