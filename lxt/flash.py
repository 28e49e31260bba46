"""Attention on the CPU with torch's flash forward and a backward of our own, in tiles that fit the cache.

out = P v with P = softmax(scale q k^T + mask), of which the forward keeps the logarithms of its rows' sums only. With
those a tile of P is exp(scale q k^T + mask - lse), and
    c_v = P^T c_out                     all that CP-LRP needs: two matrix products, where the full backward has five
    c_s = P (c_out v^T - delta)         delta = sum(c_out * out), the rows' share of the softmax's normalisation
    c_q = scale c_s k,  c_k = scale c_s^T q
The factors of the rule ride on scale and on c_v, which grouped heads make small. torch's own backward computes all of
it, and for short prompts takes longer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lxt.coefficients import wide

__all__ = ["applies", "attention"]

ROWS, COLUMNS = 64, 512  # of a tile: the fastest of those tried from 256 to 4,096 tokens
OWN_UP_TO = 512  # tokens; torch's full backward is as fast for longer prompts, and faster for much longer ones
# Multiplications of one of the matrix products, from which on the tiles cost less than torch's backward: measured, for
# the value alone and for all three.
LEAST_FOR_VALUE, LEAST_FOR_ALL = 2**22, 2**24
_FLASH = 1  # torch.nn.attention.SDPBackend.FLASH_ATTENTION


def applies(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    for_value: bool = False,
) -> bool:
    """Whether torch's scaled_dot_product_attention would run its flash kernel on the CPU, and this would be faster.

    Args:
        query: as torch's, and so are the others.
        key: its keys.
        value: its values.
        mask: its mask.
        is_causal: its flag.
        scale: its scale.
        enable_gqa: its flag.
        for_value: whether the coefficients of the values are all that is needed.
    """
    tensors = [query, key, value] if mask is None else [query, key, value, mask]
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):  # which casts behind this function's back
        return False
    if not all(x.device.type == "cpu" and type(x) is Tensor and x.numel() for x in tensors):
        return False
    if any(x.dim() != 4 for x in tensors) or (mask is not None and (mask.requires_grad or is_causal)):
        return False
    if not (len(query) == len(key) == len(value) and key.shape[1] == value.shape[1]):
        return False
    if mask is not None and mask.shape[-1] != key.shape[-2]:
        return False
    if query.numel() * key.shape[-2] < (LEAST_FOR_VALUE if for_value else LEAST_FOR_ALL):
        return False
    operands = query, key, value, mask, 0.0, is_causal
    chosen = torch._fused_sdp_choice(*operands, scale=scale, enable_gqa=enable_gqa)  # pyright: ignore[reportPrivateImportUsage]
    return chosen == _FLASH


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    shares: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> Tensor:
    """scaled_dot_product_attention to the last bit, with the gradients of query, key and value times `shares`.

    With shares of 0 for query and key, neither is computed, and value and output aren't saved.

    Args:
        query: [batch, head, query, d_head]
        key: [batch, group, key, d_head], as `value`; the number of groups divides that of heads.
        mask: [batch or 1, head or 1, query or 1, key], added to the scores, or True where a key is seen.
        is_causal: as torch's.
        scale: as torch's.
        shares: of query, key and value.
    """
    return _Flash.apply(query, key, value, mask, is_causal, scale, shares)  # type: ignore[return-value]


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
        shares: tuple[float, float, float],
    ) -> Tensor:
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, *_for_each_head(query, key, value), 0.0, is_causal, attn_mask=mask, scale=scale
        )
        full = any(shares[:2])
        ctx.save_for_backward(query, key, value if full else None, mask, lse, out if full else None)
        ctx.is_causal, ctx.given_scale, ctx.shares = is_causal, scale, shares
        return out

    @staticmethod
    def backward(ctx: Any, c_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, lse, out = ctx.saved_tensors
        scale = query.shape[-1] ** -0.5 if ctx.given_scale is None else ctx.given_scale
        if out is not None and query.shape[-2] > OWN_UP_TO:
            found = _torch_backward(c_out, query, key, value, mask, lse, out, ctx.is_causal, ctx.given_scale)
            return *(c * share for c, share in zip(found, ctx.shares, strict=True)), None, None, None, None
        tiles = _Tiles(query, key, mask, lse, c_out, ctx.is_causal, scale)
        if out is None:
            return None, None, tiles.value(ctx.shares[2]), None, None, None, None
        return *tiles.all(value, out, ctx.shares), None, None, None, None


def _for_each_head(query: Tensor, *grouped: Tensor) -> tuple[Tensor, ...]:
    repeats = query.shape[1] // grouped[0].shape[1]
    return tuple(x.repeat_interleave(repeats, 1) for x in grouped) if repeats > 1 else grouped


def _torch_backward(
    c_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    lse: Tensor,
    out: Tensor,
    is_causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    keys, values = _for_each_head(query, key, value)
    c_query, c_key, c_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        c_out, query, keys, values, out, lse, 0.0, is_causal, attn_mask=mask, scale=scale
    )
    groups = key.shape[1]
    if groups < query.shape[1]:
        c_key, c_value = (c.unflatten(1, (groups, -1)).sum(2) for c in (c_key, c_value))
    return c_query, c_key, c_value


@dataclass
class _Tile:
    """Some rows (queries) and columns (keys) of P, of all heads."""

    columns: slice
    query: Tensor
    c_out: Tensor
    probabilities: Tensor


class _Tiles:
    """The backward of one attention, tile by tile; the heads of a group are rows of one matrix.

    Shapes are [batch * group, heads of a group * rows or columns, d_head]; products add in float32 or wider.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        lse: Tensor,
        c_out: Tensor,
        is_causal: bool,
        scale: float,
    ) -> None:
        batch, heads, self.length, self.d_head = query.shape
        self.groups, self.keys = key.shape[1:3]
        self.batch, self.each = batch, heads // self.groups
        self.dtype, self.wide, self.scale, self.is_causal = query.dtype, wide(query.dtype), scale, is_causal
        self.query = self._by_group(query.to(self.wide) * scale)
        self.c_out = self._by_group(c_out)
        self.lse = self._by_group(lse.to(self.wide).unsqueeze(-1))  # of a row that sees no key 0, so that its P is 0
        self.key = key.reshape(-1, self.keys, self.d_head)
        self.key_columns = self.key.to(self.wide).transpose(1, 2)
        self.mask = None if mask is None else mask.unsqueeze(2)
        if mask is not None and mask.shape[1] > 1:
            self.mask = mask.unflatten(1, (self.groups, self.each))

    def value(self, share: float) -> Tensor:
        """Share * P^T c_out, [batch, group, key, d_head]."""
        c_value = self._sums()
        for rows in self._rows():
            for tile in self._columns(rows):
                self._add(c_value[:, tile.columns], tile.probabilities.transpose(1, 2), tile.c_out)
        return self._grouped(c_value.mul_(share))

    def all(self, value: Tensor, out: Tensor, shares: tuple[float, float, float]) -> tuple[Tensor, Tensor, Tensor]:
        """The coefficients of query, key and value, each times its share."""
        c_key, c_value = self._sums(), self._sums()
        c_query = torch.empty_like(self.c_out)
        value_columns = value.reshape(-1, self.keys, self.d_head).to(self.wide).transpose(1, 2)
        delta = (self.c_out.to(self.wide) * self._by_group(out)).sum(-1, keepdim=True)
        for rows in self._rows():
            shift = self._flat(delta[:, :, rows])
            c_rows = torch.zeros_like(shift.expand(-1, -1, self.d_head))
            for tile in self._columns(rows):
                self._add(c_value[:, tile.columns], tile.probabilities.transpose(1, 2), tile.c_out)
                c_scores = torch.bmm(tile.c_out.to(self.wide), value_columns[:, :, tile.columns])
                c_scores.sub_(shift).mul_(tile.probabilities)
                self._add(c_key[:, tile.columns], c_scores.transpose(1, 2), tile.query)
                self._add(c_rows, c_scores, self.key[:, tile.columns])
            c_query[:, :, rows] = c_rows.mul_(self.scale * shares[0]).unflatten(1, (self.each, -1))
        query = c_query.view(self.batch, self.groups * self.each, self.length, self.d_head)
        return query, self._grouped(c_key.mul_(shares[1])), self._grouped(c_value.mul_(shares[2]))

    def _rows(self) -> Iterator[slice]:
        for start in range(0, self.length, ROWS):
            yield slice(start, min(start + ROWS, self.length))

    def _columns(self, rows: slice) -> Iterator[_Tile]:
        query, c_out, lse = (self._flat(x[:, :, rows]) for x in (self.query, self.c_out, self.lse))
        end = min(rows.stop, self.keys) if self.is_causal else self.keys
        for start in range(0, end, COLUMNS):
            columns = slice(start, min(start + COLUMNS, end))
            scores = torch.bmm(query, self.key_columns[:, :, columns])
            if self.mask is not None:
                shown = (rows if self.mask.shape[-2] > 1 else slice(None)), columns
                scores.view(self.batch, self.groups, self.each, -1, scores.shape[-1]).add_(self.mask[(..., *shown)])
            probabilities = scores.sub_(lse).exp_()
            if self.is_causal and columns.stop > rows.start:
                count, seen = rows.stop - rows.start, max(columns.start, rows.start)
                below = torch.ones(count, columns.stop - seen, dtype=torch.bool).tril_(rows.start - seen)
                probabilities.view(-1, count, probabilities.shape[-1])[..., seen - columns.start :].mul_(below)
            yield _Tile(columns, query, c_out, probabilities)

    def _add(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        """Total += a @ b, the factors in the model's dtype and the sum in the wide one."""
        if self.dtype == self.wide:
            total.baddbmm_(a, b)
        else:
            total.add_(torch.bmm(a.to(self.dtype), b.to(self.dtype)))

    def _by_group(self, x: Tensor) -> Tensor:
        return x.reshape(-1, self.each, *x.shape[2:])

    def _flat(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), -1, x.shape[-1])

    def _sums(self) -> Tensor:
        return torch.zeros(self.batch * self.groups, self.keys, self.d_head, dtype=self.wide)

    def _grouped(self, x: Tensor) -> Tensor:
        return x.view(self.batch, self.groups, self.keys, self.d_head).to(self.dtype)
