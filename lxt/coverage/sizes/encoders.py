"""Tiny sizes of encoder types: masked language models, and classifiers of text and of documents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lxt.composites import ATTN_LRP
from lxt.coverage.sizes.tiny import Tiny
from lxt.coverage.sizes.values import normal, token_ids
from lxt.patches.reformer import RECORDED

__all__ = ["ENCODERS"]


def _longer(count: int) -> Any:
    return lambda model: {"input_ids": token_ids(count)}


def _boxes(count: int, size: int = 64) -> Tensor:
    """[1, count, 4] corners of boxes on a page."""
    low = torch.randint(0, size // 2, (1, count, 2), generator=torch.Generator().manual_seed(3))
    sides = torch.randint(1, size // 2, (1, count, 2), generator=torch.Generator().manual_seed(4))
    return torch.cat([low, low + sides], -1)


def _with_boxes(model: Any) -> dict[str, Tensor]:
    return {"bbox": _boxes(9)}


def _page(model: Any) -> dict[str, Tensor]:
    return {"bbox": _boxes(9), "pixel_values": normal(1, 3, model.config.input_size, model.config.input_size)}


def _scaled_boxes(model: Any) -> dict[str, Tensor]:
    """Eight coordinates between 0 and 1 for each token, the corners of a quadrangle."""
    return {"bbox": torch.rand(1, 9, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)}


def _table(model: Any) -> dict[str, Tensor]:
    """Segment, column, row and ranks of a table's cells."""
    kinds = torch.zeros(1, 9, 7, dtype=torch.long)
    kinds[0, 3:, 0] = 1
    kinds[0, 3:, 1] = torch.tensor([1, 2, 3, 1, 2, 3])
    kinds[0, 3:, 2] = torch.tensor([1, 1, 1, 2, 2, 2])
    return {"token_type_ids": kinds}


def _entities(model: Any) -> dict[str, Tensor]:
    """Two entities, of two tokens and of one."""
    places = torch.full((1, 2, 4), -1)
    places[0, 0, :2] = torch.tensor([2, 3])
    places[0, 1, :1] = torch.tensor([6])
    return {"entity_ids": torch.tensor([[5, 7]]), "entity_position_ids": places}


def _global_first(count: int) -> Any:
    def inputs(model: Any) -> dict[str, Tensor]:
        everywhere = torch.zeros(1, count, dtype=torch.long)
        everywhere[0, 0] = 1
        return {"input_ids": token_ids(count), "global_attention_mask": everywhere}

    return inputs


def _masked_token(model: Any) -> dict[str, Tensor]:
    """One token masked: the others are scaled for it."""
    ids = token_ids(9)
    ids[0, 4] = model.config.mask_token_id
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _image(model: Any) -> dict[str, Tensor]:
    """Four image tokens among the others, and the image."""
    ids = token_ids(9)
    ids[0, 2:6] = model.config.image_token_id
    return {"input_ids": ids, "pixel_values": normal(1, 1, 3, 32, 32)}


def _regions(model: Any) -> dict[str, Tensor]:
    """Four regions of an image: what an object detector says of each, and where it is."""
    return {"visual_feats": normal(1, 4, 12), "visual_pos": normal(1, 4, 4, seed=3)}


def _without_kernel(model: Any) -> None:
    raise ValueError(
        "MRA's attention is a CUDA kernel from the hub, and without it transformers puts zeros in its place: "
        "nothing but each token's own way would be tried"
    )


def _recorded(model: Any) -> None:
    """Reversible layers recorded by autograd: their own backward is for training, and hides what the auditor reads."""
    for module in model.modules():
        cls = type(module)
        if cls.__name__ in RECORDED:
            forward = RECORDED[cls.__name__](module, ATTN_LRP)
            module.__class__ = type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})


_IMAGE = Tiny(config={"pixel_shuffle_factor": 2, "vision_config": {"image_size": 32}}, inputs=_image)

ENCODERS: dict[str, Tiny] = {
    # longer than the windows and blocks, so that sparse attention isn't replaced by full attention
    "big_bird": Tiny(config={"block_size": 2, "num_random_blocks": 1}, inputs=_longer(20)),
    "bros": Tiny(config={"hidden_size": 64}, inputs=_scaled_boxes),
    "canine": Tiny(
        config={"num_hash_buckets": 64, "local_transformer_stride": 4, "downsampling_rate": 2}, inputs=_longer(12)
    ),
    "convbert": Tiny(config={"conv_kernel_size": 3, "num_groups": 2}),
    "esm": Tiny(
        config={
            "vocab_size": 128,
            "pad_token_id": 1,
            "mask_token_id": 4,
            "token_dropout": True,
            "position_embedding_type": "rotary",
        },
        inputs=_masked_token,
    ),
    "esmc": Tiny(config={"num_key_value_heads": 4}),
    "funnel": Tiny(config={"block_sizes": [1, 1], "num_decoder_layers": 1}),
    "layoutlm": Tiny(config={"max_2d_position_embeddings": 64}, inputs=_with_boxes),
    "layoutlmv3": Tiny(
        config={
            "max_2d_position_embeddings": 64,
            "coordinate_size": 6,
            "shape_size": 4,
            "input_size": 16,
            "rel_pos_bins": 8,
            "rel_2d_pos_bins": 8,
        },
        inputs=_page,
    ),
    "lilt": Tiny(config={"max_2d_position_embeddings": 64, "hidden_size": 48}, inputs=_with_boxes),
    "longformer": Tiny(config={"attention_window": [4, 4]}, inputs=_global_first(14)),
    "luke": Tiny(inputs=_entities),
    "lxmert": Tiny(config={"l_layers": 1, "x_layers": 1, "r_layers": 1, "visual_feat_dim": 12}, inputs=_regions),
    "causal/reformer": Tiny(config={"is_decoder": True}, inputs=_longer(16), prepare=_recorded),
    "reformer": Tiny(
        config={
            "attn_layers": ["local", "lsh"],
            "local_attn_chunk_length": 4,
            "lsh_attn_chunk_length": 4,
            "num_buckets": 2,
            "hash_seed": 0,
            "axial_pos_shape": [8, 8],
            "axial_pos_embds_dim": [16, 16],
            "feed_forward_size": 40,
        },
        inputs=_longer(16),
        prepare=_recorded,
    ),
    "modernvbert": _IMAGE,
    "mra": Tiny(prepare=_without_kernel),
    "mobilebert": Tiny(config={"embedding_size": 16}),
    "neomme": Tiny(config={"head_dim": 16}),
    "nystromformer": Tiny(
        config={"num_landmarks": 3, "segment_means_seq_len": 12, "conv_kernel_size": 3}, inputs=_longer(12)
    ),
    "perceiver": Tiny(
        config={
            "d_latents": 32,
            "num_latents": 6,
            "num_self_attends_per_block": 2,
            "num_self_attention_heads": 4,
            "num_cross_attention_heads": 4,
            "qk_channels": 16,
            "v_channels": 32,
        }
    ),
    "roc_bert": Tiny(
        config={
            "pronunciation_vocab_size": 128,
            "shape_vocab_size": 128,
            "pronunciation_embed_dim": 16,
            "shape_embed_dim": 16,
        }
    ),
    "tapas": Tiny(config={"type_vocab_sizes": [3, 8, 8, 2, 8, 8, 10]}, inputs=_table),
    "ultravbert": _IMAGE,
    "xmod": Tiny(config={"default_language": "en_XX"}),
}
