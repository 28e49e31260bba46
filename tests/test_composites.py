"""Composites: what they refuse, what the presets are, how to derive one from another."""

from __future__ import annotations

import dataclasses

import pytest

from lxt.composites import ATTN_LRP, CP_LRP, GRADIENT, PRESETS, Composite, Epsilon, Gamma, resolve

CHOICES = {
    "activation": ("identity", "gradient"),
    "norm": ("identity", "gradient"),
    "product": ("uniform", "stop_gate", "gradient"),
    "attention": ("uniform", "value_only", "gradient"),
    "router": ("uniform", "stop"),
}


@pytest.mark.parametrize(("field", "values"), CHOICES.items())
def test_every_choice_is_allowed_and_the_first_is_the_default(field, values):
    assert getattr(Composite(), field) == values[0]
    assert [getattr(Composite(**{field: value}), field) for value in values] == list(values)


@pytest.mark.parametrize("field", CHOICES)
@pytest.mark.parametrize("value", ["Identity", "", None, 1, ["uniform"]], ids=repr)
def test_another_value_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field) as error:
        Composite(**{field: value})
    assert repr(value) in str(error.value)
    assert all(choice in str(error.value) for choice in CHOICES[field])


@pytest.mark.parametrize(
    "factors", [(0.5, 0.5), (0.5, 0.5, -1), (0.5, 0.5, "1"), (), (0.5, 0.5, float("nan"))], ids=repr
)
def test_qkv_takes_three_factors(factors):
    with pytest.raises(ValueError, match="query, key and value"):
        Composite(qkv=factors)


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan")])
def test_temperature_is_positive(temperature):
    with pytest.raises(ValueError, match="softmax_temperature"):
        Composite(softmax_temperature=temperature)


@pytest.mark.parametrize("linear", ["epsilon", 0.25, None, Gamma])
def test_linear_takes_a_rule(linear):
    with pytest.raises(TypeError, match=r"lxt\.Epsilon\(\.\.\.\) or lxt\.Gamma\(\.\.\.\)"):
        Composite(linear=linear)


@pytest.mark.parametrize("convolution", ["epsilon", 0.25, Gamma, False])
def test_convolutions_take_a_rule_or_that_of_linear_layers(convolution):
    with pytest.raises(TypeError, match=r"Composite\(convolution=.*lxt\.Gamma\(\.\.\.\), or None"):
        Composite(convolution=convolution)
    assert Composite(linear=Gamma()).convolution is None
    assert Composite(convolution=Gamma()).but(convolution=None) == Composite(name="custom*")


@pytest.mark.parametrize("epsilon", [-1e-9, float("nan")])
def test_epsilon_is_not_negative(epsilon):
    with pytest.raises(ValueError, match=">= 0"):
        Epsilon(epsilon)


@pytest.mark.parametrize("gamma", [0, -0.1, float("nan")])
def test_gamma_is_positive(gamma):
    with pytest.raises(ValueError, match="> 0"):
        Gamma(gamma)


def test_presets():
    assert PRESETS == {"attnlrp": ATTN_LRP, "cp": CP_LRP, "gradient": GRADIENT}
    assert ATTN_LRP == Composite(name="attnlrp")
    assert ATTN_LRP.qkv == (0.25, 0.25, 0.5)
    assert (CP_LRP.product, CP_LRP.attention, CP_LRP.router) == ("stop_gate", "value_only", "stop")
    assert {GRADIENT.activation, GRADIENT.norm, GRADIENT.product, GRADIENT.attention} == {"gradient"}
    assert all(preset.linear == Epsilon(0) for preset in PRESETS.values())


def test_a_composite_is_a_value():
    assert Composite() == Composite()
    assert hash(Composite(linear=Gamma(1.0))) == hash(Composite(linear=Gamma(1.0)))
    assert Composite() != Composite(product="gradient")
    with pytest.raises(dataclasses.FrozenInstanceError):
        ATTN_LRP.product = "gradient"


def test_but_changes_a_copy_and_says_so_in_the_name():
    changed = ATTN_LRP.but(attention="value_only")
    assert (changed.attention, changed.name) == ("value_only", "attnlrp*")
    assert ATTN_LRP.attention == "uniform"
    assert dataclasses.replace(changed, attention="uniform", name="attnlrp") == ATTN_LRP
    assert ATTN_LRP.but(linear=Gamma(), name="vision").name == "vision"


def test_but_validates():
    with pytest.raises(TypeError, match=r"no field temperature; it has .*softmax_temperature"):
        ATTN_LRP.but(temperature=2.0)
    with pytest.raises(ValueError, match="attention"):
        ATTN_LRP.but(attention="values")


def test_resolve():
    mine = Composite(product="gradient")
    assert resolve(mine) is mine
    assert [resolve(name) for name in PRESETS] == list(PRESETS.values())
    with pytest.raises(ValueError, match="'attn_lrp'; allowed: attnlrp, cp, gradient"):
        resolve("attn_lrp")
    with pytest.raises(TypeError, match="got dict"):
        resolve({})


@pytest.mark.parametrize(
    ("composite", "conserves"),
    [
        (CP_LRP, True),
        (ATTN_LRP.but(attention="value_only"), True),
        (CP_LRP.but(linear=Gamma()), True),
        (ATTN_LRP, False),
        (GRADIENT, False),
        (CP_LRP.but(product="gradient"), False),
        (CP_LRP.but(activation="gradient"), False),
        (CP_LRP.but(norm="gradient"), False),
        (CP_LRP.but(linear=Epsilon(0.1)), False),
        (CP_LRP.but(convolution=Gamma()), True),
        (CP_LRP.but(convolution=Epsilon(0.1)), False),
        (CP_LRP.but(linear=Gamma(), convolution=Epsilon()), True),
    ],
)
def test_which_composites_conserve(composite, conserves):
    assert composite.conserves is conserves
