"""lxt.declare reaches each kind of thing in a model, the auditor sees the same rule, and it can be undone."""

from __future__ import annotations

import copy
import functools
import pickle
import runpy
import threading
from pathlib import Path

import pytest
import torch
from declared import (
    Attend,
    FusedAttention,
    Mixer,
    assert_same,
    attention,
    fused,
    kernel,
    masked,
    of_the_patched,
    operation,
    rms,
    some,
    swiglu,
    undoing,
)
from models import build, inputs_of
from relevances import state
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lxt
from lxt.audit import audit
from lxt.mode import RuleMode

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "declare_attention.py"
PRESETS = (lxt.ATTN_LRP, lxt.CP_LRP, lxt.GRADIENT)
RULES = (*PRESETS, lxt.ATTN_LRP.but(attention="value_only"), lxt.ATTN_LRP.but(qkv=(0.5, 0.5, 1.0)))
by_name = pytest.mark.parametrize("rules", PRESETS, ids=lambda rules: rules.name)


@pytest.fixture
def undone():
    with undoing() as declare:
        yield declare


def made(kind, declare):
    """A model with a declared attention, activation and norm."""
    if kind == "a function":
        return Mixer(
            lxt.declare(kernel(attention), "attention"),
            lxt.declare(kernel(lambda x: F.silu(x)), "identity"),
            lxt.declare(kernel(rms), "norm"),
        )
    if kind == "an autograd function":
        declare(FusedAttention, "attention")
        return Mixer(fused)
    if kind == "an operation":
        declare(operation, "attention")
        return Mixer(operation)
    if kind == "an operation by name":
        declare("lxt_tests::attention", lambda query, key, value: attention(query, key, value))
        return Mixer(operation)
    if kind == "a reference":
        return Mixer(lxt.declare(kernel(attention), attention))
    attend = Attend()
    declare(Attend if kind == "a class" else attend, "attention")
    return Mixer(attend)


KINDS = (
    "a function",
    "an autograd function",
    "an operation",
    "an operation by name",
    "a reference",
    "a class",
    "an instance",
)


@pytest.mark.parametrize("rules", RULES, ids=lambda rules: f"{rules.name}-{rules.attention}-{rules.qkv[0]}")
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_thing_has_the_rule_in_a_model_and_the_auditor_agrees(kind, rules, undone):
    (x,) = some((6, 4))
    bare = Mixer(Attend.written if kind in ("a class", "an instance") else attention)(x)
    model = made(kind, undone)
    y, found = of_the_patched(model, rules, x)
    assert torch.equal(y, bare)
    audited = audit(model, {"x": x.detach()}, lambda y: y[-1].sum(), rules, "x")
    assert not audited.unknown
    torch.testing.assert_close((x * found).detach(), audited.relevance["x"], rtol=1e-9, atol=1e-12)
    if kind not in ("a class", "an instance"):  # whose declared rule covers a SiLU that has another
        _, expected = of_the_patched(Mixer(attention), rules, x)
        if rules.qkv[0] == rules.qkv[1]:
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    if rules.conserves:
        assert (x * found).sum().item() == pytest.approx(y[-1].sum().item(), rel=1e-9)


class Everything(nn.Module):
    """All other rules, with a mask that depends on the input, one tensor in several places, and constant operands."""

    def __init__(self, declare):
        super().__init__()
        self.product, self.gated = declare(lambda a, b, c: a * b * c, "product"), declare(swiglu, "gated")
        self.linear, self.constant = declare(lambda x: 3 * x.flip(-1), "linear"), declare(lambda x: x.cos(), "constant")
        self.attend = declare(masked, "attention")

    def forward(self, x):
        three = self.product(x, self.linear(x), x)
        two = self.product(x, x.detach(), x.flip(0))
        gates = self.gated(x, three) + self.gated(x.detach(), x) + self.gated(x, x.detach())
        parts = (x, x.detach(), x), (x.detach(), x, x), (x, x, x.detach()), (x, x, x)
        mixed = sum(self.attend(*part, mask=x @ x.mT) for part in parts)
        return mixed + self.constant(x) * two + gates


@pytest.mark.parametrize("rules", RULES, ids=lambda rules: f"{rules.name}-{rules.attention}-{rules.qkv[0]}")
def test_each_rule_is_the_auditors_too(rules):
    (x,) = some((4, 4))
    model = Everything(lambda function, rule: lxt.declare(kernel(function), rule))
    y, found = of_the_patched(model, rules, x)
    audited = audit(model, {"x": x.detach()}, lambda y: y[-1].sum(), rules, "x")
    assert not audited.unknown
    torch.testing.assert_close((x * found).detach(), audited.relevance["x"], rtol=1e-9, atol=1e-12)
    assert torch.equal(y, Everything(lambda function, rule: function)(x))


