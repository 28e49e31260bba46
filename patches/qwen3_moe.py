"""Qwen3-MoE: Llama's shape with experts; their products and the router go through the operator mode."""

from dataclasses import replace

from lxt.patches.llama import llama_like

__all__ = ["QWEN3_MOE"]

# Experts hold their weights stacked, so there is no down projection whose input would be the neurons.
QWEN3_MOE = replace(llama_like("Qwen3Moe", "qwen3_moe"), neuron=None)
