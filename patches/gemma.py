"""Gemma 2 and 3: RMSNorm with 1 + weight in float32, before and after each block."""

from lxt.patches._forwards import gated_mlp, rms_norm_forward
from lxt.patches._rotary import rotary_attention
from lxt.patchmap import PatchMap

__all__ = ["GEMMA2", "GEMMA3"]


def _gemma(prefix: str, *architectures: str) -> PatchMap:
    return PatchMap(
        architectures=architectures,
        forwards={
            f"{prefix}RMSNorm": rms_norm_forward("gemma", eps="eps"),
            f"{prefix}MLP": gated_mlp(),
            f"{prefix}Attention": rotary_attention,
        },
        layers=(f"{prefix}DecoderLayer",),
        head="self_attn.o_proj",
        neuron="mlp.down_proj",
    )


GEMMA2 = _gemma("Gemma2", "gemma2")
GEMMA3 = _gemma("Gemma3", "gemma3", "gemma3_text")
