"""Fused forwards stand in for the modules that they know: where one was changed, hooked or replaced, it is called."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import EXAMPLES, TOKENS, build, inputs_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as global_hooks
from torch.utils.hooks import RemovableHandle
from transformers.models.llama import modeling_llama

import lxt
from lxt.patches import patch_map_for
from lxt.patches._rotary import _is_half_turn
from lxt.patchmap import PatchMap
from lxt.rules import gated_product

PRESETS = [lxt.ATTN_LRP, lxt.CP_LRP]
over_presets = pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
Change = Callable[[nn.Module], Any]


def built(name: str) -> nn.Module:
    model = build(name, dtype=torch.float32)
    if name == "qwen3_moe":
        model.set_experts_implementation("batched_mm")  # one that leaves the gate to a method
    return model


def unchanged(model: nn.Module) -> None:
    pass


def explained(
    model: nn.Module, name: str, rules: lxt.Composite, patch_map: PatchMap | None = None, change: Change = unchanged
) -> tuple[Tensor, Tensor]:
    """The logits and the relevance, with the model changed once it is patched."""
    inputs = inputs_of(name, torch.float32)
    with lxt.monkey_patch(model, rules, patch_map):
        change(model)
        logits = model(**inputs).logits
        EXAMPLES[name].logit(logits).backward()
    return logits.detach(), torch.cat([(x.detach() * x.grad).flatten() for x in inputs.values()])


def assert_as_the_mode_alone(
    name: str,
    rules: lxt.Composite,
    change: Change = unchanged,
    after: bool = False,
    moves: bool = True,
    alone: PatchMap | None = None,
) -> None:
    """The changed model's own logits, and the relevance that the mode gives to it without any fused forward.

    Args:
        name: of the example.
        rules: the composite.
        change: what is done to the model.
        after: it is done to the patched model.
        moves: the change is seen in the logits.
        alone: the map to compare with; an empty one by default.
    """
    model, other = built(name), built(name)
    before = model(**inputs_of(name, torch.float32)).logits
    change(other)
    plain = other(**inputs_of(name, torch.float32)).logits
    assert torch.equal(plain, before) != moves
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("lxt.patches.has_gated_experts", lambda module: False)
        _, expected = explained(other, name, rules, alone or PatchMap())
    if not after:
        change(model)
    logits, relevance = explained(model, name, rules, change=change if after else unchanged)
    assert torch.equal(logits, plain)
    # float32 sums over 7 tokens, 40 dimensions and 2 layers, in two orders
    assert (relevance - expected).norm() < 1e-5 * expected.norm()


# -- what was replaced ------------------------------------------------------------------------------------------------


class OtherNorm(nn.Module):
    """With all that the fused norm would read."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = weight, 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class ScaledNorm(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 1.5


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(-2, keepdim=True)


