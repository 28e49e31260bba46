"""The gamma rule in whole vision transformers, against zennit's own Gamma and against the equation written out.

Both references take over the linear and convolution layers of a model that is under AttnLRP or CP-LRP otherwise. They
speak of relevances, we of coefficients c = R / x, so each is told R = z c of its output and asked for c = R / x.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from apart import import_apart
from equations import Float64, linear_gamma_rule
from models import build, inputs_of
from torch import Tensor, nn
from torch.nn import functional as F

import lxt
from lxt import efficient
from lxt.composites import ATTN_LRP, CP_LRP, Composite, Epsilon, Gamma
from lxt.linear_rules import linear
from lxt.patches import patch_map_for

# relative to the norm; float64 through two layers of 32 dimensions
CLOSE = 1e-10
REFERENCES = ("zennit", "equation")
COMPOSITES = {
    "attnlrp": ATTN_LRP.but(linear=Gamma(0.25)),
    "cp": CP_LRP.but(linear=Gamma(0.25)),
    "large": ATTN_LRP.but(linear=Gamma(100.0)),
    "one for each": ATTN_LRP.but(attention="value_only", linear=Gamma(0.05), convolution=Gamma(0.25)),
    "only convolutions": ATTN_LRP.but(convolution=Gamma(0.25)),
    "only linear layers": ATTN_LRP.but(linear=Gamma(0.25), convolution=Epsilon()),
}


def divided(relevance: Tensor, x: Tensor) -> Tensor:
    return torch.where(x == 0, 0, relevance / torch.where(x == 0, 1, x))


def under_zennit(layer: nn.Module, gamma: float) -> Callable[[], None]:
    """Hooks zennit's Gamma on a layer; returns how to take it off."""

    class InCoefficients(import_apart("zennit.rules").Gamma):
        def forward(self, module: nn.Module, input: tuple[Tensor, ...], output: Tensor) -> None:
            super().forward(module, input, output)
            self.stored_tensors["output"] = output.detach()

        def backward(self, module: nn.Module, grad_input: Any, grad_output: tuple[Tensor]) -> tuple[Tensor | None, ...]:
            relevance = super().backward(module, grad_input, (grad_output[0] * self.stored_tensors["output"],))
            x = self.stored_tensors["input"][0].detach()
            return tuple(None if r is None else divided(r, x) for r in relevance)

    hook = InCoefficients(gamma=gamma, stabilizer=0.0)
    handles = hook.register(layer)
    handles.append(hook)  # the handles know their hook weakly
    return handles.remove


