"""A result of random numbers with every latent that is drawn."""

from __future__ import annotations

import torch

from lxt.attribution import Attribution, Explained, Prediction
from lxt.latents import LatentRelevance

LAYERS = (2, 5, 6)
TOKENS = ["<s>", " cats", " love", " dogs"]
TEXT = "I have 5 cats and 3 dogs. My cats love to play with my"


def made(tokens: list[str] = TOKENS, rows: int = 1, padded: int = 0, heads: int = 4) -> Attribution:
    """Random numbers; the rows begin with `padded` places of padding."""
    generator = torch.Generator().manual_seed(0)
    length = padded + len(tokens)
    mask = torch.arange(length).expand(rows, -1) >= padded
    special = torch.zeros(rows, length, dtype=torch.bool)
    special[:, padded] = tokens[0] == "<s>"

    def random(*shape: int) -> torch.Tensor:
        numbers = torch.randn(len(LAYERS), rows, *shape, generator=generator)
        return numbers.masked_fill(~mask.view(1, rows, length, *[1] * (len(shape) - 1)), 0.0)

    flow = torch.randn(len(LAYERS), rows, heads, length, length, generator=generator).tril()
    flow = flow * mask[None, :, None, :, None] * mask[None, :, None, None, :]
    latents = {
        "residual": LatentRelevance("residual", random(length), LAYERS),
        "head": LatentRelevance("head", random(length, heads), LAYERS),
        "neuron": LatentRelevance("neuron", random(length, 30), LAYERS),
        "flow": LatentRelevance("flow", flow, LAYERS),
    }
    relevance = torch.randn(rows, length, generator=generator) * mask
    return Attribution(
        tokens=[[""] * padded + list(tokens)] * rows,
        token_ids=None,
        relevance=relevance,
        mask=mask,
        special=special,
        explained=[Explained(f"'{i}'", "logit", 3.0, len(tokens) - 1, rank=i, probability=0.5**i) for i in range(rows)],
        predictions=[Prediction("0", 7, 3.0, 0.5)] * rows,
        model="tiny",
        rules="attnlrp",
        latents=latents,
        versions={},
    )
