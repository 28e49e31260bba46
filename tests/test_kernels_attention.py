"""The kernels of attention (dV alone, rotary embedding) against float64, torch's own gradient and their twins."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from kernels import DEVICE, DTYPES, INTERPRETED, assert_close, coefficients, far_apart, poisoned, step
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

pytest.importorskip("triton")

from lxt import rules
from lxt.triton_kernels.rotary import TILE, rotary
from lxt.triton_kernels.value_attention import value_attention


@pytest.fixture(autouse=True)
def _eager_twins(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setenv("LXT_KERNELS", "off")


def tensors(
    dtype: torch.dtype = torch.float32,
    queries: int = 5,
    keys: int = 5,
    heads: int = 2,
    group: int = 1,
    width: int = 16,
    v_width: int = 0,
) -> list[Tensor]:
    shapes = [
        (2, heads * group, queries, width),
        (2, heads, keys, width),
        (2, heads, keys, v_width or width),
        (2, heads * group, queries, v_width or width),
    ]
    return [torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes]


def exact(
    q: Tensor, k: Tensor, c_out: Tensor, allowed: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """c_v = P^T c_out, in float64 and with the heads of a group added; and the same of absolute values."""
    q, k, c_out = q.double(), k.double(), c_out.double()
    group = q.shape[1] // k.shape[1]
    s = q @ k.repeat_interleave(group, 1).transpose(-1, -2) / q.shape[-1] ** 0.5
    if bias is not None:
        s = s + bias.double()
    if allowed is not None:
        s = s.masked_fill(~allowed, -torch.inf)
    p = torch.softmax(s, -1).nan_to_num(0.0)  # a query that sees nothing
    parts = [(p.mT @ c).unflatten(1, (-1, group)).sum(2) for c in (c_out, c_out.abs())]
    return parts[0], parts[1]


def causal(queries: int, keys: int, window: int | None = None) -> Tensor:
    distance = torch.arange(queries, device=DEVICE)[:, None] - torch.arange(keys, device=DEVICE)
    return (distance >= 0) & (distance < (window or queries + 1))


def assert_value_gradient(c: Tensor | None, expected: Tensor, size: Tensor) -> None:
    """Each number is a sum of products: the rounding is relative to their absolute values (P is rounded, too)."""
    assert c is not None
    limit = (2 * step(c.dtype) + 2**-18) * size + 1e-30
    assert ((c.double() - expected).abs() <= limit).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
def test_value_attention(is_causal, group, dtype):
    # More tokens than one tile holds, and not a multiple of it.
    q, k, v, c_out = tensors(dtype, 71, 71, heads=1, group=group, width=16)
    run = partial(value_attention, is_causal=is_causal, enable_gqa=group > 1)
    y, (c_q, c_k, c_v), _ = coefficients(run, q, k, v, c_y=c_out)
    assert c_q is None
    assert c_k is None
    twin = partial(rules.value_attention, is_causal=is_causal, enable_gqa=group > 1)
    assert torch.equal(y, twin(q, k, v))
    assert_value_gradient(c_v, *exact(q, k, c_out, causal(71, 71) if is_causal else None))
    if dtype == torch.float32:
        _, (_, _, expected), _ = coefficients(twin, q, k, v, c_y=c_out)
        assert expected is not None
        assert_close(c_v, expected, 2**-16, atol=2**-18)


@pytest.mark.parametrize("width", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_dimensions(dtype, width):
    q, k, v, c_out = tensors(dtype, 33, 33, heads=1, width=width)
    _, (_, _, c_v), _ = coefficients(partial(value_attention, is_causal=True), q, k, v, c_y=c_out)
    assert_value_gradient(c_v, *exact(q, k, c_out, causal(33, 33)))


def test_values_narrower_and_wider_than_keys():
    for width, v_width in ((24, 16), (16, 40)):
        q, k, v, c_out = tensors(queries=9, keys=9, width=width, v_width=v_width)
        _, (_, _, c_v), _ = coefficients(partial(value_attention, is_causal=True), q, k, v, c_y=c_out)
        assert_value_gradient(c_v, *exact(q, k, c_out, causal(9, 9)))


@pytest.mark.parametrize(("queries", "keys"), [(1, 7), (7, 1), (3, 70), (70, 3)], ids=str)
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
def test_other_numbers_of_keys_than_of_queries(is_causal, queries, keys):
    q, k, v, c_out = tensors(queries=queries, keys=keys)
    _, (_, _, c_v), _ = coefficients(partial(value_attention, is_causal=is_causal), q, k, v, c_y=c_out)
    assert_value_gradient(c_v, *exact(q, k, c_out, causal(queries, keys) if is_causal else None))


@pytest.mark.parametrize("window", [1, 2, 31, 33, 64, 100, 1000])
def test_sliding_windows(window):
    q, k, v, c_out = tensors(queries=101, keys=101, heads=1, group=2)
    run = partial(value_attention, is_causal=True, enable_gqa=True, window=window)
    y, (_, _, c_v), _ = coefficients(run, q, k, v, c_y=c_out)
    twin = rules.value_attention(q, k, v, is_causal=True, enable_gqa=True, window=window)
    assert torch.equal(y, twin)
    assert_value_gradient(c_v, *exact(q, k, c_out, causal(101, 101, window)))


def test_a_window_that_makes_no_sense_is_refused():
    q, k, v, _ = tensors()
    for options in ({"window": 3}, {"window": 0, "is_causal": True}, {"window": 3, "is_causal": True, "attn_mask": q}):
        with pytest.raises(ValueError, match="needs is_causal=True, no attn_mask"):
            rules.value_attention(q, k, v, **options)


@pytest.mark.parametrize("shape", [(2, 1, 37, 37), (2, 4, 37, 37), (1, 1, 1, 37), (37, 37)], ids=str)
@pytest.mark.parametrize("kind", ["bool", "float32", "most negative"])
def test_masks(kind, shape):
    q, k, v, c_out = tensors(queries=37, keys=37, heads=2, group=2)
    allowed = torch.rand(shape, device=DEVICE) < 0.5
    bias = None
    mask = allowed
    if kind == "float32":
        mask = bias = torch.where(allowed, torch.randn(shape, device=DEVICE), -torch.inf)
    elif kind == "most negative":  # transformers' masks; a row of them attends to all its keys alike
        mask = bias = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
        if shape[-2] > 1:
            mask[..., 3, :] = torch.finfo(torch.float32).min
    _, (_, _, c_v), _ = coefficients(partial(value_attention, attn_mask=mask, enable_gqa=True), q, k, v, c_y=c_out)
    if kind == "most negative" and bias is not None:  # float32 leaves nothing of a score beside it: neither may float64
        weak = (bias == bias.min()).expand(2, 4, 37, 37)
        bias = torch.where(weak.all(-1, keepdim=True), 0.0, bias)
        q_scores = torch.where(weak.all(-1, keepdim=True), 0.0, q)
        assert_value_gradient(c_v, *exact(q_scores, k, c_out, None, bias))
    else:
        assert_value_gradient(c_v, *exact(q, k, c_out, allowed, bias))


def test_tokens_far_apart():
    # Of the queries, then of the keys, 2^30 numbers: the fourth one's place does not fit 32 bits.
    for far in (0, 1):
        q, k, v, c_out = (x[:1, :1] for x in tensors(torch.float16, 4, 4, heads=1))
        parts = [q, k]
        parts[far] = far_apart(16)[None, None].copy_(parts[far])
        v.requires_grad_()
        (c_v,) = torch.autograd.grad(value_attention(*parts, v, is_causal=True), v, c_out)
        assert_value_gradient(c_v, *exact(q, k, c_out, causal(4, 4)))


def test_a_query_that_sees_nothing_gives_nothing():
    q, k, v, c_out = tensors()
    allowed = torch.ones(5, 5, dtype=torch.bool, device=DEVICE)
    allowed[2] = False
    _, (_, _, c_v), _ = coefficients(partial(value_attention, attn_mask=allowed), q, k, v, c_y=c_out)
    assert_value_gradient(c_v, *exact(q, k, c_out, allowed))


@pytest.mark.parametrize("size", [0.0, 1e-20, 300.0], ids=str)
def test_flat_and_sharp_attention(size):
    q, k, v, c_out = tensors(queries=40, keys=40)
    q = q * size
    _, (_, _, c_v), _ = coefficients(partial(value_attention, is_causal=True), q, k, v, c_y=c_out)
    expected, total = exact(q, k, c_out, causal(40, 40))
    # A score of 1000 is rounded by 1000 units before exp.
    assert ((c_v.double() - expected).abs() <= 2**-18 * (1 + 4 * size) * (total + c_out.abs().max())).all()


def test_layouts_of_models_and_empty_tensors():
    q, k, v, c_out = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors(queries=7, keys=7))
    wide = torch.cat((v, torch.full_like(v, torch.nan)), -1)[..., : v.shape[-1]]
    transposed = k.mT.contiguous().mT  # whose last dimension is not adjacent
    _, (_, _, c_v), _ = coefficients(partial(value_attention, is_causal=True), q, transposed, wide, c_y=c_out)
    assert_value_gradient(c_v, *exact(q, k, c_out, causal(7, 7)))
    _, (_, _, c_v), _ = coefficients(partial(value_attention, is_causal=True), q, k, v, c_y=c_out.mT.contiguous().mT)
    assert_value_gradient(c_v, *exact(q, k, c_out, causal(7, 7)))
    assert c_v is not None
    assert c_v.stride() == v.stride()
    _, (_, _, c_v), _ = coefficients(partial(value_attention, is_causal=True), q[:0], k[:0], v[:0], c_y=c_out[:0])
    assert c_v is not None
    assert c_v.shape == v[:0].shape


def angles(batch: int, tokens: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angle = torch.rand(batch, tokens, width // 2, device=DEVICE).repeat(1, 1, 2) * 6
    return angle.cos().to(dtype), angle.sin().to(dtype)


@pytest.mark.parametrize("by_token", [True, False], ids=["by token", "by head"])
@pytest.mark.parametrize(("batch", "width"), [(1, 16), (2, 10), (2, 80)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotary(dtype, batch, width, by_token):
    tokens = 2 * TILE // width + 5  # more than a program takes
    x = torch.randn(2, 3, tokens, width, device=DEVICE).to(dtype)
    x = x.transpose(1, 2).contiguous().transpose(1, 2) if by_token else x
    cos, sin = angles(batch, tokens, width, dtype)
    y, (c,), c_y = coefficients(lambda x: rotary(x, cos, sin, 0.25), x)
    twin, (expected,), _ = coefficients(lambda x: rules.rotary(x, cos, sin, 0.25), x, c_y=c_y)
    theirs, _ = apply_rotary_pos_emb(x, x, cos, sin)
    assert torch.equal(twin, theirs)
    assert y.stride() == x.stride()
    if INTERPRETED and dtype == torch.bfloat16:
        assert_close(y, twin, 3 * step(dtype), atol=2 * step(dtype))
    else:
        assert torch.equal(y, twin)
    assert c is not None
    assert c.stride() == x.stride()
    # In 16 bits the twin rounds its products; the kernel doesn't.
    assert_close(c, expected, 4 * step(dtype), atol=2**-22 if dtype == torch.float32 else 2 * step(dtype))
    leaf = x.double().requires_grad_()
    (exact,) = torch.autograd.grad(apply_rotary_pos_emb(leaf, leaf, cos.double(), sin.double())[0], leaf, c_y.double())
    assert_close(c, (exact / 4).to(dtype), 2 * step(dtype), atol=2**-22)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotary_of_a_part_of_each_head(dtype):
    # As GPT-NeoX and Phi-3 have it: a view into [batch, token, head, d_head], itself a part of one projection.
    q, k, _ = torch.randn(2, 9, 3 * 4 * 20, device=DEVICE).to(dtype).view(2, 9, 3, 4, 20).permute(2, 0, 3, 1, 4)
    cos, sin = angles(1, 9, 8, dtype)
    for x in (q[..., :8], k[..., :8]):
        y, (c,), c_y = coefficients(lambda x: rotary(x, cos, sin, 0.5), x)
        twin, (expected,), _ = coefficients(lambda x: rules.rotary(x, cos, sin, 0.5), x, c_y=c_y)
        assert_close(y, twin, 3 * step(dtype), atol=2 * step(dtype) + 2**-22)
        assert c is not None
        assert_close(c, expected, 4 * step(dtype), atol=2**-22 if dtype == torch.float32 else 2 * step(dtype))


def test_rotary_of_mixed_dtypes_is_the_models():
    x = torch.randn(2, 3, 5, 8, device=DEVICE).half()
    cos, sin = angles(1, 5, 8, torch.float32)
    y, (c,), c_y = coefficients(lambda x: rotary(x, cos, sin), x)
    twin, (expected,), _ = coefficients(lambda x: rules.rotary(x, cos, sin), x, c_y=c_y)
    assert torch.equal(y, twin)
    assert c is not None
    assert_close(c, expected, 4 * step(torch.float16), atol=2 * step(torch.float16))


def test_rotary_of_cosines_in_any_layout():
    x = torch.randn(2, 3, 6, 8, device=DEVICE)
    cos, sin = angles(2, 6, 8, torch.float32)
    expected = rules.rotary(x, cos, sin)
    assert torch.equal(rotary(x, cos.mT.contiguous().mT, sin.transpose(0, 1).contiguous().transpose(0, 1)), expected)
    assert torch.equal(rotary(x, cos[:1].expand(2, -1, -1), sin[:1]), rules.rotary(x, cos[:1], sin[:1]))


def test_rotary_of_tokens_far_apart():
    cos, sin = torch.ones(1, 4, 16, device=DEVICE).half(), torch.zeros(1, 4, 16, device=DEVICE).half()
    x = far_apart(16)[None, None]
    y = rotary(x.requires_grad_(), cos, sin)
    assert torch.equal(y, torch.ones_like(y))
    (c,) = torch.autograd.grad(y, x, far_apart(16)[None, None])
    assert torch.equal(c, torch.ones_like(c))


def test_rotary_of_strided_and_empty_gradients():
    x = torch.randn(2, 3, 6, 8, device=DEVICE)
    cos, sin = angles(1, 6, 8, torch.float32)
    _, (c,), c_y = coefficients(lambda x: rotary(x, cos, sin), x)
    for other in (c_y.mT.contiguous().mT, c_y.transpose(1, 2).contiguous().transpose(1, 2)):
        (strided,) = coefficients(lambda x: rotary(x, cos, sin), x, c_y=other)[1]
        assert torch.equal(strided, c)
    _, (c,), _ = coefficients(lambda x: rotary(x, cos, sin), x[:0])
    assert c.shape == x[:0].shape
    with poisoned():
        leaf = x.requires_grad_()
        rotary(leaf, cos, sin).sum().backward()  # a stride of 0
    assert leaf.grad.isfinite().all()


def test_twice_the_same_bits():
    q, k, v, c_out = tensors(torch.float32, 70, 70)
    runs = [coefficients(partial(value_attention, is_causal=True), q, k, v, c_y=c_out)[1][2] for _ in range(2)]
    assert torch.equal(*runs)


def test_the_interpreter_runs_only_where_there_is_no_gpu():
    import triton

    assert triton.knobs.runtime.interpret == INTERPRETED
