"""Write a checkpoint of random weights in 5 GB shards, one tensor at a time."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

SHARD = 5 * 10**9  # bytes, as save_pretrained cuts them
POOL = 2**26  # values; tensors take theirs from it, each from another place
NAMES = {torch.bfloat16: "BF16", torch.float32: "F32"}
Shapes = dict[str, tuple[int, ...]]


def llama_shapes(config: dict) -> Shapes:
    """The tensors of a Llama checkpoint; with `num_local_experts`, of a Mixtral one."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = hidden // config["num_attention_heads"]
    keys = head * config["num_key_value_heads"]
    shapes: Shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        start = f"model.layers.{layer}"
        shapes[f"{start}.input_layernorm.weight"] = (hidden,)
        shapes[f"{start}.self_attn.q_proj.weight"] = (hidden, hidden)
        shapes[f"{start}.self_attn.k_proj.weight"] = (keys, hidden)
        shapes[f"{start}.self_attn.v_proj.weight"] = (keys, hidden)
        shapes[f"{start}.self_attn.o_proj.weight"] = (hidden, hidden)
        shapes[f"{start}.post_attention_layernorm.weight"] = (hidden,)
        if "num_local_experts" in config:
            shapes[f"{start}.block_sparse_moe.gate.weight"] = (config["num_local_experts"], hidden)
            for expert in range(config["num_local_experts"]):
                within = f"{start}.block_sparse_moe.experts.{expert}"
                shapes[f"{within}.w1.weight"] = shapes[f"{within}.w3.weight"] = (inner, hidden)
                shapes[f"{within}.w2.weight"] = (hidden, inner)
            continue
        shapes[f"{start}.mlp.gate_proj.weight"] = shapes[f"{start}.mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{start}.mlp.down_proj.weight"] = (hidden, inner)
    shapes["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def write(folder: Path, config: dict, dtype: torch.dtype = torch.bfloat16) -> int:
    """Write the checkpoint and leave nothing of it in the page cache; returns its bytes."""
    folder.mkdir(parents=True)
    shapes = llama_shapes(config)
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)
    size = torch.empty(0, dtype=dtype).element_size()
    shards: list[Shapes] = [{}]
    taken = 0
    for name, shape in shapes.items():
        count = math.prod(shape) * size
        if taken + count > SHARD:
            shards.append({})
            taken = 0
        shards[-1][name] = shape
        taken += count
    total, weight_map, offset = 0, {}, 0
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        header, begin = {}, 0
        for name, shape in shard.items():
            end = begin + math.prod(shape) * size
            header[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
            weight_map[name], begin = file, end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as opened:
            opened.write(len(text).to_bytes(8, "little") + text)
            for shape in shard.values():
                offset = (offset + 7919) % POOL
                for piece in _values(pool, math.prod(shape), offset, norm=len(shape) == 1):
                    opened.write(piece.view(torch.uint8).numpy())
            opened.flush()
            os.fsync(opened.fileno())
        total += begin
        forget(folder / file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return total


def first_layers(folder: Path, of: Path, layers: int) -> None:
    """A model of the first layers of another, in the same files."""
    folder.mkdir()
    for file in of.iterdir():
        if file.name == "config.json":
            config = json.loads(file.read_text()) | {"num_hidden_layers": layers}
            (folder / file.name).write_text(json.dumps(config))
        else:
            (folder / file.name).symlink_to(file)


def forget(file: Path) -> None:
    """Drop the file from the page cache: whoever reads it next reads the disk, and is charged for the memory."""
    with file.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _values(pool: Tensor, count: int, offset: int, norm: bool) -> Iterator[Tensor]:
    if norm:
        yield torch.ones(count, dtype=pool.dtype)
        return
    while count:
        piece = pool[offset : offset + count]
        yield piece
        count, offset = count - len(piece), 0
