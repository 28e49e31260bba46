"""A private architecture with a kernel of its own: it is refused, declared, explained, and proven.

1. A made-up attention compares directions instead of lengths (cosine attention), in a fused kernel that brings its own
   backward: lxt can't see what it does to relevance, and says so.
2. One line declares it.
3. `check()` runs the bare model, keeps the books, and lets the auditor compute the same by another mechanism.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers.utils import logging

import lxt

TEXT = "I have 5 cats and 3 dogs. My cats love to play with my"


class FusedAttention(torch.autograd.Function):
    """softmax(q k^T) v with its own backward, as a CUDA or Triton kernel has."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """All three are [batch, head, token, d_head]."""
        weights = (query @ key.mT).masked_fill(~_causal(query.shape[-2]), -torch.inf).softmax(-1)
        ctx.save_for_backward(query, key, value, weights)
        return weights @ value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The derivative, as written in any textbook."""
        query, key, value, weights = ctx.saved_tensors
        scores = weights * (grad @ value.mT - (weights * (grad @ value.mT)).sum(-1, keepdim=True))
        return scores @ key, scores.mT @ query, weights.mT @ grad


def _causal(tokens: int) -> Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()


class CosineAttention(nn.Module):
    """Attends by the cosine of query and key, at a sharpness of 10; takes its projections from another attention."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
        self.size, self.groups = attention.head_dim, attention.num_key_value_groups

    def forward(self, hidden_states: Tensor, **_: object) -> tuple[Tensor, None]:
        """As transformers' attentions: the output, and no weights."""
        query, key, value = (
            project(hidden_states).unflatten(-1, (-1, self.size)).transpose(1, 2)
            for project in (self.q, self.k, self.v)
        )
        key, value = (x.repeat_interleave(self.groups, 1) for x in (key, value))
        mixed = FusedAttention.apply(10 * normalize(query, dim=-1), normalize(key, dim=-1), value)
        return self.o(mixed.transpose(1, 2).flatten(-2)), None


def main() -> None:
    logging.disable_progress_bar()
    explainer = lxt.load("tiny", device="cpu")
    for layer in explainer.model.model.layers:
        layer.self_attn = CosineAttention(layer.self_attn)

    try:
        explainer.attribute(TEXT)
    except lxt.UnknownOperation as error:
        print(error, "\n")

    lxt.declare(FusedAttention, "attention")
    for rules in ("attnlrp", "cp"):
        out = lxt.load(explainer.model, explainer.tokenizer, rules=rules, device="cpu").attribute(TEXT)
        out.show()
        print(out.check(), "\n")


if __name__ == "__main__":
    main()
