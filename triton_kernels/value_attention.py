"""Attention whose queries and keys are constants (CP-LRP, arXiv 2202.07304): the backward computes dV and nothing else.

dV = P^T dO with P = softmax(scale Q K^T + mask). P is made again tile by tile and never stored (FlashAttention-2, arXiv
2307.08691, without its parts for dQ and dK):

 1. Forward: torch's scaled_dot_product_attention as the model calls it. Queries and keys are saved; values and
    output are not.
 2. `statistics_kernel`: a program takes some queries, goes along their keys with a running maximum and sum (online
    softmax) and writes m = max and 1 / sum of exp(s - m). Not their log-sum-exp in one number: where a mask adds the
    dtype's most negative number to a whole row, log(sum) is lost beside it.
 3. `value_kernel`: a program takes some keys of one key-value head, goes along the queries of all its query heads
    (GQA) and adds up P^T dO in float32 registers. One program writes each number of dV, once: no atomics, so two runs
    agree to the last bit.
That is three matrix products (Q K^T twice) where a full backward has five.
Causal and windowed tiles that are masked throughout are not visited.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from triton import knobs

from lxt.triton_kernels.launch import launch

__all__ = ["tile", "value_attention"]


def tile(width: int, itemsize: int) -> tuple[dict[str, int], int]:
    """Queries and keys of a program's tile and how many loads run ahead, and its warps.

    One choice for each size and no autotuning, whose choices would change a sum's order from run to run. They are large
    tiles that spill no register on sm_80, sm_90 and sm_100 (triton 3.7 and 3.9) and need less than the 99 KiB of shared
    memory of sm_86 and sm_89 (tests/bench/kernels.py). Speed was not measured.

    Args:
        width: the larger padded head dimension.
        itemsize: bytes of a number.
    """
    if itemsize == 4:
        return {"QUERIES": 32 if width <= 128 else 16, "KEYS": 32, "num_stages": 2 if width <= 64 else 1}, 8
    return {"QUERIES": 64 if width <= 128 else 32, "KEYS": 64, "num_stages": 2}, 4 if width <= 64 else 8


@triton.jit
def _product(a, b, INTERPRETED: tl.constexpr):
    if INTERPRETED:  # the interpreter multiplies the bit patterns of bfloat16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")  # tf32 keeps 10 bits of a float32


@triton.jit
def _scores(
    q,
    k_transposed,
    query,
    key,
    queries,
    keys,
    scale,
    mask,
    mask_query,
    mask_key,
    window,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The scores scale q k^T + mask, [query, key], -inf where a query sees no key. `window` 0 means none."""
    s = _product(q, k_transposed, INTERPRETED) * scale
    seen = (query < queries)[:, None] & (key < keys)[None, :]
    if MASK != "none":
        place = mask + query.to(tl.int64)[:, None] * mask_query + key.to(tl.int64)[None, :] * mask_key
        if MASK == "bool":
            seen = seen & (tl.load(place, mask=seen, other=0) != 0)
        else:
            s += tl.load(place, mask=seen, other=0.0).to(tl.float32)
    if CAUSAL:
        distance = query[:, None] - key[None, :]
        seen = seen & (distance >= 0) & ((window == 0) | (distance < window))
    return tl.where(seen, s, float("-inf"))


