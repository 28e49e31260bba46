"""Upstream's patch maps of Qwen3-MoE."""

from dataclasses import replace

from lxt.composites import ATTN_LRP, CP_LRP
from lxt.patches.qwen3_moe import QWEN3_MOE

__all__ = ["attnLRP", "cp_LRP"]

attnLRP = replace(QWEN3_MOE, rules=ATTN_LRP)
cp_LRP = replace(QWEN3_MOE, rules=CP_LRP)
