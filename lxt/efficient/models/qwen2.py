"""Upstream's patch maps of Qwen2."""

from dataclasses import replace

from lxt.composites import ATTN_LRP, CP_LRP
from lxt.patches.llama import QWEN2

__all__ = ["attnLRP", "cp_LRP"]

attnLRP = replace(QWEN2, rules=ATTN_LRP)
cp_LRP = replace(QWEN2, rules=CP_LRP)
