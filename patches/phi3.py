"""Phi-3: Llama's shape with gate and up in one projection."""

from lxt.patches._forwards import fused_gate_up_mlp, rms_norm_forward
from lxt.patches._rotary import rotary_attention
from lxt.patchmap import PatchMap

__all__ = ["PHI3"]

PHI3 = PatchMap(
    architectures=("phi3",),
    forwards={
        "Phi3RMSNorm": rms_norm_forward("llama"),
        "Phi3MLP": fused_gate_up_mlp,
        "Phi3Attention": rotary_attention,
    },
    layers=("Phi3DecoderLayer",),
    head="self_attn.o_proj",
    neuron="mlp.down_proj",
)