def test_a_wrong_rule_is_found_by_the_auditor():
    (x,) = some((6, 4))
    model = Mixer(attention, lxt.declare(kernel(lambda x: F.gelu(x)), "linear"))
    _, found = of_the_patched(model, "attnlrp", x)
    audited = audit(Mixer(attention, F.gelu), {"x": x.detach()}, lambda y: y[-1].sum(), "attnlrp", "x")
    assert (x * found - audited.relevance["x"]).abs().max().item() > 1e-3


@by_name
def test_what_is_declared_is_as_it_was_outside_of_patched_models(rules, undone):
    x, y, z = some((4, 3), (4, 3), (4, 3))
    c = torch.randn(4, 3, dtype=torch.float64)
    expected = torch.autograd.grad(attention(x, y, z), (x, y, z), c)
    undone(FusedAttention, "constant")
    undone(operation, "constant")
    function = lxt.declare(kernel(attention), "constant")
    assert function.__wrapped__ is not function
    found = []

    def elsewhere():
        found.extend(torch.autograd.grad(call(x, y, z), (x, y, z), c) for call in (fused, operation, function))

    with RuleMode(rules):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    elsewhere()
    assert len(found) == 6
    for gradients in found:
        assert_same(gradients, expected)


def test_none_takes_it_off_and_another_rule_switches():
    (x,) = some((6, 4))
    function = kernel(attention)
    once = lxt.declare(function, "attention")
    assert lxt.declare(once, None) is function
    assert lxt.declare(once, "linear").__wrapped__ is function
    attend = Attend()
    before = vars(attend).copy()
    lxt.declare(attend, "attention")
    lxt.declare(attend, "linear")
    assert lxt.declare(attend, None) is attend
    assert vars(attend) == before
    lxt.declare(FusedAttention, "linear")
    lxt.declare(FusedAttention, "attention")
    lxt.declare(FusedAttention, None)
    assert "apply" not in vars(FusedAttention)
    lxt.declare(operation, "linear")
    lxt.declare(operation, None)
    for attend in (fused, operation, function):
        with pytest.raises(lxt.UnknownOperation):
            of_the_patched(Mixer(attend), "attnlrp", x)


def test_a_decorator_gives_back_what_it_decorates():
    @lxt.declare("attention")
    class Mine(torch.autograd.Function):
        @staticmethod
        def forward(query, key, value):
            return attention(query, key, value)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        backward = staticmethod(FusedAttention.backward)

    @lxt.declare("attention")
    class Module(Attend):
        def forward(self, query, key, value):
            return Mine.apply(query, key, value)

    @lxt.declare("attention")
    def function(query, key, value):
        return Mine.apply(query, key, value)

    assert issubclass(Mine, torch.autograd.Function)
    assert issubclass(Module, nn.Module)
    (x,) = some((6, 4))
    _, expected = of_the_patched(Mixer(attention), "attnlrp", x)
    for attend in (lambda query, key, value: Mine.apply(query, key, value), Module(), function):
        assert_same(of_the_patched(Mixer(attend), "attnlrp", x)[1], expected)


def test_an_apply_of_its_own_comes_back():
    class Doubled(FusedAttention):
        @classmethod
        def apply(cls, *args):
            return 2 * super().apply(*args)

    before, (q, k, v), (x,) = vars(Doubled)["apply"], some((4, 3), (4, 3), (4, 3)), some((6, 4))
    lxt.declare(lxt.declare(Doubled, "linear"), "attention")
    assert_same(Doubled.apply(q, k, v), 2 * attention(q, k, v))
    by_hand = Mixer(lambda query, key, value: 2 * attention(query, key, value))
    declared = Mixer(lambda query, key, value: Doubled.apply(query, key, value))
    assert_same(of_the_patched(declared, "attnlrp", x)[1], of_the_patched(by_hand, "attnlrp", x)[1])
    lxt.declare(Doubled, None)
    assert vars(Doubled)["apply"] is before
    assert_same(Doubled.apply(q, k, v), 2 * attention(q, k, v))


def test_a_decorator_over_a_declared_function_is_not_what_was_declared():
    inner = lxt.declare(kernel(attention), "attention")

    @functools.wraps(inner)  # which copies the wrapper's attributes
    def outer(query, key, value):
        return 2 * inner(query, key, value)

    assert lxt.declare(outer, None) is outer
    assert lxt.declare(outer, "attention").__wrapped__ is outer
    assert lxt.declare(lxt.declare(outer, "attention"), None) is outer


