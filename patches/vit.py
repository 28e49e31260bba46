"""ViT: torch's LayerNorm and a GELU MLP over image patches."""

from lxt.patchmap import PatchMap

__all__ = ["VIT"]

VIT = PatchMap(architectures=("vit",), layers=("ViTLayer",), head="attention.o_proj", neuron="mlp.fc2")
