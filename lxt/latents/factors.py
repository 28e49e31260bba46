"""The tensors of an attention and how they lie: the factors of its products, and the call of a fused one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lxt.coefficients import wide

__all__ = ["REPEATS", "Factor", "Fused", "Layout", "Product", "factor", "letters"]

REPEATS = "_lxt_repeats"  # the attribute of a tensor that says how many heads in a row are one


@dataclass(frozen=True)
class Factor:
    """One factor of a product of attention, and how its dimensions lie.

    Attributes:
        axes: its dimensions in the order (batch and heads, token, the rest).
        rows: which place in `axes` the token has.
        repeats: how many heads in a row share one of its own, since it was repeated for them.
    """

    axes: tuple[int, ...]
    rows: int
    repeats: int = 1

    def of(self, x: Tensor) -> Tensor:
        """[batch and heads ..., token, d_head]."""
        turned = x.permute(self.axes)
        return turned.flatten(self.rows + 1) if turned.dim() > self.rows + 2 else turned

    def by_token(self, x: Tensor, batch: int) -> Tensor:
        """[batch, token, head] of a tensor [batch and heads ..., token], the heads that were repeated summed up."""
        heads = x.reshape(batch, -1, x.shape[-1])
        if self.repeats > 1:
            heads = heads.unflatten(1, (-1, self.repeats)).sum(2)
        return heads.transpose(1, 2)


@dataclass(frozen=True, eq=False)
class Product:
    """The factors of what may be scores, each with what the subclass knows it by."""

    query: Any
    key: Any


@dataclass(frozen=True)
class Layout:
    """The product of weights [..., query, key] and values: how values and output lie."""

    value: Factor
    output: Factor


@dataclass(frozen=True, eq=False)
class Fused:
    """A call of scaled_dot_product_attention; fields as its arguments."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    dropout: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    @property
    def factor(self) -> float:
        """What scores are multiplied by."""
        return self.query.shape[-1] ** -0.5 if self.scale is None else self.scale

    def scores(self, head: int, rows: slice = slice(None)) -> Tensor:
        """[batch, query, key] of one head, masked, in float32 or wider; [batch, head, token, d_head] tensors only."""
        dtype = wide(self.query.dtype)
        key = self.key[:, self.group(head)]
        scores = self.query[:, head, rows].to(dtype) @ key.to(dtype).transpose(-2, -1) * self.factor
        return self.masked(scores, head, rows)

    def masked(self, scores: Tensor, head: int, rows: slice = slice(None)) -> Tensor:
        """These scores, [batch, query, key], with the mask of the head."""
        if self.is_causal:
            whole = torch.ones(self.query.shape[-2], self.key.shape[-2], dtype=torch.bool, device=scores.device)
            scores = scores.masked_fill(~whole.tril()[rows], -torch.inf)
        if self.mask is None:
            return scores
        mask = self.mask.expand(*self.mask.shape[:-2], self.query.shape[-2], -1)[..., rows, :]
        if mask.dim() == 4:
            mask = mask[:, head if mask.shape[1] > 1 else 0]
        elif mask.dim() == 3:
            mask = mask[head if len(mask) > 1 else 0]
        return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)

    def group(self, head: int) -> int:
        """Which of the keys' heads a query's head reads."""
        return head * self.key.shape[1] // self.query.shape[1]


def letters(equation: str, a: Tensor, b: Tensor) -> tuple[str, str, str]:
    """The three terms of an einsum, empty where they aren't written out, or don't fit."""
    terms = equation.replace(" ", "").replace("->", ",").split(",")
    fits = len(terms) == 3 and "." not in equation and len(terms[0]) == a.dim() and len(terms[1]) == b.dim()
    return (terms[0], terms[1], terms[2]) if fits else ("", "", "")


def factor(x: Tensor | None, terms: str, outer: str, row: str) -> Factor:
    """How a tensor with these letters lies: those of `outer`, that of its tokens, the rest."""
    first = [terms.index(letter) for letter in outer if letter in terms]
    rest = [place for place, letter in enumerate(terms) if letter not in outer and letter != row]
    return Factor((*first, terms.index(row), *rest), len(first), getattr(x, REPEATS, 1))