class Written(torch.autograd.Function):
    """z = layer(x), and for the backward the equation, on x: [row, in]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, gamma: float) -> Tensor:
        z = F.linear(x, weight, bias)
        ctx.given, ctx.gamma = (x, weight, bias, z), gamma
        return z

    @staticmethod
    def backward(ctx: Any, c_z: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight, bias, z = (None if t is None else t.detach().numpy() for t in ctx.given)
        relevance = linear_gamma_rule(x, weight, bias, z, z * c_z.numpy(), gamma=ctx.gamma)
        return divided(torch.from_numpy(relevance), ctx.given[0].detach()), None, None, None


def under_equation(layer: nn.Module, gamma: float) -> Callable[[], None]:
    def forward(x: Tensor) -> Tensor:
        if isinstance(layer, nn.Linear):
            z = Written.apply(x.reshape(-1, x.shape[-1]), layer.weight, layer.bias, gamma)
            return z.view(*x.shape[:-1], -1)
        assert layer.kernel_size == layer.stride  # patches that don't overlap
        patches = F.unfold(x, layer.kernel_size, stride=layer.stride).transpose(1, 2)
        z = Written.apply(patches.reshape(-1, patches.shape[-1]), layer.weight.flatten(1), layer.bias, gamma)
        shape = [size // step for size, step in zip(x.shape[2:], layer.stride, strict=True)]
        return z.view(len(x), -1, z.shape[-1]).transpose(1, 2).reshape(len(x), -1, *shape)

    layer.forward = forward
    return partial(delattr, layer, "forward")


@contextmanager
def referred(model: nn.Module, composite: Composite, reference: str) -> Iterator[Composite]:
    """Meanwhile the reference has the layers that get Gamma; yields the composite of all the rest."""
    rules = {nn.Linear: composite.linear, nn.Conv2d: composite.convolution or composite.linear}
    take = under_zennit if reference == "zennit" else under_equation
    undo = [
        take(module, rule.gamma)
        for module in model.modules()
        for kind, rule in rules.items()
        if isinstance(module, kind) and isinstance(rule, Gamma)
    ]
    assert undo
    try:
        yield composite.but(linear=Epsilon(), convolution=None)
    finally:
        for each in undo:
            each()


def relevance(model: nn.Module, composite: Composite, x: Tensor, logit: Callable[[Any], Tensor]) -> Tensor:
    # the autograd functions of the references, whose gradient is the rule already
    patch_map = replace(patch_map_for(model), operations={"Identity": "linear", "Written": "linear"})
    x = x.detach().requires_grad_()
    with Float64(), lxt.monkey_patch(model, composite, patch_map):
        value = logit(model(x))
    (c,) = torch.autograd.grad(value, x)
    return (x * c).detach()


def assert_same(got: Tensor, expected: Tensor) -> None:
    assert (got - expected).norm() <= CLOSE * expected.norm()
    assert expected.norm() > 0


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("name", COMPOSITES)
def test_a_vit_of_transformers(name, reference):
    model, composite = build("vit"), COMPOSITES[name]
    x = inputs_of("vit")["pixel_values"]

    def logit(output):
        return output.logits[0, 1]

    ours = relevance(model, composite, x, logit)
    with referred(model, composite, reference) as rest:
        assert_same(ours, relevance(model, rest, x, logit))
    assert_same(relevance(model, composite, x, logit), ours)  # the reference left nothing behind
    plain = relevance(model, composite.but(linear=Epsilon(), convolution=None), x, logit)
    assert (plain - ours).norm() > 0.05 * ours.norm()


class WrittenAttention(nn.Module):
    """nn.MultiheadAttention with its projections as layers, for hooks on layers to find."""

    def __init__(self, packed: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads, width = packed.num_heads, packed.embed_dim
        self.projections = nn.ModuleList(nn.Linear(width, width, dtype=torch.float64) for _ in range(3))
        self.out = nn.Linear(width, width, dtype=torch.float64)
        with torch.no_grad():
            for layer, weight, bias in zip(
                self.projections, packed.in_proj_weight.chunk(3), packed.in_proj_bias.chunk(3), strict=True
            ):
                layer.weight.copy_(weight)
                layer.bias.copy_(bias)
            self.out.load_state_dict(packed.out_proj.state_dict())

    def forward(self, x: Tensor, *_: Tensor, need_weights: bool = False) -> tuple[Tensor, None]:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in self.projections)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2)), None


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("name", ["attnlrp", "cp", "one for each"])
def test_a_vit_of_torchvision(name, reference):
    vision_transformer = import_apart("torchvision.models.vision_transformer")
    torch.manual_seed(0)
    model = vision_transformer.VisionTransformer(16, 8, 2, 4, 32, 40, num_classes=3).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    x, composite = torch.randn(2, 3, 16, 16, dtype=torch.float64), COMPOSITES[name]

    def logit(logits):
        return logits[:, 1].sum()

    ours = relevance(model, composite, x, logit)
    for block in model.encoder.layers:
        block.self_attention = WrittenAttention(block.self_attention)
    with referred(model, composite, reference) as rest:
        assert_same(ours, relevance(model, rest, x, logit))


@pytest.mark.parametrize("layer", ["linear", "strided", "grouped", "dilated", "1d", "3d", "transposed", "reflected"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_single_layers_against_zennit(layer, with_bias):
    rules = import_apart("zennit.rules")
    torch.manual_seed(0)
    module, shape = {
        "linear": (nn.Linear(6, 5, with_bias), (2, 3, 6)),
        "strided": (nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=with_bias), (2, 3, 7, 6)),
        "grouped": (nn.Conv2d(4, 4, 3, groups=2, bias=with_bias), (2, 4, 5, 5)),
        "dilated": (nn.Conv2d(3, 4, 2, dilation=2, bias=with_bias), (2, 3, 5, 5)),
        "1d": (nn.Conv1d(3, 4, 3, bias=with_bias), (2, 3, 7)),
        "3d": (nn.Conv3d(2, 3, 2, bias=with_bias), (1, 2, 4, 3, 3)),
        "transposed": (nn.ConvTranspose2d(3, 4, 3, stride=2, bias=with_bias), (2, 3, 4, 4)),
        "reflected": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect", bias=with_bias), (2, 3, 5, 5)),
    }[layer]
    module = module.double().requires_grad_(False)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    model = nn.Sequential(module)
    with lxt.monkey_patch(model, Composite(linear=Gamma(0.25))):
        z = model(x)
    c_z = torch.randn_like(z)
    (c,) = torch.autograd.grad(z, x, c_z)

    hook = rules.Gamma(gamma=0.25, stabilizer=0.0)
    handles = hook.register(module)
    (expected,) = torch.autograd.grad(module(x), x, z.detach() * c_z)
    handles.remove()
    torch.testing.assert_close((x * c).detach(), expected, rtol=1e-11, atol=1e-12)


def test_where_zennit_stabilises_we_do_not():
    """zennit adds 1e-6 to its denominators, which takes relevance where z is small; ours keeps all of it."""
    rules = import_apart("zennit.rules")
    x = torch.tensor([[1.0, -1.0 + 1e-6]], dtype=torch.float64, requires_grad=True)
    layer = nn.Linear(2, 1, bias=False, dtype=torch.float64).requires_grad_(False)
    layer.weight.fill_(1.0)
    z = linear(x, layer.weight, None, F.linear, Gamma(1e-9))
    (c,) = torch.autograd.grad(z, x, 1 / z.detach())
    assert (x * c).sum().item() == pytest.approx(1, rel=1e-9)
    hook = rules.Gamma(gamma=1e-9)
    handles = hook.register(layer)
    (kept,) = torch.autograd.grad(layer(x), x, torch.ones_like(z))
    handles.remove()
    assert kept.sum().item() == pytest.approx(0.5, rel=1e-3)


def test_what_the_error_for_zennit_says_to_write_is_right():
    with pytest.raises(NotImplementedError) as error:
        efficient.monkey_patch_zennit()
    first, second = re.findall(r"rules=(lxt\.Composite\((?:[^()]|\([^()]*\))*\))", str(error.value))
    assert eval(first) == Composite(linear=Gamma(0.25))
    assert eval(second) == Composite(attention="value_only", linear=Gamma(0.05), convolution=Gamma(0.25))