class SeesItself(nn.Module):
    """Calls a layer with the mask by place."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        return self.layer(hidden_states, torch.eye(TOKENS, dtype=torch.bool)[None, None], **options)


LLAMA_NORM, BERT_NORM = "model.layers.1.post_attention_layernorm", "bert.encoder.layer.0.output.LayerNorm"
ACTIVATIONS = {
    "llama": "model.layers.0.mlp.act_fn",
    "phi3": "model.layers.0.mlp.activation_fn",
    "qwen3_moe": "model.layers.0.mlp.experts.act_fn",
}


def with_part(place: str, make: Callable[[nn.Module], nn.Module]) -> Change:
    def change(model: nn.Module) -> None:
        model.set_submodule(place, make(model.get_submodule(place)))

    return change


def with_forward(place: str, forward: Callable[[Tensor], Tensor]) -> Change:
    return lambda model: setattr(model.get_submodule(place), "forward", forward)


def another_layer_norm(old: nn.Module) -> nn.Module:
    norm = ScaledNorm(old.normalized_shape)
    norm.load_state_dict(old.state_dict())
    return norm


CHANGES: dict[str, tuple[str, Change]] = {
    "a norm with the same parts": ("llama", with_part(LLAMA_NORM, lambda old: OtherNorm(old.weight))),
    "torch's RMSNorm": ("llama", with_part(LLAMA_NORM, lambda old: nn.RMSNorm(32, eps=1e-6))),
    "a norm's forward": ("llama", with_forward(LLAMA_NORM, lambda x: x * 2.0)),
    "a LayerNorm's subclass": ("bert", with_part(BERT_NORM, another_layer_norm)),
    "a LayerNorm's forward": ("bert", with_forward(BERT_NORM, lambda x: x * 2.0)),
    "a dropout that does something": ("bert", with_forward("bert.encoder.layer.0.output.dropout", lambda x: x * 2.0)),
    "one token on many": (
        "bert",
        with_part("bert.encoder.layer.0.intermediate", lambda old: nn.Sequential(old, Mean())),
    ),
    "arguments by place": ("llama", with_part("model.layers.0", SeesItself)),
} | {
    f"{what} of {name}": (name, change(place))
    for name, place in ACTIVATIONS.items()
    for what, change in {
        "another activation": lambda place: with_part(place, lambda old: nn.ReLU()),
        "an unknown activation": lambda place: with_part(place, lambda old: nn.LeakyReLU()),
        "an activation's forward": lambda place: with_forward(place, lambda x: torch.tanh(x) * 2),
    }.items()
}


@over_presets
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("what", CHANGES)
def test_what_is_no_longer_what_was_known(what: str, after: bool, preset: lxt.Composite) -> None:
    name, change = CHANGES[what]
    assert_as_the_mode_alone(name, preset, change, after)


@over_presets
@pytest.mark.parametrize("make", [nn.SiLU, nn.Hardswish, nn.Mish, nn.ReLU])
def test_an_activation_that_writes_into_its_input(make: Callable[..., nn.Module], preset: lxt.Composite) -> None:
    for after in (False, True):
        change = with_part(ACTIVATIONS["llama"], lambda old: make(inplace=True))
        assert_as_the_mode_alone("llama", preset, change, after, moves=make is not nn.SiLU)


def a_class_of(name: str) -> type[nn.Module]:
    return type(built(name).get_submodule(ACTIVATIONS[name]))


ON_CLASSES = [
    ("llama", modeling_llama.LlamaRMSNorm, False),
    ("llama", modeling_llama.LlamaRMSNorm, True),
    ("bert", nn.LayerNorm, False),
    ("bert", nn.LayerNorm, True),
    *((name, a_class_of(name), False) for name in ACTIVATIONS),
    *((name, a_class_of(name), True) for name in ACTIVATIONS),
]


@pytest.mark.parametrize(("name", "cls", "after"), ON_CLASSES)
def test_a_forward_that_somebody_put_on_a_class(name: str, cls: type[nn.Module], after: bool) -> None:
    theirs = cls.forward
    with pytest.MonkeyPatch.context() as monkeypatch:

        def change(model: nn.Module) -> None:
            monkeypatch.setattr(cls, "forward", lambda self, x: theirs(self, x) * 1.5)

        change(built(name))
        inputs = inputs_of(name, torch.float32)
        plain = built(name)(**inputs).logits
        _, expected = explained(built(name), name, lxt.ATTN_LRP, PatchMap())
        if after:
            monkeypatch.undo()
        logits, relevance = explained(built(name), name, lxt.ATTN_LRP, change=change if after else unchanged)
    assert not torch.equal(built(name)(**inputs).logits, plain)
    assert torch.equal(logits, plain)
    assert (relevance - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("name", ["bert", *ACTIVATIONS])
@pytest.mark.parametrize("field", ["norm", "activation", "product"])
def test_a_composite_that_no_fused_forward_knows(field: str, name: str) -> None:
    rules, alone = lxt.ATTN_LRP.but(**{field: "gradient"}), PatchMap()
    if field == "norm" and name != "bert":  # which the mode refuses where a norm is written out
        whole = patch_map_for(built(name))
        alone = replace(whole, forwards={part: f for part, f in whole.forwards.items() if part.endswith("RMSNorm")})
    assert_as_the_mode_alone(name, rules, moves=False, alone=alone)


class LlamaRMSNorm(modeling_llama.LlamaRMSNorm):
    """As a modeling file of somebody's own has it, beside a layer of its own."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states)


def with_layers_of_its_own(forward: Callable[..., Tensor]) -> Change:
    layers = type(
        "LlamaDecoderLayer", (modeling_llama.LlamaDecoderLayer,), {"forward": forward, "__module__": __name__}
    )

    def change(model: nn.Module) -> None:
        for layer in model.model.layers:
            layer.__class__ = layers
            layer.post_attention_layernorm.__class__ = LlamaRMSNorm

    return change


def calling_more(self: Any, hidden_states: Tensor, **options: Any) -> Tensor:
    normed = self.input_layernorm(hidden_states)
    attended, _ = self.self_attn(hidden_states=normed, **options)
    summed = hidden_states.add(attended, alpha=0.5)
    normed = self.post_attention_layernorm(summed)
    return summed + self.mlp(normed)


def scaling(self: Any, hidden_states: Tensor, **options: Any) -> Tensor:
    normed = self.input_layernorm(hidden_states)
    attended, _ = self.self_attn(hidden_states=normed, **options)
    summed = hidden_states + 0.5 * attended
    normed = self.post_attention_layernorm(summed)
    return summed + 0.5 * self.mlp(normed)


