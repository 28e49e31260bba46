"""Tiny sizes of text types."""

from __future__ import annotations

from lxt.coverage.sizes.tiny import Tiny

__all__ = ["TEXT"]

_SSM = {"hidden_size": 32, "expand": 2, "head_dim": 16, "num_heads": 4, "n_groups": 2, "chunk_size": 4}
_SHARED_KV = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
_PLAIN_DRAFT = {
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
    "num_kv_shared_layers": 2,
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
}

TEXT: dict[str, Tiny] = {
    "bailing_hybrid": Tiny(config={"n_group": 2, "topk_group": 1, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "bamba": Tiny(config={"num_hidden_layers": 2, "attn_layer_indices": [1], "mamba_n_groups": 2}),
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
    "gemma4_text": Tiny(config={"layer_types": _SHARED_KV, "num_hidden_layers": 4, "num_kv_shared_layers": 2}),
    "gpt_neo": Tiny(config={"attention_types": [[["global", "local"], 1]]}),
    "granitemoehybrid": Tiny(config={"layer_types": ["linear_attention", "full_attention"], "mamba_n_groups": 2}),
    "hunyuan_v1_dense": Tiny(config={"head_dim": 8, "num_key_value_heads": 2}),
    "hunyuan_v1_moe": Tiny(config={"head_dim": 8, "num_key_value_heads": 2, "num_experts": 4, "moe_topk": 2}),
    "lfm2_moe": Tiny(
        config={"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3, "num_dense_layers": 1}
    ),
    "longcat_flash": Tiny(config={"zero_expert_num": 2}),
    "mamba2": Tiny(config=_SSM),
    "ministral": Tiny(config={"head_dim": 8, "num_key_value_heads": 2}),
    "nemotron": Tiny(config={"num_key_value_heads": 2}),
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
