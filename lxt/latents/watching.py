"""Where a layer attends: found by data flow while its forward runs, whatever its code looks like.

1. A product of two tensors of three dimensions or more may be q k^T; its factors ride on the result.
2. What is computed from it by anything but another product or a softmax still is scores: scaled, masked, capped.
3. A softmax of scores over their last dimension gives an attention's weights.
4. The product of weights with a third tensor, the values, is the attention's output.
torch's scaled_dot_product_attention is all of it at once. A `Watch` sees this and leaves to its subclasses what to do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lxt import opnames
from lxt.entering import enter
from lxt.latents.factors import REPEATS, Factor, Fused, Layout, Product, factor, letters
from lxt.mode import suspended
from lxt.operands import positional

__all__ = ["Watch"]

_SCORES, _WEIGHTS = "_lxt_scores", "_lxt_weights"
_PAIRS = frozenset({"matmul", "__matmul__", "bmm"})
_ENTERED = frozenset({"multi_head_attention_forward"})
# Weights stay weights, and their last dimension the keys.
_KEEPING = opnames.DROPOUTS | frozenset(
    """view reshape unflatten squeeze unsqueeze contiguous clone to type type_as float double half bfloat16 cpu cuda
    __getitem__ narrow masked_fill masked_fill_ nan_to_num where expand""".split()
)
_NOT_SCORES = opnames.LINEAR_LAYERS | opnames.MATRIX_PRODUCTS | opnames.SUMS_OF_PRODUCT | opnames.SOFTMAX


class Watch(TorchFunctionMode, ABC):
    """Sees the attention of a forward, above whatever rules are in force."""

    @abstractmethod
    def factor(self, x: Tensor, factor: Factor) -> tuple[Tensor, Any]:
        """What goes into a product in the place of `x`, and what the factor is known by later."""

    @abstractmethod
    def softmax(self, scores: Tensor, products: Sequence[Product]) -> Any:
        """A softmax of scores: what the attention is known by later; None leaves it alone."""

    def weigh(
        self,
        attention: Any,
        weights: Tensor,
        value: Tensor,
        layout: Layout,
        run: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """The output of `attention`: that of `run(weights, value)`."""
        return run(weights, value)

    @abstractmethod
    def fused(self, call: Fused, repeats: tuple[int, int], run: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """The output of a fused attention, that of `run(query, key, value)`; keys and values may be repeated."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled() or suspended():
            return func(*args, **kwargs)
        name = opnames.operation_name(func)
        if name in _ENTERED:  # torch implements it in Python
            with self:
                return enter(func, args, kwargs)
        if name == "scaled_dot_product_attention":
            return self._fused(func, args, kwargs)
        if name in opnames.SOFTMAX:
            return self._softmax(func, args, kwargs)
        if name in _PAIRS and len(args) == 2:
            return self._pair(lambda a, b: func(a, b, **kwargs), *args)
        if name == "baddbmm":
            (summand, a, b, *rest), options = positional(args, kwargs, "input self", "batch1", "batch2")
            return self._pair(lambda a, b: func(summand, a, b, *rest, **options), a, b, summand)
        if name == "einsum" and isinstance(args[0], str):
            operands = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]
            if len(operands) == 2:
                return self._einsum(func, args[0], *operands)
        result = func(*args, **kwargs)
        if isinstance(result, (Tensor, tuple, list)):
            _carry(name, args, kwargs, result)
        return result

    def _fused(self, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        slots = "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"
        named = dict(zip(slots, args, strict=False)) | kwargs
        call = Fused(*(named.get(slot, default) for slot, default in zip(slots, _DEFAULTS, strict=True)))
        rest = {name: value for name, value in named.items() if name not in slots[:3]}
        repeats = getattr(call.key, REPEATS, 1), getattr(call.value, REPEATS, 1)
        return self.fused(call, repeats, lambda q, k, v: func(q, k, v, **rest))

    def _softmax(self, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        (scores, *rest), _ = positional(args, kwargs, "input self", "dim")
        products = getattr(scores, _SCORES, ())
        if not products or rest[:1] not in ([-1], [scores.dim() - 1]):
            return func(*args, **kwargs)
        attention = self.softmax(scores, products)
        weights = func(*args, **kwargs)
        setattr(weights, _WEIGHTS, attention)
        return weights

    def _pair(
        self, run: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor, summand: Tensor | None = None
    ) -> Tensor:
        attention = getattr(a, _WEIGHTS, None)
        if attention is not None and b.dim() > 2:
            kept = Factor(tuple(range(b.dim())), b.dim() - 2, getattr(b, REPEATS, 1))
            output = Factor(tuple(range(max(a.dim(), b.dim()))), max(a.dim(), b.dim()) - 2)
            return self.weigh(attention, a, b, Layout(kept, output), run)
        if not _may_score(a, b):
            return run(a, b)
        order = tuple(range(b.dim() - 2))
        query = Factor(tuple(range(a.dim())), a.dim() - 2, getattr(a, REPEATS, 1))
        key = Factor((*order, b.dim() - 1, b.dim() - 2), b.dim() - 2, getattr(b, REPEATS, 1))
        return self._scored(run, a, b, query, key, getattr(summand, _SCORES, ()))

    def _scored(
        self,
        run: Callable[[Tensor, Tensor], Tensor],
        a: Tensor,
        b: Tensor,
        query: Factor,
        key: Factor,
        others: tuple[Product, ...] = (),
    ) -> Tensor:
        a, known_query = self.factor(a, query)
        b, known_key = self.factor(b, key)
        scores = run(a, b)
        setattr(scores, _SCORES, (*others, Product(known_query, known_key)))
        return scores

    def _einsum(self, func: Callable, equation: str, a: Tensor, b: Tensor) -> Tensor:
        of_a, of_b, of_result = letters(equation, a, b)
        attention = getattr(a, _WEIGHTS, None) or getattr(b, _WEIGHTS, None)
        if attention is not None and of_result:
            if getattr(a, _WEIGHTS, None) is None:
                return self._weigh_einsum(attention, lambda w, v: func(equation, v, w), b, a, of_b, of_a, of_result)
            return self._weigh_einsum(attention, lambda w, v: func(equation, w, v), a, b, of_a, of_b, of_result)

        def run(a: Tensor, b: Tensor) -> Tensor:
            return func(equation, a, b)

        if len(of_result) < 3 or not _may_score(a, b):
            return run(a, b)
        row, column = of_result[-2:]
        if row in of_a and row not in of_b and column in of_b and column not in of_a:
            return self._scored(
                run, a, b, factor(a, of_a, of_result[:-2], row), factor(b, of_b, of_result[:-2], column)
            )
        if row in of_b and row not in of_a and column in of_a and column not in of_b:
            return self._scored(
                lambda b, a: run(a, b), b, a, factor(b, of_b, of_result[:-2], row),
                factor(a, of_a, of_result[:-2], column),
            )  # fmt: skip
        return run(a, b)

    def _weigh_einsum(
        self,
        attention: Any,
        run: Callable[[Tensor, Tensor], Tensor],
        weights: Tensor,
        value: Tensor,
        of_weights: str,
        of_value: str,
        of_result: str,
    ) -> Tensor:
        *outer, query, key = of_weights
        if not (set(outer) <= set(of_value) and set((*outer, query)) <= set(of_result) and key in of_value):
            return run(weights, value)
        layout = Layout(factor(value, of_value, "".join(outer), key), factor(None, of_result, "".join(outer), query))
        return self.weigh(attention, weights, value, layout, run)


_DEFAULTS = (None, None, None, None, 0.0, False, None, False)


def _may_score(a: Any, b: Any) -> bool:
    """Whether both may be activations, of which at least one is explained; a learned matrix has two dimensions."""
    return (
        all(isinstance(x, Tensor) and x.dim() > 2 and type(x) is not nn.Parameter for x in (a, b))
        and (a.requires_grad or b.requires_grad)
    )  # fmt: skip


def _carry(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    """What rides on the operands rides on the result."""
    if name == "__get__":  # an attribute, such as .data or .mT
        return
    results = [result] if isinstance(result, Tensor) else [part for part in result if isinstance(part, Tensor)]
    if not results:
        return
    operands = [x for x in _tensors((*args, *kwargs.values()))]
    if name not in _NOT_SCORES:
        products = tuple(dict.fromkeys(product for x in operands for product in getattr(x, _SCORES, ())))
        if products:
            for one in results:
                setattr(one, _SCORES, products)
    if name in _KEEPING and (attention := next(filter(None, (getattr(x, _WEIGHTS, None) for x in operands)), None)):
        for one in results:
            setattr(one, _WEIGHTS, attention)
    repeats = _repeats(name, operands[0], results[0]) if operands else 1
    if repeats > 1:
        for one in results:
            setattr(one, REPEATS, repeats)


def _repeats(name: str, source: Tensor, result: Tensor) -> int:
    """How many heads of the result share one of the source's, where it repeats heads or keeps those repeated."""
    if name == "expand" and result.dim() == 5 and source.shape[2] == 1 < result.shape[2]:
        return result.shape[2]
    if name == "repeat_interleave" and source.dim() == result.dim() == 4 and source.shape[1] < result.shape[1]:
        return result.shape[1] // source.shape[1]
    if name not in opnames.MARK_KEEPING:
        return 1
    # those that are one lie side by side, provided that what is merged comes before tokens and d_head
    beside = source.dim() == result.dim() or source.shape[-2:] == result.shape[-2:]
    return getattr(source, REPEATS, 1) if beside else 1


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from (x for x in value if isinstance(x, Tensor))
