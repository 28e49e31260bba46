"""Upstream's patch maps of Qwen3."""

from dataclasses import replace

from lxt.composites import ATTN_LRP, CP_LRP
from lxt.patches.llama import QWEN3

__all__ = ["attnLRP", "cp_LRP"]

attnLRP = replace(QWEN3, rules=ATTN_LRP)
cp_LRP = replace(QWEN3, rules=CP_LRP)
