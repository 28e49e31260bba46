"""Latents of every form, made by hand, and results that hold them."""

from __future__ import annotations

import torch

from lxt.attribution import Attribution, Explained
from lxt.latents import LatentRelevance, Tokens

WORDS = ["<s>", " Mary", " gave", " milk"]
LAYER, ROWS, LENGTH, NEURONS = 3, 2, 4, 50


def tokens() -> Tokens:
    """Two rows, the second one padded by one."""
    mask = torch.tensor([[True] * 4, [False] + [True] * 3])
    special = torch.tensor([[True, False, False, False], [False, True, False, False]])
    return Tokens([WORDS, ["", "<s>", " gave", " milk"]], mask, special)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def masked(values: torch.Tensor) -> torch.Tensor:
    """0 at the padding of `tokens()`."""
    if values.dim() == 5:
        mask = tokens().mask
        return values * (mask[:, None, :, None] & mask[:, None, None, :])
    return values * tokens().mask.view(1, ROWS, LENGTH, *[1] * (values.dim() - 3))


def neurons() -> LatentRelevance:
    return LatentRelevance("neuron", masked(random(LAYER, ROWS, LENGTH, NEURONS)), (0, 2, 5), tokens=tokens())


def pattern() -> LatentRelevance:
    causal = torch.tril(torch.ones(LENGTH, LENGTH))
    return LatentRelevance(
        "pattern", masked(random(LAYER, ROWS, 2, LENGTH, LENGTH) * causal), (0, 1, 2), tokens=tokens()
    )


def largest(latent: LatentRelevance, top: int) -> LatentRelevance:
    """The same with the largest alone, as the sink keeps them."""
    indices = latent.values.abs().topk(top, -1).indices
    values = latent.values.gather(-1, indices)
    rest = latent.values.sum(-1) - values.sum(-1)
    return latent.replaced(values=values, indices=indices.int(), rest=rest, parts=latent.values.shape[-1])


def attribution(latents: dict) -> Attribution:
    of = tokens()
    return Attribution(
        tokens=of.texts,
        token_ids=None,
        relevance=random(ROWS, LENGTH) * of.mask,
        mask=of.mask,
        special=of.special,
        explained=[Explained("' x'", "logit", 1.0), Explained("' y'", "logit", 2.0)],
        predictions=[],
        model="made",
        rules="cp",
        latents=latents,
    )


def all_kinds() -> Attribution:
    """One latent of every form."""
    return attribution(
        {
            "residual": masked(random(LAYER, ROWS, LENGTH)),
            "embed": LatentRelevance("embed", masked(random(1, ROWS, LENGTH)), (0,)),
            "neuron": neurons(),
            "expert": largest(neurons(), 3).replaced(name="expert"),
            "pattern": pattern(),
            "flow": largest(pattern(), 2).replaced(name="flow"),
            "model.layers.3.mlp": LatentRelevance("model.layers.3.mlp", masked(random(1, ROWS, LENGTH)), (3,)),
            "sae": LatentRelevance("sae", masked(random(1, ROWS, LENGTH, 7)), (4,)),
        }
    )


def assert_same(one: LatentRelevance, other: LatentRelevance) -> None:
    assert (one.name, one.layers, one.parts) == (other.name, other.layers, other.parts)
    for part in ("values", "indices", "rest"):
        a, b = getattr(one, part), getattr(other, part)
        assert (a is None) == (b is None)
        assert a is None or (torch.equal(a, b) and a.dtype == b.dtype)
