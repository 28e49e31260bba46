"""Llama and the decoders of its shape: RMSNorm, rotary attention, gated MLP."""

from lxt.patches._forwards import gated_mlp, rms_norm_forward
from lxt.patches._layers import pre_norm_layer
from lxt.patches._rotary import rotary_attention
from lxt.patchmap import PatchMap

__all__ = ["LLAMA", "MISTRAL", "QWEN2", "QWEN3", "llama_like"]


def llama_like(prefix: str, *architectures: str) -> PatchMap:
    """The map of an architecture whose classes are <prefix>RMSNorm, <prefix>MLP, <prefix>Attention and
    <prefix>DecoderLayer.
    """
    return PatchMap(
        architectures=architectures,
        forwards={
            f"{prefix}RMSNorm": rms_norm_forward("llama"),
            f"{prefix}MLP": gated_mlp(),
            f"{prefix}Attention": rotary_attention,
            f"{prefix}DecoderLayer": pre_norm_layer("llama"),
        },
        layers=(f"{prefix}DecoderLayer",),
        head="self_attn.o_proj",
        neuron="mlp.down_proj",
    )


LLAMA = llama_like("Llama", "llama")
MISTRAL = llama_like("Mistral", "mistral")
QWEN2 = llama_like("Qwen2", "qwen2")
QWEN3 = llama_like("Qwen3", "qwen3")