@triton.jit
def statistics_kernel(
    maximum,
    inverse,
    q,
    k,
    mask,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    mask_batch,
    mask_head,
    mask_query,
    mask_key,
    heads,
    queries,
    keys,
    width,
    scale,
    window,
    GROUP: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    INTERPRETED: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tiles = tl.cdiv(queries, QUERIES)
    first = tl.program_id(0) % tiles * QUERIES
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    head = pair % heads
    batch = pair // heads
    query = first + tl.arange(0, QUERIES)
    i = tl.arange(0, BLOCK)
    q_start = q + batch * q_batch + head * q_head
    k_start = k + batch * k_batch + head // GROUP * k_head
    mask_start = mask + batch * mask_batch + head * mask_head
    q_tile = tl.load(
        q_start + query.to(tl.int64)[:, None] * q_token + i[None, :],
        mask=(query < queries)[:, None] & (i < width)[None, :],
        other=0.0,
    )
    m = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    begin = 0
    end = keys
    if CAUSAL:
        end = tl.minimum(keys, first + QUERIES)
        if window > 0:
            begin = tl.maximum(first - window + 1, 0) // KEYS * KEYS
    for start in range(begin, end, KEYS):
        key = start + tl.arange(0, KEYS)
        k_tile = tl.load(
            k_start + key.to(tl.int64)[None, :] * k_token + i[:, None],
            mask=(key < keys)[None, :] & (i < width)[:, None],
            other=0.0,
        )
        s = _scores(
            q_tile,
            k_tile,
            query,
            key,
            queries,
            keys,
            scale,
            mask_start,
            mask_query,
            mask_key,
            window,
            MASK,
            CAUSAL,
            INTERPRETED,
        )
        larger = tl.maximum(m, tl.max(s, 1))
        finite = tl.where(larger == float("-inf"), 0.0, larger)  # -inf - -inf is NaN
        total = total * tl.exp(m - finite) + tl.sum(tl.exp(s - finite[:, None]), 1)
        m = larger
    out = pair * queries + query
    tl.store(maximum + out, tl.where(total > 0, m, 0.0), mask=query < queries)
    # A query that sees nothing gives nothing, as with torch.
    tl.store(inverse + out, tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0), mask=query < queries)


@triton.jit
def value_kernel(
    c_v,
    c_out,
    q,
    k,
    mask,
    maximum,
    inverse,
    v_batch,
    v_head,
    v_token,
    o_batch,
    o_head,
    o_token,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    mask_batch,
    mask_head,
    mask_query,
    mask_key,
    heads,
    queries,
    keys,
    width,
    v_width,
    scale,
    window,
    GROUP: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    INTERPRETED: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
):
    """`heads` are those of the queries, GROUP for each of the values."""
    tiles = tl.cdiv(keys, KEYS)
    first = tl.program_id(0) % tiles * KEYS
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    shared = pair % (heads // GROUP)
    batch = pair // (heads // GROUP)
    key = first + tl.arange(0, KEYS)
    i = tl.arange(0, BLOCK)
    j = tl.arange(0, V_BLOCK)
    k_start = k + batch * k_batch + shared * k_head
    k_tile = tl.load(
        k_start + key.to(tl.int64)[None, :] * k_token + i[:, None],
        mask=(key < keys)[None, :] & (i < width)[:, None],
        other=0.0,
    )
    total = tl.zeros((KEYS, V_BLOCK), tl.float32)
    begin = 0
    end = queries
    if CAUSAL:
        begin = first // QUERIES * QUERIES
        if window > 0:
            end = tl.minimum(queries, first + KEYS + window - 1)
    for member in range(0, GROUP):
        head = shared * GROUP + member
        q_start = q + batch * q_batch + head * q_head
        o_start = c_out + batch * o_batch + head * o_head
        mask_start = mask + batch * mask_batch + head * mask_head
        statistics = (batch * heads + head) * queries
        for start in range(begin, end, QUERIES):
            query = start + tl.arange(0, QUERIES)
            q_tile = tl.load(
                q_start + query.to(tl.int64)[:, None] * q_token + i[None, :],
                mask=(query < queries)[:, None] & (i < width)[None, :],
                other=0.0,
            )
            s = _scores(
                q_tile,
                k_tile,
                query,
                key,
                queries,
                keys,
                scale,
                mask_start,
                mask_query,
                mask_key,
                window,
                MASK,
                CAUSAL,
                INTERPRETED,
            )
            m = tl.load(maximum + statistics + query, mask=query < queries, other=0.0)
            r = tl.load(inverse + statistics + query, mask=query < queries, other=0.0)
            p = tl.exp(s - m[:, None]) * r[:, None]
            c = tl.load(
                o_start + query.to(tl.int64)[:, None] * o_token + j[None, :],
                mask=(query < queries)[:, None] & (j < v_width)[None, :],
                other=0.0,
            )
            total += _product(tl.trans(p.to(c.dtype)), c, INTERPRETED)
    out = c_v + batch * v_batch + shared * v_head + key.to(tl.int64)[:, None] * v_token + j[None, :]
    tl.store(out, total.to(c_v.dtype.element_ty), mask=(key < keys)[:, None] & (j < v_width)[None, :])


class _ValueAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
        window: int | None,
    ) -> Tensor:
        ctx.save_for_backward(query, key, attn_mask)
        ctx.is_causal, ctx.window = is_causal, window or 0
        ctx.scale = query.shape[-1] ** -0.5 if scale is None else scale
        ctx.value = torch.empty_like(value, device="meta")  # its shape and layout
        if window is not None:  # torch's function takes it as a mask; the backward doesn't
            i, j = (torch.arange(x.shape[2], device=x.device) for x in (query, key))
            distance = i[:, None] - j
            attn_mask, is_causal = (distance >= 0) & (distance < window), False
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, c_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, mask = ctx.saved_tensors
        c_value = torch.empty_like(ctx.value, device=c_out.device)
        if c_value.stride(-1) != 1:
            c_value = torch.empty(c_value.shape, dtype=c_value.dtype, device=c_out.device)
        _write_gradient(c_value, c_out, query, key, mask, ctx.is_causal, ctx.scale, ctx.window)
        return None, None, c_value, None, None, None, None, None


