"""GPT-NeoX (Pythia): parallel attention and MLP on torch's LayerNorm."""

from lxt.patches._rotary import rotary_attention
from lxt.patchmap import PatchMap

__all__ = ["GPT_NEOX"]

GPT_NEOX = PatchMap(
    architectures=("gpt_neox",),
    forwards={"GPTNeoXAttention": rotary_attention},
    layers=("GPTNeoXLayer",),
    head="attention.dense",
    neuron="mlp.dense_4h_to_h",
)
