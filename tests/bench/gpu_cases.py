"""For gpu.py: the calls by which kernels are compared and timed, in words and as functions that make their tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["BF16", "SHORT", "Case", "Sizes", "cases", "timed"]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHORT = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
Maker = Callable[[torch.dtype, torch.Generator], Tensor]


@dataclass(frozen=True)
class Sizes:
    """Of what a kernel is given; `width` is that of a head."""

    tokens: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    width: int


@dataclass(frozen=True)
class Case:
    """A call of a rule.

    Attributes:
        kernel: the rule's name.
        label: the sizes and options, in words.
        call: given the function, then the leaves and the constants.
        leaves: the activations.
        constants: weights, angles, masks.
        options: of the kernel alone, such as exact=False.
        same_output: whether the forward must be the twin's to the last bit.
    """

    kernel: str
    label: str
    call: Callable[..., Any]
    leaves: tuple[Maker, ...]
    constants: tuple[Maker, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (BF16, FP32, FP16)
    options: dict[str, Any] = field(default_factory=dict)
    same_output: bool = True


def dense(*shape: int) -> Maker:
    return lambda dtype, random: torch.randn(shape, generator=random, device=random.device).to(dtype)


def part(*shape: int) -> Maker:
    """The first half of rows twice as long, as from a fused projection."""
    return lambda dtype, random: dense(*shape[:-1], 2 * shape[-1])(dtype, random)[..., : shape[-1]]


def heads(batch: int, count: int, tokens: int, width: int) -> Maker:
    """[batch, head, token, width], which in memory is [batch, token, head, width]."""
    return lambda dtype, random: dense(batch, tokens, count, width)(dtype, random).transpose(1, 2)


def allowed(queries: int, keys: int) -> Maker:
    """A mask that lets each query see two keys out of three, and its first one."""

    def make(dtype: torch.dtype, random: torch.Generator) -> Tensor:
        mask = torch.rand(1, 1, queries, keys, generator=random, device=random.device) < 2 / 3
        mask[..., 0] = True
        return mask

    return make


def added(queries: int, keys: int) -> Maker:
    """The same mask as numbers to add."""

    def make(dtype: torch.dtype, random: torch.Generator) -> Tensor:
        mask = allowed(queries, keys)(dtype, random)
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -1e4)

    return make


def cases(large: Sizes, odd: Sizes) -> Iterator[Case]:
    """The model's sizes first, as time may run out."""
    gelu_tanh = partial(F.gelu, approximate="tanh")
    for sizes, make in ((large, dense), (odd, part)):
        n, h, m, kv, w = sizes.tokens, sizes.hidden, sizes.mlp, sizes.kv_heads, sizes.width
        size = f"{n} x {h}"
        for exact in (True, False):
            options, how = {"exact": exact}, "" if exact else ", fast"
            yield Case(
                "gated_product",
                f"silu, {n} x {m}{how}",
                lambda f, gate, up: f(gate, up, F.silu, "silu"),
                (make(n, m), make(n, m)),
                options=options,
                same_output=exact,
            )
            for style in ("llama", "gemma", "t5"):
                call = partial(_norm, style=style)
                dtypes = (BF16, FP32, FP16) if style == "llama" else (BF16,)
                weights = (dense(h),)
                yield Case(
                    "rms_norm",
                    f"{style}, {size}{how}",
                    call,
                    (make(n, h),),
                    weights,
                    dtypes,
                    options,
                    same_output=exact,
                )
                both = (make(n, h), dense(n, h))
                call = partial(_add_norm, style=style)
                yield Case(
                    "add_rms_norm", f"{style}, {size}{how}", call, both, weights, dtypes, options, same_output=exact
                )
        yield Case("rms_norm", f"heads, {n} x {kv} x {w}", _norm, (dense(n, kv, w),), (dense(w),))
        yield Case("identity", f"silu, {n} x {m}", lambda f, x: f(x, F.silu, "silu"), (make(n, m),))
        angles = (dense(1, n, w), dense(1, n, w))
        yield Case("rotary", f"{kv} heads of {w}", lambda f, x, c, s: f(x, c, s, 0.25), (heads(2, kv, n, w),), angles)
        yield from attention(sizes)
        yield Case(
            "layer_norm",
            size,
            lambda f, x, weight, bias: f(x, (x.shape[-1],), weight, bias),
            (make(n, h),),
            (dense(h), dense(h)),
        )
        yield Case(
            "add_layer_norm",
            size,
            lambda f, x, residual, weight, bias: f(x, residual, (x.shape[-1],), weight, bias),
            (make(n, h), dense(n, h)),
            (dense(h), dense(h)),
        )
        yield Case("relevance", f"per token, {size}", lambda f, x, c: f(x, c), (), (make(n, h), make(n, h)))
        groups = h // w
        per_head = (make(n, groups * w), make(n, groups * w))
        yield Case("relevance", f"per head, {size}", lambda f, x, c, g=groups: f(x, c, g), (), per_head)
    for name, function in (("gelu", F.gelu), ("gelu_tanh", gelu_tanh)):
        yield Case(
            "gated_product",
            f"{name}, fast",
            lambda f, gate, up, name=name, function=function: f(gate, up, function, name),
            (dense(odd.tokens, odd.mlp), dense(odd.tokens, odd.mlp)),
            dtypes=(BF16, FP32),
            options={"exact": False},
            same_output=False,
        )
    stop = partial(_gated, stop_gate=True)
    yield Case("gated_product", "silu, gate stopped", stop, (dense(odd.tokens, odd.mlp), dense(odd.tokens, odd.mlp)))
    for form in sorted(import_module("lxt.triton_kernels.activations").FORMS):
        call = partial(_identity, form=form)
        yield Case("identity", form, call, (dense(odd.tokens, odd.mlp),), dtypes=(BF16, FP32))
    yield Case("identity", "no tokens", lambda f, x: f(x, F.silu, "silu"), (dense(0, odd.mlp),), dtypes=(BF16,))


