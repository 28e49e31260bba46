"""GPT-2: torch's LayerNorm and a plain MLP, which the operator mode takes as single operations."""

from lxt.patchmap import PatchMap

__all__ = ["GPT2"]

GPT2 = PatchMap(architectures=("gpt2",), layers=("GPT2Block",), head="attn.c_proj", neuron="mlp.c_proj")
