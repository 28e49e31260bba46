"""Tiny sizes of multimodal types that take pictures as such, of one size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lxt.coverage.prompts import image_tokens, prompt
from lxt.coverage.sizes.tiny import Tiny
from lxt.coverage.sizes.values import normal, token_ids

__all__ = ["MULTIMODAL"]

_FIELD = {"vision_config": {"image_size": 32}}  # 4 × 4 patches, where the projector merges 2 × 2 of them
_POSITIONS = ("position_embedding.weight",)  # read by interpolation, not by the embedding's forward
_INKLING = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "sliding_window_size": 4}


def _without(*names: str) -> Callable[[nn.Module], None]:
    """Zeroes buffers that are added to activations, as positions computed once: they absorb relevance as biases do."""

    def prepare(model: nn.Module) -> None:
        for name, buffer in model.named_buffers():
            if name.rpartition(".")[2] in names:
                buffer.zero_()

    return prepare


def _robot(model: Any) -> dict[str, Any]:
    """A picture, an order, the robot's state and the noise that becomes its actions."""
    return {
        **prompt(model, 4, token=model.config.vlm_config.image_token_index),
        "pixel_values": normal(1, 1, 3, 16, 16),
        "state": normal(1, 32, seed=3),
        "noise": normal(1, 4, 32, seed=4),
        "timestep": torch.tensor([1]),
        "pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool),
    }


