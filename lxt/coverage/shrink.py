"""Tiny configurations: the default one of a type, with every width, depth and table made small.

1. Fields are known by their names (`FIELDS`); ids of special tokens move to the top of the small vocabulary, each to
   an id of its own; sub-configurations are shrunk likewise.
2. A model with layers of several kinds keeps one of each, in their order.
3. What a type needs beyond that stands in `lxt.coverage.sizes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lxt.coverage.sizes import Tiny, tiny_of

__all__ = ["VOCABULARY", "shrunk"]

VOCABULARY = 128
HIDDEN, HEADS, LAYERS, INNER = 32, 4, 2, 40


def _fields(value: object, names: str) -> dict[str, object]:
    return dict.fromkeys(names.split(), value)


FIELDS: dict[str, Any] = {
    **_fields(VOCABULARY, """vocab_size text_vocab_size n_vocab entity_vocab_size decoder_vocab_size src_vocab_size
        tgt_vocab_size vocab_size_per_layer_input"""),
    **_fields(HIDDEN, """hidden_size d_model n_embd dim embedding_size emb_dim model_dim embed_dim word_embed_proj_dim
        decoder_hidden_size encoder_hidden_size text_embed_dim d_embed lru_width projection_dim vision_embed_dim
        proj_hidden_size projection_hidden_size projector_hidden_size text_hidden_size vision_hidden_size adapter_in_dim
        adapter_out_dim adapter_input_size mm_hidden_size out_hidden_size output_size hidden_dim
        intermediate_hidden_size embedding_dim entity_emb_size connector_hidden_size input_embedding_size
        hidden_features""" ),
    **_fields(HEADS, """num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads
        num_encoder_attention_heads num_decoder_attention_heads attention_heads num_attn_heads"""),
    **_fields(2, "num_key_value_heads num_kv_heads n_kv_heads num_global_key_value_heads"),
    **_fields(8, """head_dim d_kv attention_head_dim kv_channels qk_rope_head_dim qk_nope_head_dim v_head_dim
        attn_head_size d_head attention_head_size"""),
    **_fields(16, "kv_lora_rank q_lora_rank"),
    **_fields(LAYERS, """num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers
        num_decoder_layers depth num_blocks num_hidden_layers_encoder num_hidden_layers_decoder"""),
    **_fields(INNER, """intermediate_size ffn_dim d_ff d_inner n_inner encoder_ffn_dim decoder_ffn_dim ffn_hidden_size
        encoder_intermediate_size decoder_intermediate_size mlp_dim feed_forward_proj_dim"""),
    **_fields(24, """moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_dim
        moe_shared_expert_intermediate_size expert_ffn_hidden_size"""),
    **_fields(4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    **_fields(2, "num_experts_per_tok num_experts_per_token moe_top_k moe_k top_k_experts moe_topk"),
    **_fields(1, "n_group topk_group n_shared_experts first_k_dense_replace"),
    **_fields(64, """max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length max_source_positions
        max_target_positions seq_length original_max_position_embeddings max_text_len position_embeddings_size"""),
    **_fields(4, "sliding_window local_attention window_size attention_window_size"),
    **_fields(0.0, """hidden_dropout_prob attention_probs_dropout_prob dropout attention_dropout activation_dropout
        hidden_dropout embd_pdrop resid_pdrop attn_pdrop layerdrop encoder_layerdrop decoder_layerdrop
        drop_path_rate"""),
    **_fields(3, "num_labels"),
    **_fields(16, "image_size"),
    **_fields(8, "patch_size"),
    **_fields(8, "state_size ssm_state_size mamba_d_state linear_key_head_dim linear_value_head_dim"),
    **_fields(2, "linear_num_key_heads linear_num_value_heads "),
    **_fields(4, """time_step_rank mamba_dt_rank mamba_n_heads linear_num_heads swa_num_attention_heads
        sliding_window_size rel_extent rotary_dim index_topk mamba_chunk_size"""),
    **_fields(8, "linear_head_dim swa_head_dim index_head_dim laurel_rank hidden_size_per_layer_input adapter_rank"),
    **_fields(2, "index_n_heads swa_num_key_value_heads"),
    **_fields(2 * HIDDEN, "mamba_d_ssm"),
}  # fmt: skip
_LOW_IDS = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}  # some tables of positions count from the first
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_KINDS = ("layer_types", "layers_block_type", "mlp_layer_types", "block_types", "layers_block_types")


def shrunk(config_class: type, changes: Mapping[str, Any] | None = None, ids: list[int] | None = None) -> Any:
    """A tiny configuration of the class.

    Args:
        config_class: of transformers.
        changes: fields that are wanted as given, after everything else; those of sub-configurations as mappings.
        ids: token ids to give away, the largest first; shared with the sub-configurations.
    """
    ids = list(range(VOCABULARY)) if ids is None else ids
    tiny = tiny_of(config_class.model_type)
    changes = _merged(tiny.config, changes or {})
    given = {name: value for name, value in changes.items() if not isinstance(value, Mapping)}
    default = _default(config_class, tiny)
    values: dict[str, Any] = {}
    for name, value in default.items():
        sub = config_class.sub_configs.get(name)
        if name in given:
            continue
        if isinstance(changes.get(name), Mapping) and sub is None and not _is_config(value):
            values[name] = changes[name]
        elif _is_config(value):
            values[name] = shrunk(type(value), changes.get(name), ids)
        elif sub is not None and value is None and name in changes:
            values[name] = shrunk(sub, changes[name], ids)
        elif name in _LOW_IDS and value is not None:
            values[name] = _LOW_IDS[name]
        elif _is_token_id(name, value):
            values[name] = ids.pop() if isinstance(value, int) else [ids.pop() for _ in list(value or ())]
        elif name in FIELDS and value is not None and not isinstance(value, (list, tuple, dict)):
            values[name] = int(FIELDS[name]) if type(value) is int else FIELDS[name]
    if values.get("kv_lora_rank") and "num_key_value_heads" in values:
        values["num_key_value_heads"] = HEADS  # latent attention makes a key for every head
    values |= _layers(default, values)
    return config_class(**values | given)


def _merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    both = dict(first)
    for name, value in second.items():
        nested = isinstance(value, Mapping) and isinstance(both.get(name), Mapping)
        both[name] = _merged(both[name], value) if nested else value
    return both


def _default(config_class: type, tiny: Tiny) -> dict[str, Any]:
    """The fields of the default configuration."""
    config = config_class(**tiny.default)
    fields = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    for name, sub in config_class.sub_configs.items():
        fields.setdefault(name, getattr(config, name, None))
        if fields[name] is None and sub is not None and sub.__name__ != "AutoConfig":
            fields[name] = sub()
    return fields


def _is_config(value: object) -> bool:
    from transformers import PreTrainedConfig

    return isinstance(value, PreTrainedConfig)


def _is_token_id(name: str, value: Any) -> bool:
    named = name.endswith(("_token_id", "_token_index", "_token_ids"))
    if not named or isinstance(value, bool):
        return False
    return isinstance(value, int) or (isinstance(value, list) and all(isinstance(item, int) for item in value))


def _layers(default: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """One layer of each kind where layers differ."""
    changed: dict[str, Any] = {}
    lists = [name for name in _KINDS if isinstance(default.get(name), (list, tuple)) and default[name]]
    if not lists:
        return changed
    rows = list(zip(*(default[name] for name in lists), strict=False))
    kept = list(dict.fromkeys(rows))
    while len(kept) < LAYERS:
        kept.append(rows[-1])
    for name, column in zip(lists, zip(*kept, strict=True), strict=True):
        changed[name] = list(column)
    depth = next((name for name in _DEPTHS if name in values), None)
    if depth is not None:
        changed[depth] = len(kept)
    return changed
