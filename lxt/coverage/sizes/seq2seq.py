"""Tiny sizes of text-to-text types with an encoder and a decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lxt.coverage.sizes.tiny import Tiny
from lxt.coverage.sizes.values import token_ids

__all__ = ["SEQ2SEQ"]


def _source(count: int, everywhere: bool = False) -> Any:
    """A longer source, that ends as classifiers want it; `everywhere`: its first token attends to all."""

    def inputs(model: Any) -> dict[str, Tensor]:
        ids = token_ids(count)
        ids[0, -1] = model.config.eos_token_id
        mask = torch.zeros(1, count, dtype=torch.long)
        mask[0, 0] = 1
        return {"input_ids": ids} | ({"global_attention_mask": mask} if everywhere else {})

    return inputs


SEQ2SEQ: dict[str, Tiny] = {
    # longer than the windows and blocks, so that sparse attention isn't replaced by full attention
    "bigbird_pegasus": Tiny(config={"block_size": 2, "num_random_blocks": 1}, inputs=_source(20)),
    "encoder-decoder": Tiny(config={"decoder": {"is_decoder": True, "add_cross_attention": True}}),
    "led": Tiny(
        config={
            "attention_window": [4, 4],
            "max_encoder_position_embeddings": 64,
            "max_decoder_position_embeddings": 64,
        },
        inputs=_source(14, everywhere=True),
    ),
    "longt5": Tiny(
        config={"encoder_attention_type": "transient-global", "local_radius": 2, "global_block_size": 4},
        inputs=_source(14),
    ),
    "nllb-moe": Tiny(config={"encoder_sparse_step": 2, "decoder_sparse_step": 2}),
    "pegasus_x": Tiny(config={"block_size": 4, "num_global_tokens": 2}, inputs=_source(14)),
    "prophetnet": Tiny(
        config={"num_buckets": 8, "relative_max_distance": 16},
        # what the predicting streams start from; they look their positions up without calling the module
        sources=("prophetnet.decoder.ngram_embeddings.weight", "prophetnet.decoder.position_embeddings.weight"),
    ),
    "switch_transformers": Tiny(config={"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}),
    # the older configuration leaves it to the generation's
    "t5": Tiny(config={"decoder_start_token_id": 1}),
}
