"""Patch maps: what lxt knows about each architecture beyond what the operator mode finds out by itself.

One small file per family; a new family is a new file and one name in `MAPS`.
"""

if __name__ != "lxt.patches":
    raise ImportError("these are lxt's patch maps: import them as lxt.patches")

from torch import nn

from lxt.patches._experts import gated_experts, has_gated_experts
from lxt.patches._forwards import activation_fence
from lxt.patches.bert import BERT, ROBERTA
from lxt.patches.gemma import GEMMA2, GEMMA3
from lxt.patches.gpt2 import GPT2
from lxt.patches.gpt_neox import GPT_NEOX
from lxt.patches.hrm_text import HRM_TEXT
from lxt.patches.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from lxt.patches.opt import OPT
from lxt.patches.phi3 import PHI3
from lxt.patches.qwen3_moe import QWEN3_MOE
from lxt.patches.recurrent_gemma import RECURRENT_GEMMA
from lxt.patches.reformer import REFORMER
from lxt.patches.sew_d import SEW_D
from lxt.patches.t5 import T5
from lxt.patches.vit import VIT
from lxt.patches.xlnet import XLNET
from lxt.patches.yoso import YOSO
from lxt.patchmap import ForwardFactory, PatchMap

__all__ = ["MAPS", "fence_for", "patch_map_for"]

MAPS: tuple[PatchMap, ...] = (
    BERT, GEMMA2, GEMMA3, GPT2, GPT_NEOX, HRM_TEXT, LLAMA, MISTRAL, OPT, PHI3, QWEN2, QWEN3, QWEN3_MOE,
    RECURRENT_GEMMA, REFORMER, ROBERTA, SEW_D, T5, VIT, XLNET, YOSO,
)  # fmt: skip
_BY_ARCHITECTURE = {architecture: patch_map for patch_map in MAPS for architecture in patch_map.architectures}


def patch_map_for(model: nn.Module) -> PatchMap:
    """The map of the model's architecture, by `config.model_type`; an empty map where there is none.

    An architecture without a map works through the operator mode alone.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return _BY_ARCHITECTURE.get(model_type or "", PatchMap())


def fence_for(module: nn.Module) -> ForwardFactory | None:
    """What transformers' own modules get in every architecture.

    Activations are often written as several operations, and get the identity rule as one; experts get a fused gate.
    """
    if not type(module).__module__.startswith("transformers."):
        return None
    return gated_experts if has_gated_experts(module) else activation_fence
