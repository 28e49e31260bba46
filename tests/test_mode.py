"""The operator mode: attention, modules, unknown operations, fields that ask for the gradient, odd company."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from by_hand import COLUMNS, CONSTANT, ROWS, agree, gradients, leaves, ratio_silu, share, share_matmul, share_product
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lxt.composites import ATTN_LRP, CP_LRP, GRADIENT, Composite
from lxt.graph import refuse_foreign_functions
from lxt.mode import RuleMode, UnknownOperation, plain_gradient

ONES = torch.ones(ROWS, ROWS, dtype=torch.float64)

# -- attention, routers


def eager_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    scores = torch.matmul(q, k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    scores = scores if mask is None else scores + mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float64).to(q.dtype)
    return F.dropout(weights, 0.5, training=True) @ v


def einsum_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("qd,kd->qk", q * q.shape[-1] ** -0.5, k).softmax(-1)
    return torch.einsum("qk,kd->qd", weights, v)


def baddbmm_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.baddbmm(ONES[None], q[None], k.T[None], beta=0, alpha=q.shape[-1] ** -0.5)
    return torch.bmm(scores.softmax(-1), v[None])[0]


SPELLINGS = {"eager": eager_attention, "einsum": einsum_attention, "baddbmm": baddbmm_attention}
KINDS = {
    "attnlrp": ATTN_LRP,
    "cp": CP_LRP,
    "gradient": GRADIENT,
    "value_only": ATTN_LRP.but(attention="value_only"),
    "factors": ATTN_LRP.but(qkv=(0.5, 0.5, 1.0)),
    "other factors": ATTN_LRP.but(qkv=(0.1, 0.1, 0.7)),
    "temperature": ATTN_LRP.but(softmax_temperature=2.0),
    "both": ATTN_LRP.but(softmax_temperature=2.0, qkv=(0.5, 0.5, 1.0)),
    "gradient at a temperature": GRADIENT.but(softmax_temperature=2.0),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_attention_written_out_is_attention_fused(kind, spelling):
    inputs = leaves(3)
    results = []
    for attention in (SPELLINGS[spelling], F.scaled_dot_product_attention):
        with RuleMode(KINDS[kind]):
            y = attention(*(x + 0 for x in inputs))
        results.append(gradients(y, inputs))
    for written, fused in zip(*results, strict=True):
        torch.testing.assert_close(written, fused, rtol=1e-11, atol=1e-13)


def test_attention_by_hand():
    q, k, v = leaves(3)
    for attention in (F.scaled_dot_product_attention, *SPELLINGS.values()):
        with RuleMode(ATTN_LRP):
            y = attention(q, k, v)
        by_hand = F.scaled_dot_product_attention(share(q, 0.25), share(k, 0.25), share(v, 0.5))
        for actual, expected in zip(gradients(y, [q, k, v]), gradients(by_hand, [q, k, v]), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_unequal_factors_need_a_fused_attention(spelling):
    composite, inputs = ATTN_LRP.but(qkv=(0.1, 0.3, 0.6)), leaves(3)
    with RuleMode(composite), pytest.raises(ValueError, match="sdpa"):
        SPELLINGS[spelling](*inputs)
    agree(
        F.scaled_dot_product_attention,
        lambda q, k, v: F.scaled_dot_product_attention(share(q, 0.1), share(k, 0.3), share(v, 0.6)),
        composite,
    )
    # a matrix product with a constant is none of attention's
    agree(lambda a: torch.einsum("ij,kj->ik", a @ CONSTANT.T, ONES), lambda a: a @ CONSTANT.T @ ONES, composite)


@pytest.mark.parametrize("router", ["uniform", "stop"])
def test_router(router):
    generator = torch.Generator().manual_seed(1)
    experts = torch.randn(2, COLUMNS, COLUMNS, generator=generator, dtype=torch.float64)

    def moe(x: Tensor, weigh: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        weights, chosen = torch.topk(torch.softmax(x[:, :2], -1, dtype=torch.float64), 1, dim=-1)
        weights = weights.to(x.dtype)
        out = torch.zeros_like(x)
        for i, expert in enumerate(experts):
            token, slot = torch.where(chosen == i)
            out.index_add_(0, token, weigh(x[token] @ expert, weights[token, slot, None]))
        return out

    def by_hand(h: Tensor, w: Tensor) -> Tensor:
        return h * w.detach() if router == "stop" else share(h, 0.5) * share(w, 0.5)

    agree(lambda x: moe(x, operator.mul), lambda x: moe(x, by_hand), ATTN_LRP.but(router=router))


CARRIERS = {
    "max": lambda weights: torch.max(weights, dim=-1).values.unsqueeze(-1),
    "amax": lambda weights: weights.amax(-1, keepdim=True),
    "sum of two": lambda weights: weights[..., :1] + weights[..., 1:2],
    "pad": lambda weights: F.pad(weights, (1, 0))[..., 1:],
    "as_strided": lambda weights: weights.contiguous().as_strided((ROWS, 1), (weights.shape[-1], 1)),
}


@pytest.mark.parametrize("carrier", CARRIERS)
def test_what_is_taken_of_softmax_weights_is_weights(carrier):
    def routed(x: Tensor, weigh: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return weigh(CARRIERS[carrier](torch.softmax(x, -1, dtype=torch.float64)).to(x.dtype), x)

    agree(
        lambda x: routed(x, operator.mul),
        lambda x: routed(x, lambda weights, x: weights.detach() * x),
        ATTN_LRP.but(router="stop"),
    )


@pytest.mark.parametrize("square", [torch.square, lambda x: x**2, lambda x: torch.pow(x, 2)])
def test_a_squared_relu_is_one_activation(square):
    agree(lambda x: square(torch.relu(x)), lambda x: square(torch.relu(x)), ATTN_LRP.but(activation="gradient"))
    agree(lambda x: square(torch.relu(x)), lambda x: x * torch.relu(x).detach())
    agree(lambda x: square(x), lambda x: x * x.detach(), ATTN_LRP.but(activation="gradient"))


def test_an_active_mask_takes_the_softmaxs_share_where_query_and_key_are_constants():
    def written(x: Tensor) -> Tensor:
        return share((x @ x.detach().mT).softmax(-1), 0.5) @ share(x, 0.5)

    (x,) = leaves(1)
    zero = torch.zeros_like(x)
    x4, zero4 = x[None, None], zero[None, None]
    with RuleMode(ATTN_LRP):
        mask = (x @ x.detach().mT)[None, None]
        y = F.scaled_dot_product_attention(zero4, zero4, x4, attn_mask=mask)[0, 0]
    for found, expected in zip(gradients(y, [x]), gradients(written(x), [x]), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


# -- functions that torch implements in Python


def encoder(x: Tensor, layer: nn.TransformerEncoderLayer, mask: Tensor | None) -> Tensor:
    """nn.TransformerEncoderLayer with relu, norms first, its constants detached and its products shared by hand."""

    def norm(x: Tensor, module: nn.LayerNorm) -> Tensor:
        sigma = (x.var(-1, correction=0, keepdim=True) + module.eps).sqrt().detach()
        return (x - x.mean(-1, keepdim=True)) / sigma * module.weight + module.bias

    x = x + attend(norm(x, layer.norm1), layer.self_attn, mask)
    h = F.linear(norm(x, layer.norm2), layer.linear1.weight, layer.linear1.bias)
    return x + F.linear(h * (h > 0), layer.linear2.weight, layer.linear2.bias)


def attend(x: Tensor, attention: nn.MultiheadAttention, mask: Tensor | None = None) -> Tensor:
    q, k, v = F.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
    q, k, v = (t.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(share(q, 0.25), share(k, 0.25), share(v, 0.5), attn_mask=mask)
    return F.linear(y.transpose(1, 2).flatten(2), attention.out_proj.weight, attention.out_proj.bias)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_multihead_attention_is_entered(need_weights, training, masked):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True, dtype=torch.float64)
    module.requires_grad_(False).train(training)
    mask = torch.full((5, 5), -torch.inf, dtype=torch.float64).triu(1) if masked else None
    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    with RuleMode(ATTN_LRP):
        y = module(x, x, x, need_weights=need_weights, attn_mask=mask)[0]
    torch.testing.assert_close(gradients(y, [x]), gradients(attend(x, module, mask), [x]), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(y, module.eval()(x, x, x, attn_mask=mask)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_transformer_encoder_layer_is_entered(training):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, 0.5, batch_first=True, norm_first=True, dtype=torch.float64)
    layer.requires_grad_(False).train(training)
    for parameter in layer.parameters():
        parameter.add_(torch.randn_like(parameter) / 3)
    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    with RuleMode(ATTN_LRP):
        y = layer(x)
    torch.testing.assert_close(gradients(y, [x]), gradients(encoder(x, layer, None), [x]), rtol=1e-11, atol=1e-13)


# -- unknown operations


class Foreign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx, c_y: Tensor) -> Tensor:
        return c_y * 2


UNKNOWN = {
    "linalg_svdvals": lambda x: torch.linalg.svdvals(x[:3, :3]),
    "cosine_similarity": lambda x: torch.cosine_similarity(x, x),
    "bilinear": lambda x: F.bilinear(x, x, torch.ones(2, 4, 4, dtype=x.dtype)),
    "lerp": lambda x: torch.lerp(x, x, 0.5),
    "erfinv": lambda x: torch.erfinv(x),
    "erfinv_": lambda x: (x * 1.0).erfinv_(),
    "addcdiv": lambda x: torch.addcdiv(x, x, x),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_operation_is_an_error_that_names_it_and_its_module(name):
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return UNKNOWN[name](x)

    (x,) = leaves(1)
    with RuleMode(ATTN_LRP), pytest.raises(UnknownOperation, match=rf"'{name}' in Odd \(test_mode\.py:\d+\)") as error:
        Odd()(x)
    assert error.value.operation == name
    assert f'lxt.declare("{name}", "linear")' in str(error.value)
    with RuleMode(GRADIENT), pytest.raises(UnknownOperation):
        Odd()(x)


@pytest.mark.parametrize("name", UNKNOWN)
def test_nothing_is_unknown_without_an_activation(name):
    (x,) = leaves(1)
    with RuleMode(ATTN_LRP):
        UNKNOWN[name](x.detach())
        with torch.no_grad():
            UNKNOWN[name](x)


def test_declared_operations():
    (x,) = leaves(1)
    with RuleMode(ATTN_LRP, {"linalg_svdvals": "linear"}):
        y = torch.linalg.svdvals(x[:3, :3])
    torch.testing.assert_close(gradients(y, [x]), gradients(torch.linalg.svdvals(x[:3, :3]), [x]))
    with RuleMode(ATTN_LRP, {"linalg_svdvals": "constant"}):
        assert not torch.linalg.svdvals(x[:3, :3]).requires_grad
    with RuleMode(ATTN_LRP, {"erfinv": "identity"}):
        y = torch.erfinv(x * 0.1)
    torch.testing.assert_close(gradients(y, [x]), gradients(x * (y / x).detach(), [x]))
    a, b = leaves(2)
    with RuleMode(ATTN_LRP, {"bilinear": "product"}):
        y = F.bilinear(a, b, CONSTANT[None].mT @ CONSTANT)
    by_hand = F.bilinear(share(a, 0.5), share(b, 0.5), CONSTANT[None].mT @ CONSTANT)
    torch.testing.assert_close(gradients(y, [a, b]), gradients(by_hand, [a, b]))
    with pytest.raises(ValueError, match="'linalg_svdvals' is declared 'plain'; allowed: linear, identity"):
        RuleMode(ATTN_LRP, {"linalg_svdvals": "plain"})


def test_foreign_autograd_functions_are_found_in_the_graph():
    (x,) = leaves(1)
    with RuleMode(ATTN_LRP):
        y = {"logits": [Foreign.apply(F.silu(x)).sum()]}
    with pytest.raises(UnknownOperation, match=r"Foreign.*torch\.autograd\.Function"):
        refuse_foreign_functions(y, x, {})
    refuse_foreign_functions(y, x, {"Foreign": "linear"})
    with RuleMode(ATTN_LRP):
        inside = F.silu(Foreign.apply(x) + 0)
        refuse_foreign_functions(inside * x, inside, {})  # the search ends at the inputs
        y = checkpoint(F.silu, x, use_reentrant=True)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        refuse_foreign_functions(y, x, {})


# -- fields that ask for the gradient


def hand_written_norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


NORMS = {
    "layer_norm": lambda x: F.layer_norm(x, (COLUMNS,)),
    "rms_norm": lambda x: F.rms_norm(x, (COLUMNS,)),
    "group_norm": lambda x: F.group_norm(x, 2),
}


@pytest.mark.parametrize(
    "function",
    [
        *NORMS.values(),
        F.silu,
        F.gelu,
        F.elu,
        torch.tanh,
        lambda a: a**3,
        hand_written_norm,
        lambda a: a * a.sigmoid(),
        lambda a: F.linear(a, a),
        F.glu,
        lambda a: a @ a.T,
        lambda a: 1 / (1 + a.exp()),
        lambda a: a.clone().mul_(a),
        lambda a: F.elu_(a * 1),
    ],
)
def test_the_gradient_preset_differentiates(function):
    agree(function, lambda a: function(a), GRADIENT)


@pytest.mark.parametrize("function", NORMS.values())
def test_gradient_of_a_norm_alone(function):
    agree(function, lambda a: function(a), Composite(norm="gradient"))


def test_gradient_of_activations_alone_still_marks_gates():
    agree(F.silu, lambda a: F.silu(a), Composite(activation="gradient"))
    agree(lambda a, b: F.elu(a) * b, lambda a, b: F.elu(a).detach() * b, CP_LRP.but(activation="gradient"))


def test_gradient_of_products_alone():
    composite = Composite(product="gradient")
    agree(lambda a, b: F.silu(a) * b, lambda a, b: ratio_silu(a) * b, composite)
    agree(lambda a, b: a @ b.T, share_matmul, composite)
    agree(hand_written_norm, lambda a: a * hand_written_norm(a).detach() / a.detach(), composite)


def test_gradient_of_attention_alone():
    composite = Composite(attention="gradient")
    agree(eager_attention_without_dropout, lambda q, k, v: eager_attention_without_dropout(q, k, v), composite)
    agree(lambda a, b: a * b, share_product, composite)


def eager_attention_without_dropout(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.T).softmax(-1) @ v


def test_the_gradient_of_a_norm_that_is_written_out_needs_that_of_products():
    (x,) = leaves(1)
    with RuleMode(Composite(norm="gradient")), pytest.raises(ValueError, match="product='gradient'"):
        hand_written_norm(x)
    agree(hand_written_norm, lambda a: hand_written_norm(a), Composite(norm="gradient", product="gradient"))


def test_plain_gradient_suspends_the_mode_of_this_thread():
    a, b = leaves(2)
    with RuleMode(ATTN_LRP):
        with plain_gradient():
            y = a * b
        with pytest.raises(KeyError), plain_gradient():
            raise KeyError
        z = a * b
    torch.testing.assert_close(gradients(y, [a, b]), gradients(a * b, [a, b]))
    torch.testing.assert_close(gradients(z, [a, b]), gradients(share_product(a, b), [a, b]))


# -- odd company


def test_dropout_is_inactive():
    (x,) = leaves(1)
    with RuleMode(ATTN_LRP):
        for y in (
            F.dropout(x, 0.9),
            nn.Dropout(0.9)(x),
            torch.dropout(x, 0.9, True),
            F.dropout1d(x, 0.9),
            F.alpha_dropout(x, 0.9, True),
        ):
            assert torch.equal(y, x)
        assert torch.equal(torch.native_dropout(x, 0.9, True)[0], x)
    assert not torch.equal(F.dropout(x, 0.9), x)


def test_batch_norm():
    mean, variance = CONSTANT[0], CONSTANT[0].abs() + 1
    agree(lambda a: F.batch_norm(a, mean, variance), lambda a: (a - mean) / (variance + 1e-5).sqrt())
    (x,) = leaves(1)
    # with the statistics of the batch it is a norm: an error, or their constants
    with RuleMode(ATTN_LRP):
        try:
            y = F.batch_norm(x, None, None, training=True)
        except ValueError:
            return
    sigma = (x.var(0, correction=0) + 1e-5).sqrt().detach()
    torch.testing.assert_close(gradients(y, [x]), gradients((x - x.mean(0)) / sigma, [x]))


def test_batch_norm_of_one_sample_whose_gradient_has_another_memory_format():
    # torch's own backward is wrong here by more than the gradient's size (torch 2.13, CPU)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, 4, 4, generator=generator, dtype=torch.float64).requires_grad_()
    c = torch.randn(1, 16, 3, generator=generator, dtype=torch.float64)
    mean, variance = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64), torch.tensor([1.0, 2.0, 3.0]).double()
    weight, bias = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64), mean
    expected = c.mT.reshape(1, 3, 4, 4) * (weight / (variance + 1e-5).sqrt()).view(1, 3, 1, 1)
    for rules in (ATTN_LRP, GRADIENT):
        for function in (
            lambda x: F.batch_norm(x, mean, variance, weight, bias),
            lambda x: torch.batch_norm(x, weight, bias, mean, variance, False, 0.1, 1e-5, True),
        ):
            with RuleMode(rules):
                y = function(x)
            assert torch.equal(y, function(x))
            found = torch.autograd.grad(y.flatten(2).transpose(1, 2), x, c)[0]
            torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)


def test_a_sampling_grid_is_constant():
    def sample(a: Tensor, b: Tensor) -> Tensor:
        return F.grid_sample(a[None, None], b.reshape(1, 3, 2, 2) * 0.3, align_corners=False)

    agree(sample, lambda a, b: sample(a, b.detach()))


def test_rotary_embeddings_with_complex_numbers():
    angles = torch.arange(6, dtype=torch.float64).view(3, 2)
    turn = torch.polar(torch.ones_like(angles), angles)

    def by_hand(a: Tensor) -> Tensor:
        real, imaginary = a.view(ROWS, 2, 2).unbind(-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), -1)

    (x,) = leaves(1)
    with RuleMode(ATTN_LRP):
        y = torch.view_as_real(torch.view_as_complex(x.view(ROWS, 2, 2)) * turn)
    torch.testing.assert_close(gradients(y, [x]), gradients(by_hand(x), [x]), rtol=1e-12, atol=1e-14)


def test_integers_indices_and_queries_pass():
    (x,) = leaves(1)
    with RuleMode(ATTN_LRP):
        chosen = x.argmax(-1)
        assert (chosen * 2 // 2).tolist() == chosen.tolist()
        y = x.gather(1, chosen[:, None]) * (x > 0).sum() * x.shape[0] * len(x)
    with torch.no_grad():
        scale = (x > 0).sum() * 9
    torch.testing.assert_close(gradients(y, [x]), gradients(x.max(1, keepdim=True).values * scale, [x]))


def test_a_trainable_parameter_from_outside_is_refused_and_a_frozen_one_is_a_constant():
    (x,) = leaves(1)
    weight = nn.Parameter(CONSTANT.clone())
    with RuleMode(ATTN_LRP):
        with pytest.raises(ValueError, match="trainable parameter of shape"):
            x * weight
        weight.requires_grad_(False)
        plain = x * weight
    torch.testing.assert_close(torch.autograd.grad(plain.sum(), x)[0], CONSTANT)


def test_autocast():
    (x,) = leaves(1, torch.float32)
    weight = CONSTANT.float()
    with torch.autocast("cpu", torch.bfloat16):
        with RuleMode(ATTN_LRP):
            h = F.linear(x, weight)
            y = F.silu(h) * F.layer_norm(h, (3,)) + eager_attention_without_dropout(h, h, h)
        plain = F.linear(x, weight)
        plain = F.silu(plain) * F.layer_norm(plain, (3,)) + eager_attention_without_dropout(plain, plain, plain)
    assert y.dtype == plain.dtype
    assert torch.equal(y, plain)
    assert gradients(y, [x])[0].isfinite().all()


def test_the_backward_may_run_inside_the_mode():
    a, b = leaves(2)
    with RuleMode(ATTN_LRP):
        (F.silu(a) * b).sum().backward()
        c = F.tanh(a) * b  # the mode is still on
    assert torch.allclose(b.grad, F.silu(a) / 2)
    torch.testing.assert_close(gradients(c, [b])[0] * 2, gradients(torch.tanh(a) * b, [b])[0])


def test_vmap_is_under_the_rules_or_refused():
    a, b = leaves(2)
    with warnings.catch_warnings(), RuleMode(ATTN_LRP):
        warnings.simplefilter("ignore")
        try:
            y = torch.func.vmap(operator.mul)(a, b)
        except RuntimeError:
            return
    torch.testing.assert_close(gradients(y, [a, b]), gradients(share_product(a, b), [a, b]))


def test_the_mode_ends_with_its_block_also_on_an_exception():
    a, b = leaves(2)
    with pytest.raises(KeyError), RuleMode(ATTN_LRP):
        raise KeyError
    torch.testing.assert_close(gradients(a * b, [a, b])[0] / 2, gradients(share_product(a, b), [a, b])[0])
