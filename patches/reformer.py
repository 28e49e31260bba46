"""Reformer: reversible layers and attention by hashing, whose own backward recomputes and works in training only.

1. The encoder's layers run one after the other, recorded by autograd, in place of the reversible function.
2. Sorting back from hash buckets is a gather, in place of an autograd function.
3. Attention is written as exp(scores - logsumexp(scores)): a softmax, which has the softmax's rule. The weights of
   several hashing rounds, written likewise, stay with the operator mode: gates, and so constant.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lxt.composites import Composite
from lxt.declarations import Declaration
from lxt.mode import current_mode
from lxt.patches._forwards import rebound, with_names
from lxt.patchmap import PatchMap

__all__ = ["RECORDED", "REFORMER"]


class _Layers:
    """In place of _ReversibleFunction: y1 = x1 + attention(x2), y2 = x2 + feed_forward(y1), layer by layer."""

    @staticmethod
    def apply(
        hidden_states: Tensor,
        layers: Any,
        attention_mask: Tensor | None,
        num_hashes: int | None,
        all_hidden_states: list[Tensor],
        all_attentions: list[Tensor],
        past_buckets_states: Any,
        use_cache: bool,
        orig_sequence_length: int | None,
        output_hidden_states: bool,
        output_attentions: bool,
    ) -> Tensor:
        """Both halves of the stream, [batch, token, 2 * hidden]."""
        hidden_states, attn_output = torch.chunk(hidden_states, 2, dim=-1)
        for layer in layers:
            if output_hidden_states:
                all_hidden_states.append(hidden_states)
            outputs = layer(
                prev_attn_output=attn_output,
                hidden_states=hidden_states,
                attention_mask=attention_mask,
                num_hashes=num_hashes,
                past_buckets_states=past_buckets_states,
                use_cache=use_cache,
                orig_sequence_length=orig_sequence_length,
                output_attentions=output_attentions,
            )
            attn_output, hidden_states = outputs.attn_output, outputs.hidden_states
            if output_attentions:
                all_attentions.append(outputs.attention_probs)
        if output_hidden_states:
            all_hidden_states.append(hidden_states)
        return torch.cat([attn_output, hidden_states], dim=-1)


class _SortBack:
    """In place of ReverseSort."""

    @staticmethod
    def apply(out_vectors: Tensor, logits: Tensor, sorted_index: Tensor, undo: Tensor) -> tuple[Tensor, Tensor]:
        """[batch, head, token, d_head] and [batch, head, token] in the tokens' order."""
        return torch.gather(out_vectors, 2, undo.unsqueeze(-1).expand(out_vectors.shape)), torch.gather(logits, 2, undo)


class _Exponential:
    """The torch of an attention: its exp is of scores less their logsumexp, so softmax is what it does."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def exp(self, scores: Tensor) -> Tensor:
        """Its own numbers, the softmax's rule."""
        mode = current_mode()
        if mode is None or mode.suspended:
            return torch.exp(scores)
        softmax = Declaration(lambda scores: torch.softmax(scores, -1), "exp")
        return mode.declared(softmax, torch.exp, (scores,), {})


def _hashed_attention(module: Any, composite: Composite) -> Callable | None:
    forward = rebound(ReverseSort=lambda function: _SortBack)(module, composite)
    attend = with_names(type(module)._attend, torch=_Exponential)
    if forward is None or attend is None:
        return None

    def hashed(self: Any, *args: Any, **kwargs: Any) -> Any:
        other = copy.copy(self)  # the same parts; the method is the copy's own
        other._attend = MethodType(attend, other)
        return forward(other, *args, **kwargs)

    return hashed


# What makes autograd record the model at all; the rest is about rules.
RECORDED = {
    "ReformerEncoder": rebound(_ReversibleFunction=lambda function: _Layers),
    "ReformerLayer": rebound(torch=lambda module: SimpleNamespace(no_grad=nullcontext)),
    "LSHSelfAttention": rebound(ReverseSort=lambda function: _SortBack),
}
REFORMER = PatchMap(
    architectures=("reformer",),
    forwards=RECORDED | {"LocalSelfAttention": rebound(torch=_Exponential), "LSHSelfAttention": _hashed_attention},
    layers=("ReformerLayer",),
    neuron="feed_forward.output.dense",
)