MULTIMODAL: dict[str, Tiny] = {
    "aria": Tiny(config={"projector_patch_to_query_dict": {4: 3}}, inputs=image_tokens(3)),
    "aya_vision": Tiny(config=_FIELD, inputs=image_tokens(4)),
    "blip-2": Tiny(config={"image_token_index": 100, "num_query_tokens": 4}, inputs=image_tokens(4)),
    "chameleon": Tiny(
        config={
            "vocabulary_map": {"<image>": 100} | {f"IMGIMG{chr(ord('A') + code)}Z": 80 + code for code in range(8)},
            "vq_config": {
                "num_embeddings": 8,
                "latent_channels": 16,
                "base_channels": 32,
                "resolution": 16,
                "channel_multiplier": [1, 2],
                "num_res_blocks": 1,
            },
        },
        inputs=image_tokens(64, pixel_values=normal(1, 3, 16, 16)),
    ),
    "cohere2_vision": Tiny(config=_FIELD, inputs=image_tokens(4)),
    "deepseek_ocr2": Tiny(
        config={
            "vision_config": {
                "sam_config": {
                    "image_size": 64,
                    "output_channels": 16,
                    "global_attn_indexes": [1],
                    "downsample_channels": [24, 32],
                }
            },
            "text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
        },
        inputs=image_tokens(145),  # as many queries as it has for a picture, and the separator,
        sources=("query_768_resolution.weight",),
    ),
    "deepseek_vl": Tiny(inputs=image_tokens(4)),
    "deepseek_vl_hybrid": Tiny(
        config={"high_res_vision_config": {"image_size": 64, "output_channels": 16, "global_attn_indexes": [1]}},
        inputs=image_tokens(4, high_res_pixel_values=normal(1, 3, 64, 64, seed=3)),
    ),
    "emu3": Tiny(
        config={
            "vocabulary_map": {"<image>": 100, "<|extra_200|>": 101}
            | {f"<|visual token {code:06d}|>": 80 + code for code in range(8)},
            "vq_config": {
                "codebook_size": 8,
                "latent_channels": 4,
                "base_channels": 32,
                "channel_multiplier": [1, 2],
                "num_res_blocks": 1,
                "attn_resolutions": [1],
                "hidden_size": 64,
            },
        },
        inputs=image_tokens(72, pixel_values=normal(1, 3, 16, 16), image_sizes=torch.tensor([[16, 16]])),
    ),
    "evolla": Tiny(
        config={"aligner_num_add_layers": 1, "resampler_depth": 2, "resampler_num_latents": 4, "resampler_dim_head": 8},
        inputs=lambda model: {
            "protein_input_ids": token_ids(6, seed=3),
            "protein_attention_mask": torch.ones(1, 6, dtype=torch.long),
            "pixel_values": None,
        },
    ),
    "florence2": Tiny(
        config={
            "vision_config": {
                "embed_dim": [16, 32],
                "num_heads": [2, 4],
                "num_groups": [2, 4],
                "depths": [1, 1],
                "patch_size": [7, 3],
                "patch_stride": [4, 2],
                "patch_padding": [3, 1],
                "patch_prenorm": [False, True],
            }
        },
        inputs=image_tokens(17, pixel_values=normal(1, 3, 32, 32), decoder_input_ids=token_ids(4)),
    ),
    "gemma3": Tiny(config={**_FIELD, "mm_tokens_per_image": 4}, inputs=image_tokens(4)),
    "got_ocr2": Tiny(
        config={"vision_config": {"image_size": 64, "output_channels": 24, "global_attn_indexes": [1]}},
        inputs=image_tokens(4),
    ),
    "granite4_vision": Tiny(
        config={
            "downsample_rate": "1/2",
            "deepstack_layer_map": [[0, 0], [1, 1]],
            "spatial_target_layers": [0, 1],
            "image_grid_pinpoints": [[32, 64], [64, 32]],
            "vision_config": {"image_size": 32, "hidden_size": 64},
        },
        inputs=image_tokens(14, pixel_values=normal(1, 3, 3, 32, 32), image_sizes=torch.tensor([[32, 64]])),
        sources=("query", "image_positions"),
    ),
    "granite_docling": Tiny(
        config={"vision_config": {"image_size": 32, "scale_factor": 2, "deepstack_visual_indexes": [0]}},
        inputs=image_tokens(
            4, pixel_values=normal(1, 1, 3, 32, 32), pixel_attention_mask=torch.ones(1, 1, dtype=torch.bool)
        ),
        prepare=_without("pos_embed"),
    ),
    "idefics": Tiny(
        inputs=lambda model: {
            "input_ids": token_ids(7),
            "pixel_values": normal(1, 1, 3, 16, 16),
            "image_attention_mask": torch.ones(1, 7, 1, dtype=torch.long),
        }
    ),
    "idefics2": Tiny(
        config={"perceiver_config": {"resampler_n_latents": 3}},
        inputs=image_tokens(3, pixel_values=normal(1, 1, 3, 16, 16)),
    ),
    "idefics3": Tiny(config=_FIELD, inputs=image_tokens(4, pixel_values=normal(1, 1, 3, 32, 32))),
    "inkling_mm_model": Tiny(
        config={"text_config": _INKLING}, inputs=image_tokens(4, pixel_values=normal(4, 2, 8, 8, 3))
    ),
    "instructblip": Tiny(
        config={"image_token_index": 100, "num_query_tokens": 4}, inputs=image_tokens(4, qformer_input_ids=token_ids(5))
    ),
    "instructblipvideo": Tiny(
        config={"video_token_index": 100, "num_query_tokens": 4},
        inputs=image_tokens(8, qformer_input_ids=token_ids(5), pixel_values=normal(1, 2, 3, 16, 16)),
    ),
    "internvl": Tiny(config={"vision_config": {"image_size": [32, 32], "patch_size": [8, 8]}}, inputs=image_tokens(4)),
    "janus": Tiny(
        config={
            "vq_config": {
                "base_channels": 32,
                "num_res_blocks": 1,
                "channel_multiplier": [1, 2],
                "latent_channels": 16,
                "num_embeddings": 8,
            }
        },
        inputs=image_tokens(4),
    ),
    "kosmos-2": Tiny(
        config={"latent_query_num": 4, "text_config": {"layers": 2}},
        inputs=lambda model: {
            "input_ids": token_ids(9),
            "image_embeds_position_mask": torch.tensor([[0, 1, 1, 1, 1, 0, 0, 0, 0]]),
        },
        sources=("latent_query",),
    ),
    "lighton_ocr": Tiny(
        inputs=image_tokens(4, pixel_values=normal(1, 3, 32, 32), image_sizes=torch.tensor([[32, 32]]))
    ),
    "llama4": Tiny(
        config={
            "vision_config": {
                "image_size": 32,
                "intermediate_size": 128,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
                "vision_output_dim": 32,
            },
            "text_config": {"intermediate_size_mlp": 40, "attention_chunk_size": 4},
        },
        inputs=image_tokens(4),
    ),
    "llava": Tiny(inputs=image_tokens(4)),
    "llava_next": Tiny(
        config={"image_grid_pinpoints": [[16, 32], [32, 16]]},
        inputs=image_tokens(14, pixel_values=normal(1, 3, 3, 16, 16), image_sizes=torch.tensor([[16, 32]])),
    ),
    "llava_next_video": Tiny(
        config={"image_grid_pinpoints": [[16, 32], [32, 16]]},
        inputs=image_tokens(14, pixel_values=normal(1, 3, 3, 16, 16), image_sizes=torch.tensor([[16, 32]])),
    ),
    "llava_onevision": Tiny(
        config={"image_grid_pinpoints": [[16, 32], [32, 16]]},
        inputs=image_tokens(14, pixel_values=normal(1, 3, 3, 16, 16), image_sizes=torch.tensor([[16, 32]])),
    ),
    "mistral3": Tiny(inputs=image_tokens(4, pixel_values=normal(1, 3, 32, 32), image_sizes=torch.tensor([[32, 32]]))),
    "mistral_large4": Tiny(
        inputs=image_tokens(4, pixel_values=normal(1, 3, 32, 32), image_sizes=torch.tensor([[32, 32]]))
    ),
    "mllama": Tiny(
        sources=("gated_positional_embedding.embedding",),
        config={"vision_config": {"intermediate_layers_indices": [0], "vision_output_dim": 64, "num_global_layers": 1}},
        inputs=lambda model: {
            "input_ids": token_ids(7),
            "pixel_values": normal(1, 1, 4, 3, 16, 16),
            "aspect_ratio_ids": torch.tensor([[2]]),
            "aspect_ratio_mask": torch.tensor([[[1, 1, 0, 0]]]),
            "cross_attention_mask": torch.tensor([1, 1, 0, 0]).expand(1, 7, 1, 4),
        },
    ),
    "mllama_text_model": Tiny(config={"cross_attention_layers": [1]}),
    "ovis2": Tiny(inputs=image_tokens(4)),
    "paligemma": Tiny(inputs=image_tokens(4)),
    "pi0": Tiny(
        config={"chunk_size": 4},
        inputs=_robot,
    ),
    "pp_chart2table": Tiny(
        config={"vision_config": {"image_size": 64, "output_channels": 24, "global_attn_indexes": [1]}},
        inputs=image_tokens(4),
    ),
    "qianfan_ocr": Tiny(
        config={"vision_config": {"image_size": [32, 32], "patch_size": [8, 8]}}, inputs=image_tokens(4)
    ),
    "shieldgemma2": Tiny(
        config={**_FIELD, "mm_tokens_per_image": 4, "yes_token_index": 100, "no_token_index": 101},
        inputs=image_tokens(4),
    ),
    "smolvlm": Tiny(config=_FIELD, inputs=image_tokens(4, pixel_values=normal(1, 1, 3, 32, 32))),
    "step3p7": Tiny(
        config={"vision_config": {"image_size": 64}, "text_config": {"sliding_window": 4}},
        inputs=image_tokens(4),
        sources=_POSITIONS,
    ),
    "t5gemma2": Tiny(
        config={"encoder": {"mm_tokens_per_image": 4, "vision_config": {"image_size": 32}}},
        inputs=image_tokens(4, decoder_input_ids=token_ids(4), pixel_values=normal(1, 3, 32, 32)),
    ),
    "udop": Tiny(
        inputs=lambda model: {
            "input_ids": token_ids(9),
            "bbox": torch.rand(1, 9, 4, generator=torch.Generator().manual_seed(3)).sort(-1).values,
            "decoder_input_ids": token_ids(4),
        }
    ),
    "unlimited_ocr": Tiny(
        config={
            "vision_config": {
                "sam_config": {
                    "image_size": 64,
                    "output_channels": 16,
                    "global_attn_indexes": [1],
                    "downsample_channels": [24, 32],
                }
            }
        },
        inputs=image_tokens(7, pixel_values=normal(1, 3, 64, 64)),
    ),
    "video_llava": Tiny(inputs=image_tokens(4)),
    "vipllava": Tiny(config={"vision_feature_layers": [-2, -1, 1]}, inputs=image_tokens(4)),
    "vision-encoder-decoder": Tiny(
        config={"decoder": {"is_decoder": True, "add_cross_attention": True}},
        inputs=lambda model: {"decoder_input_ids": token_ids(4)},
    ),
}
