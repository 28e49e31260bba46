"""Upstream's patch maps of GPT-2."""

from dataclasses import replace

from lxt.composites import ATTN_LRP, CP_LRP
from lxt.patches.gpt2 import GPT2

__all__ = ["attnLRP", "cp_LRP"]

attnLRP = replace(GPT2, rules=ATTN_LRP)
cp_LRP = replace(GPT2, rules=CP_LRP)
