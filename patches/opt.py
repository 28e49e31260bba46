"""OPT: learned positions, LayerNorm, ReLU MLP."""

from lxt.patchmap import PatchMap

__all__ = ["OPT"]

OPT = PatchMap(architectures=("opt",), layers=("OPTDecoderLayer",), head="self_attn.out_proj", neuron="fc2")