@over_presets
@pytest.mark.parametrize("forward", [calling_more, scaling])
def test_a_layer_of_that_name_that_does_something_else(forward: Callable[..., Tensor], preset: lxt.Composite) -> None:
    assert_as_the_mode_alone("llama", preset, with_layers_of_its_own(forward))


# -- what is hooked ---------------------------------------------------------------------------------------------------

FUSED = [("llama", LLAMA_NORM), ("bert", BERT_NORM), *ACTIVATIONS.items()]
Hooked = Callable[[nn.Module, Callable], RemovableHandle]
HOOKS: dict[str, Hooked] = {
    "forward": lambda module, hook: module.register_forward_hook(hook),
    "before forward": lambda module, hook: module.register_forward_pre_hook(hook),
    "backward": lambda module, hook: module.register_full_backward_hook(hook),
    "before backward": lambda module, hook: module.register_full_backward_pre_hook(hook),
    "any forward": lambda module, hook: global_hooks.register_module_forward_hook(hook),
    "before any forward": lambda module, hook: global_hooks.register_module_forward_pre_hook(hook),
    "any backward": lambda module, hook: global_hooks.register_module_full_backward_hook(hook),
    "before any backward": lambda module, hook: global_hooks.register_module_full_backward_pre_hook(hook),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize(("name", "place"), FUSED, ids=[name for name, _ in FUSED])
def test_a_hook_on_a_part_is_called(name: str, place: str, kind: str) -> None:
    model, seen = built(name), []
    _, before = explained(model, name, lxt.ATTN_LRP)
    part = model.get_submodule(place)
    handle = HOOKS[kind](part, lambda module, *_: seen.append(module))
    try:
        _, after = explained(model, name, lxt.ATTN_LRP)
    finally:
        handle.remove()
    assert seen.count(part) == 1
    assert (after - before).norm() < 1e-5 * before.norm()


# -- rotary -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["meta", None])
def test_a_rotary_embedding_is_tried_on_the_cpu(device: str | None) -> None:
    """Whatever device new tensors go to when the first model is patched."""

    def apply(*operands: Any) -> Any:  # new to the cache
        return modeling_llama.apply_rotary_pos_emb(*operands)

    with torch.device(device) if device else nullcontext():
        assert _is_half_turn(apply, 8)
    assert _is_half_turn(apply, 8)


# -- gated products ---------------------------------------------------------------------------------------------------


def test_a_gated_product_writes_into_nothing_of_the_callers() -> None:
    """An activation may hand its input back, as dropout and Identity do."""
    gate, up = torch.randn(2, 5, 9, dtype=torch.float64)
    before = gate.clone()
    gate, up = gate.requires_grad_(), up.requires_grad_()
    y = gated_product(gate, up, nn.Identity().forward, torch.ones_like)
    assert torch.equal(y, before * up)
    assert torch.equal(gate, before)
    found = torch.autograd.grad(y.sum(), (gate, up))
    torch.testing.assert_close(found, (up / 2, before / 2))


@pytest.mark.parametrize("stop_gate", [False, True])
def test_a_gated_product_has_the_wider_dtype_and_shape(stop_gate: bool) -> None:
    gate, up = torch.randn(5, 9).bfloat16().requires_grad_(), torch.randn(5, 9).requires_grad_()
    y = gated_product(gate, up, F.silu, "silu", stop_gate)
    assert y.dtype == torch.float32
    assert torch.equal(y, F.silu(gate) * up)
    (c_up,) = torch.autograd.grad(y.sum(), up)
    torch.testing.assert_close(c_up, F.silu(gate.detach().float()) * (1 if stop_gate else 0.5), rtol=2**-8, atol=0)
    with torch.no_grad():
        assert torch.equal(gated_product(gate[:, :1], up, F.silu, "silu", stop_gate), F.silu(gate[:, :1]) * up)
        assert torch.equal(gated_product(gate, up[:, :1], F.silu, "silu", stop_gate), F.silu(gate) * up[:, :1])
        one = gate[:, :1].float()  # of one dtype, too
        assert torch.equal(gated_product(one, up, F.silu, "silu", stop_gate), F.silu(one) * up)
    one = one.requires_grad_()
    narrow, full = (gated_product(x, up, F.silu, "silu", stop_gate) for x in (one, one.expand(5, 9)))
    found, expected = (torch.autograd.grad(y.square().sum(), up, retain_graph=True)[0] for y in (narrow, full))
    torch.testing.assert_close(found, expected)
    if not stop_gate:
        torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), one)[0] for y in (narrow, full)))
