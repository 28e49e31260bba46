"""Tiny sizes of text types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lxt.coverage.sizes.tiny import Tiny

__all__ = ["TEXT"]

_SSM = {"hidden_size": 32, "expand": 2, "head_dim": 16, "num_heads": 4, "n_groups": 2, "chunk_size": 4}
_SHARED_KV = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
_AXES = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
_BYTES = {"vocab_size": 260}
_DRAFT = {
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
    "num_kv_shared_layers": 2,
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_key_value_heads": 2,
    "num_attention_heads": 4,
}


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _drafting(model: nn.Module) -> dict[str, Any]:
    """A draft model's inputs: states of the large model, and its keys and values of each kind of layer."""
    config: Any = model.config
    text = config.get_text_config()
    layers = [text.per_layer_config[kind] for kind in ("sliding_attention", "full_attention")]
    cached = {
        kind: tuple(_normal(seed + 10 * index, 1, layer.num_key_value_heads, length, layer.head_dim) for seed in (3, 4))
        for index, (kind, layer, length) in enumerate(
            zip(("sliding_attention", "full_attention"), layers, (4, 7), strict=True)
        )
    }
    return {
        "input_ids": None,
        "inputs_embeds": _normal(2, 1, 3, 2 * config.backbone_hidden_size),
        "shared_kv_states": cached,
        "position_ids": torch.arange(7, 10)[None],
    }


def _codes(model: nn.Module) -> dict[str, Any]:
    """Four codebooks of sound tokens, and the states of a prompt."""
    config: Any = model.config
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": torch.randint(8, 72, (config.num_codebooks, 9), generator=generator),
        "encoder_hidden_states": _normal(2, 1, 5, config.hidden_size),
    }


def _without_positions(name: str) -> Callable[[nn.Module], None]:
    """Zeroes a buffer of sinusoids, which is added to the embeddings and would take a share that no source gets."""

    def prepare(model: nn.Module) -> None:
        for path, buffer in model.named_buffers():
            if path.endswith(name):
                buffer.zero_()

    return prepare


# Types whose other task has inputs of its own; as causal models they get text alone.
_TEXT_ALONE = "dots3_note emu3 gemma3n gemma4 gemma4_unified llama4 qwen3_5 qwen3_5_moe qwen4_exp".split()

TEXT: dict[str, Tiny] = {
    **{f"causal/{name}": Tiny() for name in _TEXT_ALONE},
    "bailing_hybrid": Tiny(config={"n_group": 2, "topk_group": 1, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "bamba": Tiny(config={"num_hidden_layers": 2, "attn_layer_indices": [1], "mamba_n_groups": 2}),
    "blt": Tiny(
        config={
            **_BYTES,
            "encoder_hash_byte_group_vocab": 50,
            "encoder_hash_byte_group_size": [2, 3],
            "patcher_config": {**_BYTES, "intermediate_size": 40},
            "encoder_config": {**_BYTES, "hidden_size_global": 64, "intermediate_size": 40},
            "decoder_config": {**_BYTES, "hidden_size_global": 64, "intermediate_size": 40},
            "global_config": {"hidden_size": 64, "head_dim": 16, "intermediate_size": 40},
        }
    ),
    "causal/musicgen": Tiny(inputs=_codes),
    "causal/musicgen_melody": Tiny(inputs=_codes),
    "cohere_compass_text": Tiny(
        config={
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {"sliding_attention": _AXES, "full_attention": _AXES},
        }
    ),
    "ctrl": Tiny(prepare=_without_positions("pos_encoding")),
    "dbrx": Tiny(
        config={"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}, "ffn_config": {"moe_top_k": 2}}
    ),
    "deepseek_v2": Tiny(config={"num_experts_per_tok": 2, "num_hidden_layers": 2, "first_k_dense_replace": 1}),
    "dots1": Tiny(
        config={"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1}
    ),
    "dots3_note_text": Tiny(
        config={
            "layer_types": ["indexed_attention", "indexed_attention", "sliding_attention"],
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "num_hidden_layers": 3,
            "head_dim": 16,
            "shared_experts_intermediate_size": 24,
            **{f"swa_{name}": 4 for name in ("num_attention_heads", "num_key_value_heads")},
            **{f"swa_{name}": 8 for name in ("qk_nope_head_dim", "v_head_dim")},
            **{f"swa_{name}": 16 for name in ("q_lora_rank", "kv_lora_rank", "head_dim")},
        }
    ),
    "falcon_h1": Tiny(config={"mamba_n_groups": 2}),
    "gemma3n_text": Tiny(
        config={
            "layer_types": _SHARED_KV,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "intermediate_size": 40,
            "activation_sparsity_pattern": [0.5, 0.0, 0.5, 0.0],
        }
    ),
    "gemma4_assistant": Tiny(
        default={"text_config": _DRAFT}, config={"text_config": _DRAFT, "backbone_hidden_size": 24}, inputs=_drafting
    ),
    "gemma4_text": Tiny(config={"layer_types": _SHARED_KV, "num_hidden_layers": 4, "num_kv_shared_layers": 2}),
    "gemma4_unified_assistant": Tiny(
        default={"text_config": _DRAFT}, config={"text_config": _DRAFT, "backbone_hidden_size": 24}, inputs=_drafting
    ),
    "gpt_neo": Tiny(config={"attention_types": [[["global", "local"], 1]]}),
    "granitemoehybrid": Tiny(config={"layer_types": ["linear_attention", "full_attention"], "mamba_n_groups": 2}),
    # patched, all cycles have gradients whatever is configured; for the auditor, who patches nothing, so they must here
    "hrm_text": Tiny(config={"L_bp_cycles": [3, 3]}, sources=("z_L_init",)),
    "hunyuan_v1_dense": Tiny(config={"head_dim": 8, "num_key_value_heads": 2}),
    "hunyuan_v1_moe": Tiny(config={"head_dim": 8, "num_key_value_heads": 2, "num_experts": 4, "moe_topk": 2}),
    # the taps' constant part is a bias among weights that depend on the input
    "inkling2_text": Tiny(sources=("static_weight",)),
    "lfm2_moe": Tiny(
        config={"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3, "num_dense_layers": 1}
    ),
    "longcat_flash": Tiny(config={"zero_expert_num": 2}),
    "mamba2": Tiny(config=_SSM),
    "ministral": Tiny(config={"head_dim": 8, "num_key_value_heads": 2}),
    "mistral4": Tiny(config={"head_dim": 16}),  # without and with rotation, which the class adds up
    "nemotron": Tiny(config={"num_key_value_heads": 2}),
    "qwen4_exp_text": Tiny(
        config={
            "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
            "num_hidden_layers": 3,
            "ple_layer_ids": [3],
            "ple_embed_dim": 16,
            "ngram_size": 3,
            "heads_per_ngram": 2,
            "ngram_vocab_size_base": 50,
            "make_ngram_vocab_size_divisible_by": 2,
            "split_ngram_parts": 2,
            "hc_count": 2,
            "hc_lowrank": 8,
            "eos_token_id": 3,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 4,
            "indexer_compress_ratio": 2,
        }
    ),
    "zamba": Tiny(
        config={
            "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
            "num_hidden_layers": 4,
            "attention_head_dim": 16,
            "attention_hidden_size": 64,
        }
    ),
    "zaya": Tiny(
        config={
            "num_experts_per_tok": 1,
            "router_hidden_size": 16,
            "sliding_window": 4,
            "num_hidden_layers": 3,
            "layer_types": ["hybrid", "hybrid_sliding", "hybrid"],
        },
    ),
}
