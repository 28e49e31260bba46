"""Upstream's patch maps of Llama."""

from dataclasses import replace

from lxt.composites import ATTN_LRP, CP_LRP
from lxt.patches.llama import LLAMA

__all__ = ["attnLRP", "cp_LRP"]

attnLRP = replace(LLAMA, rules=ATTN_LRP)
cp_LRP = replace(LLAMA, rules=CP_LRP)
