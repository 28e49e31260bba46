"""Tiny sizes of vision types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lxt.coverage.sizes.tiny import Tiny
from lxt.coverage.sizes.values import normal, token_ids

__all__ = ["VISION"]


def _picture(side: int) -> Callable[[Any], dict[str, Any]]:
    """A square picture: in networks that halve it five times, 16 pixels would leave nothing to convolve."""
    return lambda model: {"pixel_values": normal(1, 3, side, side)}


_HALF = {"depths": [1, 1, 2, 1], "hidden_sizes": [16, 24, 32, 40]}
# windows of 4 × 4 in a field of 8 × 8, shifted in the second layer of a stage
_SWIN = {"image_size": 32, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "patch_size": 4}
_PYRAMID = {"hidden_sizes": [16, 32], "depths": [1, 2], "num_attention_heads": [1, 2], "num_encoder_blocks": 2}

VISION: dict[str, Tiny] = {
    "bit": Tiny(config={**_HALF, "embedding_size": 16, "num_groups": 4}, inputs=_picture(64)),
    "convnext": Tiny(config={**_HALF, "patch_size": 4, "layer_scale_init_value": 0.5}, inputs=_picture(64)),
    "convnextv2": Tiny(config={**_HALF, "patch_size": 4}, inputs=_picture(64)),
    "cvt": Tiny(config={"embed_dim": [16, 24, 32], "num_heads": [1, 3, 4], "depth": [1, 2, 3]}, inputs=_picture(32)),
    "donut-swin": Tiny(config=_SWIN),
    "efficientnet": Tiny(
        config={
            "image_size": 32,
            "width_coefficient": 0.25,
            "depth_coefficient": 0.5,
            "hidden_dim": 320,
            "num_block_repeats": [1, 1, 2, 1],
            "kernel_sizes": [3, 3, 5, 3],
            "in_channels": [32, 16, 24, 40],
            "out_channels": [16, 24, 40, 80],
            "strides": [1, 2, 2, 1],
            "expand_ratios": [1, 6, 6, 6],
        },
    ),
    "focalnet": Tiny(
        config={
            "embed_dim": 16,
            "hidden_sizes": [16, 32],
            "depths": [1, 2],
            "focal_levels": [2, 2],
            "focal_windows": [3, 3],
            "image_size": 32,
            "patch_size": 4,
        }
    ),
    "hgnet_v2": Tiny(
        config={
            "embedding_size": 8,
            "depths": [1, 1],
            "hidden_sizes": [32, 48],
            "stem_channels": [3, 8, 12],
            "stage_in_channels": [12, 32],
            "stage_mid_channels": [8, 12],
            "stage_out_channels": [32, 48],
            "stage_num_blocks": [1, 2],
            "stage_downsample": [False, True],
            "stage_downsample_strides": [2, 2],
            "stage_light_block": [False, True],
            "stage_kernel_size": [3, 5],
            "stage_numb_of_layers": [2, 2],
        },
        inputs=_picture(32),
    ),
    "hiera": Tiny(
        config={
            "embed_dim": 16,
            "image_size": [32, 32],
            "depths": [1, 2, 2],
            "num_heads": [1, 2, 4],
            "masked_unit_size": [4, 4],
            "masked_unit_attention": [True, True, False],
            "num_query_pool": 2,
        }
    ),
    "image/imagegpt": Tiny(inputs=lambda model: {"input_ids": token_ids(9), "pixel_values": None}),
    "levit": Tiny(
        config={
            "hidden_sizes": [32, 48, 64],
            "num_attention_heads": [2, 3, 4],
            "depths": [1, 2, 1],
            "key_dim": [8, 8, 8],
            "image_size": 64,
            "patch_size": 16,
            "drop_path_rate": 0,
        }
    ),
    "mobilevitv2": Tiny(config={"image_size": 64, "patch_size": 2, "width_multiplier": 0.25}),
    "perceiver": Tiny(config={"d_latents": 32, "num_latents": 8, "num_self_attends_per_block": 2}),
    "pvt": Tiny(
        config={
            **_PYRAMID,
            "sequence_reduction_ratios": [2, 1],
            "patch_sizes": [4, 2],
            "strides": [4, 2],
            "mlp_ratios": [2, 2],
            "image_size": 32,
        }
    ),
    "pvt_v2": Tiny(
        config={
            **_PYRAMID,
            "sr_ratios": [2, 1],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "mlp_ratios": [2, 2],
            "image_size": 32,
        }
    ),
    "poolformer": Tiny(config={**_HALF, "layer_scale_init_value": 0.5}, inputs=_picture(64)),
    "regnet": Tiny(
        config={"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 2], "groups_width": 8},
        inputs=_picture(32),
    ),
    "resnet": Tiny(config={**_HALF, "embedding_size": 16}, inputs=_picture(64)),
    "segformer": Tiny(
        config={**_PYRAMID, "sr_ratios": [2, 1], "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2]},
        inputs=_picture(32),
    ),
    "siglip2": Tiny(
        config={"vision_config": {"num_patches": 16, "patch_size": 4}},
        inputs=lambda model: {
            "pixel_values": normal(1, 6, 48),
            "pixel_attention_mask": torch.ones(1, 6, dtype=torch.long),
            "spatial_shapes": torch.tensor([[2, 3]]),
        },
        sources=("position_embedding.weight",),
    ),
    "swin": Tiny(config=_SWIN),
    "swinv2": Tiny(config=_SWIN),
    "textnet": Tiny(
        config={
            "image_size": 64,
            "stem_out_channels": 16,
            "hidden_sizes": [16, 16, 24, 32, 32],
        }
    ),
}
