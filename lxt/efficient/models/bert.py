"""Upstream's patch maps of BERT."""

from dataclasses import replace

from lxt.composites import ATTN_LRP, CP_LRP
from lxt.patches.bert import BERT

__all__ = ["attnLRP", "cp_LRP"]

attnLRP = replace(BERT, rules=ATTN_LRP)
cp_LRP = replace(BERT, rules=CP_LRP)
