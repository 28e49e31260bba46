"""torchvision's vision transformers, as a model and, as lxt 2.1 had it, as the module `vision_transformer`."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from apart import import_apart
from torch import Tensor, nn

import lxt
from lxt import efficient
from lxt.audit import audit
from lxt.composites import ATTN_LRP, CP_LRP, Composite, Gamma
from lxt.efficient.models import get_default_map, vit_torch

VALUE_ONLY = ATTN_LRP.but(attention="value_only", name="value only")
GAMMA = ATTN_LRP.but(linear=Gamma(0.25), name="gamma")
CLOSE = 1e-12  # relative to the norm


@pytest.fixture
def module() -> ModuleType:
    return import_apart("torchvision.models.vision_transformer")


def stem(module: ModuleType) -> list:
    return [module.ConvStemConfig(8, 3, 2), module.ConvStemConfig(12, 3, 2), module.ConvStemConfig(12, 3, 2)]


VARIANTS = {
    "plain": lambda module: {},
    "with a representation before the head": lambda module: {"representation_size": 10},
    "with a convolutional stem": lambda module: {"conv_stem_configs": stem(module)},
}


def vit(module: ModuleType, variant: str = "plain", zero_biases: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = module.VisionTransformer(
        16, 8, 2, 4, 32, 40, dropout=0.3, attention_dropout=0.2, num_classes=3, **VARIANTS[variant](module)
    ).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.3)
            if zero_biases and any(part in name for part in ("bias", "pos_embedding", "class_token")):
                parameter.zero_()
        for name, statistic in model.named_buffers():
            if name.endswith("running_var"):
                statistic.uniform_(0.5, 2)
    return model.eval()


def images() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def relevance(model: nn.Module) -> tuple[Tensor, Tensor]:
    """[batch, channel, height, width], and the logit of the second class of the first image."""
    pixels = images().requires_grad_()
    logit = model(pixels)[0, 1]
    (c,) = torch.autograd.grad(logit, pixels)
    return (pixels * c).detach(), logit.detach()


def own_forwards(model: nn.Module) -> list[nn.Module]:
    return [part for part in model.modules() if "forward" in part.__dict__ or "__call__" in part.__dict__]


@pytest.mark.parametrize("rules", [CP_LRP, VALUE_ONLY, ATTN_LRP], ids=lambda rules: rules.name)
@pytest.mark.parametrize("variant", VARIANTS)
def test_conserves_and_agrees_with_the_auditor(module, variant, rules):
    model = vit(module, variant, zero_biases=True)
    plain = model(images())
    with lxt.monkey_patch(model, rules):
        torch.testing.assert_close(model(images()), plain, rtol=1e-13, atol=1e-13)
        found, logit = relevance(model)
    assert (abs(found.sum() - logit) < 1e-11 * abs(logit)) == rules.conserves
    audited = audit(model, {"x": images()}, lambda logits: logits[0, 1], rules, wrt="x")
    assert audited.unknown == ()
    assert (found - audited.relevance["x"]).norm() < CLOSE * found.norm()
    assert found[1].eq(0).all()  # the other image


@pytest.mark.parametrize("variant", VARIANTS)
def test_gamma_conserves(module, variant):
    model = vit(module, variant, zero_biases=True)
    found = []
    for linear, convolution in ((0.25, None), (0.05, 0.25), (100.0, 1.0)):
        rules = VALUE_ONLY.but(linear=Gamma(linear), convolution=convolution and Gamma(convolution))
        with lxt.monkey_patch(model, rules):
            relevances, logit = relevance(model)
        assert abs(relevances.sum() - logit) < 1e-10 * abs(logit)
        found.append(relevances)
    assert (found[0] - found[1]).norm() > 0.05 * found[0].norm()


@pytest.mark.parametrize("rules", [ATTN_LRP, CP_LRP, GAMMA], ids=lambda rules: rules.name)
def test_the_module_gives_what_the_model_gives(module, rules):
    model, later = vit(module), None
    before = {name: dict(vars(cls)) for name, cls in vars(module).items() if isinstance(cls, type)}
    plain = relevance(model)[0]
    with lxt.monkey_patch(model, rules):
        expected = relevance(model)[0]
    handle = lxt.monkey_patch(module, rules, verbose=True)
    assert torch.equal(relevance(model)[0], expected)
    later = vit(module)
    later.encoder.layers[0](torch.randn(1, 5, 32, dtype=torch.float64, requires_grad=True))  # a part of it, first
    assert torch.equal(relevance(later)[0], expected)
    assert "EncoderBlock" in handle.describe()
    handle.remove()
    for each in (model, later):
        assert torch.equal(relevance(each)[0], plain)
        assert not own_forwards(each)
    assert {name: dict(vars(cls)) for name, cls in vars(module).items() if isinstance(cls, type)} == before
    assert nn.MultiheadAttention.forward.__module__.startswith("torch.nn")


def test_a_patched_module_leaves_other_models_alone(module):
    torch.manual_seed(0)
    other = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval()
    x, c = torch.randn(1, 3, 4, requires_grad=True), torch.randn(1, 3, 4)
    (before,) = torch.autograd.grad(other(x), x, c)
    with lxt.monkey_patch(module):
        assert torch.equal(torch.autograd.grad(other(x), x, c)[0], before)


def test_an_exception_in_the_forward_leaves_the_model_as_it_was(module):
    model = vit(module)
    plain = relevance(model)[0]
    with lxt.monkey_patch(model), pytest.raises(AssertionError, match="Wrong image height"):
        model(torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    assert torch.equal(relevance(model)[0], plain)
    assert not own_forwards(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_in_training_mode_drops_nothing(module):
    model = vit(module)
    with lxt.monkey_patch(model):
        expected = relevance(model)[0]
        assert torch.equal(relevance(model.train())[0], expected)
        assert model.training


def test_without_a_patch_relevance_is_not_conserved(module):
    model = vit(module, zero_biases=True)
    found, logit = relevance(model)
    assert abs(found.sum() - logit) > 0.05 * abs(logit)


# -- upstream's program


def test_upstreams_default_map_stops_the_softmax(module):
    model = vit(module)
    assert get_default_map(module) is vit_torch.cp_LRP
    with efficient.monkey_patch(module, verbose=True) as handle:
        assert handle.rules == vit_torch.cp_LRP.rules
        found = relevance(model)[0]
    with lxt.monkey_patch(model, VALUE_ONLY):
        assert torch.equal(relevance(model)[0], found)


def test_upstreams_recipe_in_our_words(module):
    model = vit(module)
    rules = vit_torch.cp_LRP.rules
    assert rules is not None
    composite = rules.but(linear=Gamma(0.05), convolution=Gamma(0.25))
    with lxt.monkey_patch(model, composite):
        found = relevance(model)[0]
    written = Composite(attention="value_only", linear=Gamma(0.05), convolution=Gamma(0.25))
    with lxt.monkey_patch(model, written):
        assert torch.equal(relevance(model)[0], found)
