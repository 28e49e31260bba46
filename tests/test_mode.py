"""The operator mode: functions written in Python, unknown operations, odd company."""

from __future__ import annotations

import operator
import warnings

import pytest
import torch
import torch.nn.functional as F
from by_hand import (
    CONSTANT,
    ROWS,
    agree,
    eager_attention_without_dropout,
    gradients,
    leaves,
    share,
    share_product,
)
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from lxt.composites import ATTN_LRP, GRADIENT
from lxt.graph import refuse_foreign_functions
from lxt.mode import RuleMode, UnknownOperation, plain_gradient, unwatched

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


# -- odd company


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
        with torch.no_grad():
            for _ in range(2):
                assert torch.equal(F.dropout(x, 0.9), x)
                assert torch.equal(
                    F.scaled_dot_product_attention(x, x, x, dropout_p=0.9), F.scaled_dot_product_attention(x, x, x)
                )
    assert not torch.equal(F.dropout(x, 0.9), x)


DROPPING = {
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
    "dropout_": lambda x: torch.dropout_(x, 0.5, True),
    "F.dropout in place": lambda x: F.dropout(x, 0.5, inplace=True),
    "alpha_dropout_": lambda x: torch.alpha_dropout_(x, 0.5, True),
    "feature_dropout_": lambda x: torch.feature_dropout_(x, 0.5, True),
    "feature_alpha_dropout_": lambda x: torch.feature_alpha_dropout_(x, 0.5, True),
    "F.dropout": lambda x: F.dropout(x, 0.5),
}


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_of_constants_is_inactive(name):
    """With gradients on, though nothing of it requires grad."""
    drop, x = DROPPING[name], torch.randn(1, 6, 8, dtype=torch.float64)
    with RuleMode(ATTN_LRP):
        first, second = drop(x.clone()), drop(x.clone())
    assert torch.equal(first, second)
    assert torch.equal(first, F.scaled_dot_product_attention(x, x, x) if name == "attention" else x)
    assert not torch.equal(drop(x.clone()), drop(x.clone()))


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


class Watching(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        return func(*args, **(kwargs or {}))


def test_what_is_unwatched_runs_as_it_is_and_other_modes_still_see_it():
    a, b = leaves(2)

    def fails() -> None:
        raise KeyError

    with Watching() as outer, RuleMode(ATTN_LRP):
        y = unwatched(operator.mul, a, b)
        with pytest.raises(KeyError):
            unwatched(fails)
        z = a * b  # the mode is back
        assert outer.seen
        with Watching() as inner:
            w = unwatched(operator.mul, a, b)  # not innermost: nobody is sent away
        assert inner.seen
    torch.testing.assert_close(gradients(y, [a, b]), gradients(a * b, [a, b]))
    torch.testing.assert_close(gradients(unwatched(operator.mul, a, b), [a, b]), gradients(a * b, [a, b]))
    for shared in (z, w):
        torch.testing.assert_close(gradients(shared, [a, b]), gradients(share_product(a, b), [a, b]))


def test_a_mode_that_is_used_again_gives_the_same():
    a, b = leaves(2)
    mode = RuleMode(ATTN_LRP)
    for active in (False, True, False):
        with mode:
            y = (a if active else a.detach()) * b
        expected = share_product(a, b) if active else a.detach() * b
        torch.testing.assert_close(gradients(y, [a, b]), gradients(expected, [a, b]))


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