def test_a_subclass_that_computes_something_else_has_no_rule():
    declared = lxt.declare(type("Declared", (FusedAttention,), {}), "attention")

    class Other(declared):
        @staticmethod
        def forward(ctx, query, key, value):
            return 2 * FusedAttention.forward(ctx, query, key, value)

    (x,) = some((6, 4))
    q, k, v = some((4, 3), (4, 3), (4, 3))
    assert_same(Other.apply(q, k, v), 2 * attention(q, k, v))
    with pytest.raises(lxt.UnknownOperation, match="Other"):
        of_the_patched(Mixer(lambda query, key, value: Other.apply(query, key, value)), "attnlrp", x)

    class Same(lxt.declare(type("Base", (Attend,), {}), "attention")):
        pass

    class Changed(Same):
        def forward(self, query, key, value):
            return self.call(query, key, value)

    of_the_patched(Mixer(Same()), "attnlrp", x)
    with pytest.raises(lxt.UnknownOperation):
        of_the_patched(Mixer(Changed()), "attnlrp", x)


def test_copies_and_pickles_of_a_declared_module_are_declared():
    (x,) = some((6, 4))
    layer = nn.Bilinear(4, 4, 4, bias=False).double()
    lxt.declare(layer, "product")
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        model = nn.Module()
        model.layer = other
        model.forward = lambda x, model=model: model.layer(x, x)
        y, found = of_the_patched(model, "attnlrp", x)
        assert (x * found).sum().item() == pytest.approx(y[-1].sum().item(), rel=1e-9)


def test_a_declared_module_of_a_mapped_architecture_wins_over_the_map():
    model = build("llama")
    inputs = inputs_of("llama")
    mlp = model.model.layers[1].mlp
    before = state(mlp)
    lxt.declare(mlp, "constant")
    with lxt.monkey_patch(model) as handle:
        assert "LlamaMLP as declared" in handle.describe()
        hidden = model.model(**inputs).last_hidden_state
        assert model(**inputs).logits.requires_grad
        seen = []
        hook = mlp.register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
        model(**inputs)
        hook.remove()
    assert seen == [False]
    assert hidden.requires_grad
    lxt.declare(mlp, None)
    assert state(mlp) == before


def test_a_modules_reference_gets_the_module():
    (x,) = some((6, 4))
    attend = lxt.declare(Attend(), lambda self, query, key, value: attention(self.inner(query), key, value))
    _, expected = of_the_patched(Mixer(Attend.written), "attnlrp", x)
    model = Mixer(attend)
    _, found = of_the_patched(model, "attnlrp", x)
    assert_same(found, expected)
    audited = audit(model, {"x": x.detach()}, lambda y: y[-1].sum(), "attnlrp", "x")
    torch.testing.assert_close((x * found).detach(), audited.relevance["x"], rtol=1e-9, atol=1e-12)


def test_the_auditor_leaves_no_forward_behind(undone):
    model = made("an instance", undone)
    before = state(model)
    (x,) = some((6, 4))
    audit(model, {"x": x.detach()}, lambda y: y[-1].sum(), "attnlrp", "x")
    with pytest.raises(ZeroDivisionError):
        audit(model, {"x": x.detach()}, lambda y: 1 / 0, "attnlrp", "x")
    assert state(model) == before


def test_a_patch_maps_operations_reach_the_auditor_too():
    (x,) = some((6, 4))
    patch_map = lxt.PatchMap(operations={"attention": "linear"})
    with lxt.monkey_patch(model := Mixer(operation), patch_map=patch_map):
        y = model(x)
    (found,) = torch.autograd.grad(y[-1].sum(), x)
    audited = audit(model, {"x": x.detach()}, lambda y: y[-1].sum(), "attnlrp", "x", operations={"attention": "linear"})
    assert not audited.unknown
    torch.testing.assert_close((x * found).detach(), audited.relevance["x"], rtol=1e-9, atol=1e-12)


def test_a_checkpointed_declared_function_is_refused():
    (x,) = some((6, 4))
    function = lxt.declare(kernel(attention), "attention")
    model = Mixer(lambda query, key, value: checkpoint(function, query, key, value, use_reentrant=False))
    with lxt.monkey_patch(model), pytest.raises(ValueError, match=r"'call' in Mixer .* checkpointed"):
        model(x)


def test_the_example_raises_declares_and_proves(capsys):
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    out = capsys.readouterr().out
    assert "no rule for 'FusedAttention'" in out
    assert out.count("check: passed  ") == 2
    assert out.count("could not judge") == 0
