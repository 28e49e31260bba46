"""Why a subject isn't proven, where the measured numbers alone don't say it; each reason was verified."""

from __future__ import annotations

__all__ = ["REASONS"]

_TIMM = "its vision tower needs timm, and timm torchvision, which doesn't import beside a CPU build of torch; not tried"
_ASSISTANT = (
    "transformers 5.23 can't build it: the configuration asks for all layers to share keys and values, and the model "
    "refuses a configuration in which no layer makes them"
)
_MRA = (
    "its attention is a CUDA kernel from the hub, without which transformers returns zeros; with it, the kernel's "
    "autograd function is refused"
)

# "task/type" -> one sentence for the table
REASONS: dict[str, str] = {
    "causal/gemma3n": _TIMM,
    "causal/gemma4_assistant": _ASSISTANT,
    "causal/gemma4_unified_assistant": "its default configuration fails as gemma4_assistant's does; no other was tried",
    "masked/mra": _MRA,
    "sequence/mra": _MRA,
    "sequence/layoutlmv2": "its visual backbone needs detectron2, which is on no package index; not tried",
    "image/dinat": (
        "it calls natten2dqkrpb and natten2dav, which the natten that can be installed (0.21) no longer has; not tried"
    ),
    "image/timm_wrapper": _TIMM.replace("its vision tower", "it"),
    "image-text/fast_vlm": _TIMM,
    "image-text/gemma3n": _TIMM,
    "image-text/perception_lm": _TIMM,
    "image-text/ovis2": (
        "image tokens are a softmax over a visual vocabulary times a table, so relevance ends there with the softmax "
        "stopped; logits, auditor and checkpointing agree"
    ),
}
