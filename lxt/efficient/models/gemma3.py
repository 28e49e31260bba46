"""Upstream's patch maps of Gemma 3."""

from dataclasses import replace

from lxt.composites import ATTN_LRP, CP_LRP
from lxt.patches.gemma import GEMMA3

__all__ = ["attnLRP", "cp_LRP"]

attnLRP = replace(GEMMA3, rules=ATTN_LRP)
cp_LRP = replace(GEMMA3, rules=CP_LRP)
