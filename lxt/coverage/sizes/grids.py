"""Tiny sizes of multimodal types that take pictures of any size, as flat patches and the shape of their grid."""

from __future__ import annotations

import torch
from torch import nn

from lxt.coverage.prompts import flattened, grid, image_tokens, patches
from lxt.coverage.sizes.tiny import Tiny
from lxt.coverage.sizes.values import normal, token_ids

__all__ = ["GRIDS"]

# rotary positions in time, height and width, for heads of 8
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_MROPE = {"text_config": {"rope_parameters": _ROPE}}
_HALF_ROPE = {"text_config": {"head_dim": 16, "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5}}}
# windows of 2 × 2 merged patches in one layer, full attention in the other
_WINDOWS = {"vision_config": {"window_size": 32, "fullatt_block_indexes": [1]}}
_POSITIONS = ("position_embedding.weight",)  # read by interpolation, not by the embedding's forward
_INKLING = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "sliding_window_size": 4}


def _around_zero(model: nn.Module) -> None:
    """Undoes 2 * (pixels - 0.5) of Gemma's patch embedder: the number subtracted is a bias, in code."""
    for module in model.modules():
        if type(module).__name__ == "Gemma4VisionPatchEmbedder":
            module.register_forward_pre_hook(lambda module, args: (args[0] + 0.5, *args[1:]))


_MINICPM = {
    "image_token_id": 100,
    "video_token_id": 101,
    "insert_layer_id": 0,
    "vision_config": {"insert_layer_id": 0},
}

GRIDS: dict[str, Tiny] = {
    "cohere_compass": Tiny(inputs=grid(4, 6, 6)),
    "cosmos3_edge": Tiny(config=_MROPE, inputs=grid(4, 6, 6), sources=_POSITIONS),
    "cosmos3_omni": Tiny(config=_MROPE, inputs=grid(4, 6, 6)),
    "diffusion_gemma": Tiny(
        config={
            "canvas_length": 8,
            "text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24},
            "vision_config": {"position_embedding_size": 16, "pooling_kernel_size": 2},
        },
        inputs=image_tokens(6, **patches(4, 6, 192)),
        prepare=_around_zero,
    ),
    "dots3_note": Tiny(inputs=grid(4, 6, 6)),
    "ernie4_5_vl_moe": Tiny(
        config={
            "text_config": {"moe_intermediate_size": [24, 16], "rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]}}
        },
        inputs=grid(4, 6, 6),
    ),
    "exaone4_5": Tiny(config=_WINDOWS, inputs=grid(4, 6, 6)),
    "fuyu": Tiny(inputs=image_tokens(4, pixel_values=normal(1, 4, 192))),
    "gemma4": Tiny(
        config={"vision_config": {"position_embedding_size": 16, "pooling_kernel_size": 2}},
        inputs=image_tokens(6, **patches(4, 6, 192)),
        prepare=_around_zero,
    ),
    "gemma4_unified": Tiny(
        config={
            "vision_config": {
                "patch_size": 4,
                "pooling_kernel_size": 2,
                "mm_embed_dim": 32,
                "mm_posemb_size": 16,
                "output_proj_dims": 32,
            }
        },
        inputs=image_tokens(6, **patches(2, 3, 192)),
    ),
    "glm46v": Tiny(config=_MROPE, inputs=grid(4, 6, 6), sources=_POSITIONS),
    "glm4v": Tiny(config=_MROPE, inputs=grid(4, 6, 6), sources=_POSITIONS),
    "glm4v_moe": Tiny(config=_HALF_ROPE, inputs=grid(4, 6, 6), sources=_POSITIONS),
    "glm5_next": Tiny(config={"text_config": {"index_kpool": 2, "qk_rope_head_dim": 0}}, inputs=grid(4, 6, 6)),
    "glm_ocr": Tiny(config=_MROPE, inputs=grid(4, 6, 6)),
    "glmga": Tiny(config=_MROPE, inputs=grid(4, 6, 6), sources=_POSITIONS),
    "hunyuan_vl": Tiny(
        config={"text_config": {"head_dim": 8, "rope_parameters": {**_ROPE, "mrope_section": [1, 1, 1, 1]}}},
        inputs=grid(4, 6, 10),
        sources=("image_begin", "image_end", "image_sep", "position_embedding.weight"),
    ),
    "hyperclovax_vision_v2": Tiny(config=_WINDOWS, inputs=grid(4, 6, 6)),
    "inkling2": Tiny(
        config={"text_config": _INKLING},
        inputs=grid(2, 3, 6, pixel_values=normal(6, 16, 16, 3)),
        sources=("position_embedding.weight", "static_weight"),
    ),
    "kimi_k25": Tiny(inputs=grid(4, 6, 6, pixel_values=normal(24, 3, 8, 8))),
    "kosmos-2.5": Tiny(
        config={"latent_query_num": 4, "text_config": {"layers": 2}},
        inputs=lambda model: {
            "input_ids": token_ids(9),
            "image_embeds_position_mask": torch.tensor([[0, 1, 1, 1, 1, 0, 0, 0, 0]]),
            "flattened_patches": flattened(2, 3, 768),
            "pixel_values": None,
        },
        sources=("latent_query",),
    ),
    "lfm2_vl": Tiny(
        inputs=image_tokens(
            4,
            pixel_values=normal(1, 16, 192),
            spatial_shapes=torch.tensor([[4, 4]]),
            pixel_attention_mask=torch.ones(1, 16, dtype=torch.long),
        ),
        sources=_POSITIONS,
    ),
    "lfm3_vl": Tiny(inputs=grid(4, 6, 6)),
    "minicpm_ocr": Tiny(
        config=_MINICPM,
        inputs=image_tokens(16, pixel_values=normal(1, 3, 8, 512), target_sizes=torch.tensor([[8, 8]])),
    ),
    "minicpmv4_6": Tiny(
        config=_MINICPM,
        inputs=image_tokens(4, pixel_values=normal(1, 3, 8, 512), target_sizes=torch.tensor([[8, 8]])),
    ),
    "minicpmv4_7": Tiny(
        config=_MINICPM,
        inputs=image_tokens(4, pixel_values=normal(1, 3, 8, 512), target_sizes=torch.tensor([[8, 8]])),
    ),
    "minimax_m3_vl": Tiny(inputs=grid(4, 6, 6)),
    "molmo2": Tiny(
        config={
            "image_patch_id": 100,
            "adapter_config": {"vision_feature_layer": [-1, -2]},
            "vision_config": {"image_size": [32, 32], "num_position_embeddings": 16},
        },
        # a small picture of the whole and one part of it, 4 × 4 patches each, of which 2 × 2 make a token
        inputs=image_tokens(
            8,
            pixel_values=normal(2, 16, 192),
            image_grids=torch.tensor([[2, 2, 2, 2]]),
            image_num_crops=torch.tensor([2]),
            image_token_pooling=torch.arange(32).reshape(2, 2, 2, 2, 2).transpose(2, 3).reshape(8, 4),
        ),
    ),
    "muse_glimmer": Tiny(config={"out_hidden_size": 128}, inputs=grid(4, 6, 6, pixel_values=normal(24, 384))),
    "muse_spark": Tiny(
        config={
            "out_hidden_size": 128,
            "audio_config": {"patch_sizes": [2, 2], "hidden_sizes": [32, 32], "depths": [1, 1]},
        },
        inputs=grid(4, 6, 6, pixel_values=normal(24, 384)),
    ),
    "nemotron_h_omni": Tiny(
        config={"image_token_id": 100, "video_token_id": 101, "vision_config": {"video_temporal_patch_size": 2}},
        inputs=image_tokens(6, pixel_values=normal(24, 192), image_grid_hw=torch.tensor([[4, 6]])),
    ),
    "paddleocr_vl": Tiny(config=_MROPE, inputs=grid(4, 6, 6, pixel_values=normal(24, 3, 8, 8))),
    "pix2struct": Tiny(
        inputs=lambda model: {
            "pixel_values": None,
            "flattened_patches": flattened(2, 3, 768),
            "decoder_input_ids": token_ids(4),
        }
    ),
    "qwen2_5_omni_thinker": Tiny(config=_MROPE | _WINDOWS, inputs=grid(4, 6, 6)),
    "qwen2_5_vl": Tiny(config=_MROPE | _WINDOWS, inputs=grid(4, 6, 6)),
    "qwen2_vl": Tiny(config=_MROPE, inputs=grid(4, 6, 6)),
    "qwen3_5": Tiny(config=_HALF_ROPE, inputs=grid(4, 6, 6)),
    "qwen3_5_moe": Tiny(config=_HALF_ROPE, inputs=grid(4, 6, 6)),
    "qwen3_omni_moe_thinker": Tiny(config=_MROPE, inputs=grid(4, 6, 6)),
    "qwen3_vl": Tiny(config=_MROPE, inputs=grid(4, 6, 6)),
    "qwen3_vl_moe": Tiny(config=_MROPE, inputs=grid(4, 6, 6)),
    "qwen4_exp": Tiny(config=_HALF_ROPE, inputs=grid(4, 6, 6)),
    "video_llama_3": Tiny(inputs=grid(4, 6, 6, image_merge_sizes=torch.tensor([2]))),
}