def _norm(f: Callable, x: Tensor, weight: Tensor, style: str = "llama") -> Tensor:
    return f(x, weight, 1e-6, style)


def _add_norm(f: Callable, x: Tensor, residual: Tensor, weight: Tensor, style: str = "llama") -> Any:
    return f(x, residual, weight, 1e-6, style)


def _gated(f: Callable, gate: Tensor, up: Tensor, stop_gate: bool) -> Tensor:
    return f(gate, up, F.silu, "silu", stop_gate)


def _identity(f: Callable, x: Tensor, form: str) -> Tensor:
    return f(x, F.silu, form)  # the forward is whatever it is given: only the backward knows the form


def attention(sizes: Sizes) -> Iterator[Case]:
    """Causal attention with shared keys; at odd sizes also with masks, a window and other widths of heads."""
    n, q, kv, w = sizes.tokens, sizes.heads, sizes.kv_heads, sizes.width

    def case(label: str, call: Callable, keys: int = n, width: int = w, mask: Maker | None = None, **more: Any) -> Case:
        masks = () if mask is None else (mask,)
        constants = (heads(2, q, n, width), heads(2, kv, keys, width), *masks)
        name = f"{label}, {q} heads of {width}, {n} queries, {keys} keys"
        return Case("value_attention", name, call, (heads(2, kv, keys, width),), constants, **more)

    yield case("causal", partial(_attend, is_causal=True))
    if n % 16 == 0:
        return
    few: dict[str, Any] = {"dtypes": (BF16, FP32)}
    yield case("no mask", _attend, keys=2 * n + 3, **few)
    yield case("mask", _attend, mask=allowed(n, n + 5), keys=n + 5, **few)
    yield case("added mask", _attend, mask=added(n, n + 5), keys=n + 5, **few)
    yield case("window", partial(_attend, is_causal=True, window=n // 3), **few)
    for width in (64, 256):
        yield case("causal", partial(_attend, is_causal=True), width=width, dtypes=(BF16,))


def _attend(
    f: Callable, value: Tensor, query: Tensor, key: Tensor, mask: Tensor | None = None, **options: Any
) -> Tensor:
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(query.dtype)
    return f(query, key, value, mask, enable_gqa=True, **options)


def timed(sizes: Sizes) -> Iterator[tuple[Case, float]]:
    """What is timed, and its floating-point operations where these and not the bytes are the limit."""
    n, h, m, q, kv, w = sizes.tokens, sizes.hidden, sizes.mlp, sizes.heads, sizes.kv_heads, sizes.width
    fast = {"exact": False}
    yield Case("rms_norm", "", _norm, (dense(n, h),), (dense(h),), options=fast), 0
    yield Case("add_rms_norm", "", _add_norm, (dense(n, h), dense(n, h)), (dense(h),), options=fast), 0
    yield Case("gated_product", "", partial(_gated, stop_gate=False), (dense(n, m), dense(n, m)), options=fast), 0
    # Three products, half of each masked.
    constants = (heads(1, q, n, w), heads(1, kv, n, w))
    yield (
        Case("value_attention", "", partial(_attend, is_causal=True), (heads(1, kv, n, w),), constants),
        3 * q * n * n * w,
    )
    yield Case("rotary", "", lambda f, x, c, s: f(x, c, s, 0.25), (heads(1, q, n, w),), (dense(1, n, w),) * 2), 0
    yield Case("identity", "", partial(_identity, form="silu"), (dense(n, m),)), 0
    yield Case("layer_norm", "", lambda f, x, weight: f(x, (h,), weight), (dense(n, h),), (dense(h),)), 0
    yield Case("add_layer_norm", "", lambda f, x, r, v: f(x, r, (h,), v), (dense(n, h), dense(n, h)), (dense(h),)), 0
    yield Case("relevance", "per token", lambda f, x, c: f(x, c), (), (dense(n, h), dense(n, h))), 0
    yield Case("relevance", "per head", lambda f, x, c: f(x, c, q), (), (dense(n, q * w), dense(n, q * w))), 0