def _write_gradient(
    c_value: Tensor,
    c_out: Tensor,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    window: int,
) -> None:
    """Write dV into `c_value`, [batch, head of the values, key, d_head]; `window` 0 means none."""
    query, key, c_out = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, c_out))
    batch, heads, queries, width = query.shape
    keys, v_heads, v_width = key.shape[2], c_value.shape[1], c_value.shape[3]
    maximum, inverse = torch.empty(2, batch, heads, queries, dtype=torch.float32, device=query.device)
    kind, bias, strides = "none", query, (0, 0, 0, 0)
    if mask is not None:
        kind = "bool" if mask.dtype == torch.bool else "sum"
        bias = mask.expand(batch, heads, queries, keys)
        strides = bias.stride()
    block, v_block = (max(triton.next_power_of_2(size), 16) for size in (width, v_width))
    sizes, warps = tile(max(block, v_block), query.element_size())
    constants = {
        "GROUP": heads // v_heads,
        "MASK": kind,
        "CAUSAL": is_causal,
        "INTERPRETED": knobs.runtime.interpret,
        "BLOCK": block,
        **sizes,
    }
    q, k, v, o = (x.stride()[:3] for x in (query, key, c_value, c_out))
    launch(
        statistics_kernel,
        lambda meta: [triton.cdiv(queries, meta["QUERIES"]) * batch * heads],
        [maximum, inverse, query, key, bias, *q, *k, *strides, heads, queries, keys, width, scale, window],
        constants,
        warps,
    )
    launch(
        value_kernel,
        lambda meta: [triton.cdiv(keys, meta["KEYS"]) * batch * v_heads],
        [
            c_value,
            c_out,
            query,
            key,
            bias,
            maximum,
            inverse,
            *v,
            *o,
            *q,
            *k,
            *strides,
            heads,
            queries,
            keys,
            width,
            v_width,
            scale,
            window,
        ],
        constants | {"V_BLOCK": v_block},
        warps,
    )


def value_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: int | None = None,
) -> Tensor:
    """The twin of lxt.rules.value_attention: torch's scaled_dot_product_attention, to the values only.

    Args:
        query: [batch, head, query, d_head]
        key: [batch, head or fewer, key, d_head]
        value: [batch, heads of the keys, key, d_value]
        attn_mask: as torch's, of two to four dimensions.
        is_causal: as torch's: query i sees keys up to i.
        scale: as torch's.
        enable_gqa: as torch's.
        window: as the twin's.
    """
    return _ValueAttention.apply(query, key, value, attn_mask, is_causal, scale, enable_gqa, window)
