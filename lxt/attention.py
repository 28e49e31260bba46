"""The attention rule for fused implementations, which never materialise the softmax.

out = softmax(q k^T) v      uniform: gradients of q, k, v times `qkv` (AttnLRP eq. 13: 1/4, 1/4, 1/2)
                            value_only: q and k are constants (CP-LRP)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lxt import flash
from lxt.coefficients import wide
from lxt.composites import Composite
from lxt.rules import scale_gradient, stop, tempered_softmax, value_attention

__all__ = ["SEEN_BY_THE_MODE", "scaled_dot_product_attention", "share_of_weights", "under_rule"]

SEEN_BY_THE_MODE = (None, "eager", "sdpa")  # transformers' implementations that are torch operations


def scaled_dot_product_attention(
    composite: Composite,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Torch's function of that name under the composite's attention rule; dropout is inactive.

    Args:
        composite: its `attention`, `qkv` and `softmax_temperature` apply.
        query: [batch, head, query, d_head]; key and value: [batch, head, key, d_head].
        attn_mask: as torch's; one that depends on activations is a summand of the scores, and gets what they get.
        dropout_p: accepted and ignored.
        is_causal: as torch's.
        scale: as torch's.
        enable_gqa: as torch's.
    """
    if composite.attention == "value_only":
        return value_attention(query, key, value, attn_mask, is_causal, scale, enable_gqa)
    is_scored = attn_mask is not None and attn_mask.requires_grad
    own = composite.softmax_temperature == 1 and all(x.requires_grad for x in (query, key, value))
    if own and flash.applies(query, key, value, attn_mask, is_causal, scale, enable_gqa):
        shares = composite.qkv if composite.attention == "uniform" else (1.0, 1.0, 1.0)
        return flash.attention(query, key, value, attn_mask, is_causal, scale, shares)
    if attn_mask is not None and is_scored:
        attn_mask = _mask_under_rule(composite, attn_mask, value)
    query, key, value = under_rule(composite, query, key, value, is_scored)
    if composite.softmax_temperature != 1:
        return _TemperedAttention.apply(
            query, key, value, attn_mask, is_causal, scale, enable_gqa, composite.softmax_temperature
        )
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _mask_under_rule(composite: Composite, mask: Tensor, value: Tensor) -> Tensor:
    shares = composite.attention == "uniform" and value.requires_grad
    return scale_gradient(mask, sum(composite.qkv[:2])) if shares else mask


def under_rule(
    composite: Composite, query: Tensor, key: Tensor, value: Tensor, is_scored: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """What goes into a fused attention, so that its plain gradient is the rule.

    Args:
        composite: its `attention` and `qkv` apply.
        query: as `key` and `value`, in the attention's shape.
        is_scored: whether the scores have another summand that depends on activations.
    """
    if composite.attention == "value_only":
        return stop(query), stop(key), value
    if composite.attention == "gradient":
        return query, key, value
    shares = _shares(composite, query, key, value, is_scored)
    query, key, value = (
        scale_gradient(x, share) if x.requires_grad else x for x, share in zip((query, key, value), shares, strict=True)
    )
    return query, key, value


def share_of_weights(composite: Composite, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> float:
    """What part of the relevance that flows from key to query goes through the weights P: c_P = share * v c_out."""
    is_scored = query.requires_grad or key.requires_grad or (mask is not None and mask.requires_grad)
    if composite.attention == "value_only" or not is_scored:
        return 0.0
    return 1.0 if composite.attention == "gradient" or not value.requires_grad else sum(composite.qkv[:2])


def _shares(
    composite: Composite, query: Tensor, key: Tensor, value: Tensor, is_scored: bool
) -> tuple[float, float, float]:
    """The factors of query, key and value; the share of a constant, as a cross-attention may have, is its partner's."""
    q, k, v = composite.qkv
    if not value.requires_grad and q + k > 0:
        q, k = q / (q + k), k / (q + k)
    if not query.requires_grad:
        q, k = 0.0, q + k
    elif not key.requires_grad:
        q, k = q + k, 0.0
    return q, k, v if query.requires_grad or key.requires_grad or is_scored else 1.0


class _TemperedAttention(torch.autograd.Function):
    """The fused forward, and a backward that writes the softmax out at its temperature."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
        temperature: float,
    ) -> Tensor:
        ctx.is_causal, ctx.scale, ctx.enable_gqa, ctx.temperature = is_causal, scale, enable_gqa, temperature
        ctx.save_for_backward(query, key, value, mask)
        return F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )

    @staticmethod
    def backward(ctx: Any, c_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask = ctx.saved_tensors
        dtype = wide(query.dtype)
        with torch.enable_grad():
            q, k, v = (x.detach().to(dtype).requires_grad_() for x in (query, key, value))
            repeats = q.shape[-3] // k.shape[-3] if ctx.enable_gqa else 1
            keys, values = (x.repeat_interleave(repeats, -3) if repeats > 1 else x for x in (k, v))
            scores = q @ keys.transpose(-2, -1) * (q.shape[-1] ** -0.5 if ctx.scale is None else ctx.scale)
            if ctx.is_causal:
                allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
                scores = scores.masked_fill(~allowed, -torch.inf)
            bias = None
            if mask is not None and mask.dtype == torch.bool:
                scores = scores.masked_fill(~mask, -torch.inf)
            elif mask is not None:
                bias = mask.detach().to(dtype).requires_grad_(ctx.needs_input_grad[3])
                scores = scores + bias
            out = tempered_softmax(scores, -1, None, ctx.temperature) @ values
            wanted = (q, k, v, bias) if bias is not None and bias.requires_grad else (q, k, v)
            gradients = [c.to(query.dtype) for c in torch.autograd.grad(out, wanted, c_out.to(dtype))]
        return *gradients, *(None,) * (8 - len(gradients))
