"""Upstream's patch map of torchvision's vision transformers: AttnLRP, with the softmax of attention constant."""

from lxt.composites import ATTN_LRP
from lxt.patchmap import PatchMap

__all__ = ["MODULE", "cp_LRP"]

MODULE = "torchvision.models.vision_transformer"
cp_LRP = PatchMap(rules=ATTN_LRP.but(attention="value_only", name="attnlrp, value only"))
