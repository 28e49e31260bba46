"""For cpu.py and gpu.py: the models that are timed, and the machine that they run on.

Weights are random: time and memory need no trained ones.
"""

from __future__ import annotations

import copy
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "GROUPED",
    "LLAMA_1B",
    "TINY",
    "WIDE",
    "Shape",
    "build",
    "config",
    "embeddings",
    "machine",
    "made_in",
    "shared_copy",
]


@dataclass(frozen=True)
class Shape:
    """Of a Llama; the width of a head is hidden / heads."""

    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    vocabulary: int = 32000


WIDE = Shape(layers=12, hidden=1024, mlp=2816, heads=16, kv_heads=16)
GROUPED = Shape(layers=2, hidden=1024, mlp=2816, heads=16, kv_heads=4)
LLAMA_1B = Shape(layers=16, hidden=2048, mlp=8192, heads=32, kv_heads=8, vocabulary=128256)
TINY = Shape(layers=1, hidden=64, mlp=176, heads=4, kv_heads=2, vocabulary=64)


def build(shape: Shape, dtype: torch.dtype) -> Any:
    """A Llama with frozen weights, made in `dtype` at once, so that building takes no more memory than the model."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    with made_in(dtype):
        model = LlamaForCausalLM(config(shape, max_position_embeddings=16384, tie_word_embeddings=True))
    return model.eval().requires_grad_(False)


def config(shape: Shape, **options: Any) -> Any:
    """A Llama's; `options` are further ones of LlamaConfig."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        bos_token_id=0,
        eos_token_id=1,
        **options,
    )


@contextmanager
def made_in(dtype: torch.dtype) -> Iterator[None]:
    """Meanwhile new tensors have that dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def shared_copy(model: Any) -> Any:
    """A model of its own with the same weights in memory."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def embeddings(model: Any, tokens: int) -> Tensor:
    """[1, token, hidden], of the size that the model's own have."""
    generator = torch.Generator().manual_seed(1)
    made = torch.randn(1, tokens, model.config.hidden_size, generator=generator)
    return (made * model.config.initializer_range).to(model.dtype)


def machine() -> dict[str, str | int]:
    """What the figures depend on; neither the machine's name nor its paths."""
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "processor": _processor(),
        "cores": len(affinity(0)) if affinity is not None else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
    }


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
