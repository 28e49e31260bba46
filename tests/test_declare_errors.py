"""What lxt.declare refuses, and whether an error says what a newcomer needs."""

from __future__ import annotations

import pickle
import re

import pytest
import torch
from declared import (
    FusedAttention,
    Mixer,
    assert_same,
    attention,
    fused,
    of_the_patched,
    operation,
    some,
    undoing,
)
from torch import nn
from torch.nn import functional as F

import lxt
from lxt.declarations import declared_operations


@pytest.fixture
def undone():
    with undoing() as declare:
        yield declare


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((fused, "bilinear"), ValueError, "fused can't be declared 'bilinear'; rules: linear, identity, norm"),
        ((fused,), TypeError, r"lxt.declare\(thing, rule\) needs both, got fused alone"),
        (("frobnicate",), TypeError, r"needs both, got 'frobnicate' alone; as a decorator it takes a rule"),
        (("mul", "linear"), ValueError, r"'mul' has a rule already.*PatchMap\(operations={\"mul\": \"linear\"}\)"),
        ((torch.exp, "identity"), ValueError, "'exp' has a rule already"),
        ((F.gelu, "linear"), ValueError, "'gelu' has a rule already"),
        ((torch.ops.aten.view.default, "linear"), ValueError, "'view' has a rule already"),
        ((nn.Bilinear, "product"), ValueError, "Bilinear is torch's, and every model"),
        ((3, "linear"), TypeError, "int can't have a rule: declare a function"),
        ((dict, "linear"), TypeError, "dict can't have a rule"),
        ((lambda hidden: hidden, "attention"), ValueError, r"takes \(hidden\), not query, key and value"),
        ((nn.Linear(2, 2), "attention"), ValueError, r"Linear is declared 'attention', but takes \(input\)"),
        ((lambda x: x, "gated"), ValueError, r"takes \(x\), not gate and up, in this order"),
    ],
)
def test_a_declaration_that_cannot_be_is_refused(arguments, error, match):
    with pytest.raises(error, match=match):
        lxt.declare(*arguments)
    assert not declared_operations()


def advice(error):
    """The lines of code in an error's text."""
    return "\n".join(re.findall(r"^    ((?:import |lxt\.declare).*)$", str(error.value), re.MULTILINE))


def test_the_errors_own_advice_helps_with_an_operation(undone):
    (x,) = some((6, 4))
    with pytest.raises(lxt.UnknownOperation, match=r"'attention' in Mixer \(declared.py:\d+\)") as error:
        of_the_patched(Mixer(operation), "attnlrp", x)
    assert "(float64 [6, 4], float64 [6, 4], float64 [6, 4])" in str(error.value)
    assert advice(error) == 'lxt.declare("attention", "linear")'
    exec(advice(error), {"lxt": lxt})
    of_the_patched(Mixer(operation), "attnlrp", x)
    undone("attention", "linear")


def test_the_errors_own_advice_helps_with_an_autograd_function(undone):
    (x,) = some((6, 4))
    with pytest.raises(lxt.UnknownOperation, match=r"autograd.Function in \w+, declared.py:\d+\)") as error:
        of_the_patched(Mixer(fused), "attnlrp", x)
    assert "it takes (query, key, value)" in str(error.value)
    assert advice(error) == 'import declared\nlxt.declare(declared.FusedAttention, "attention")'
    exec(advice(error), {"lxt": lxt})
    of_the_patched(Mixer(fused), "attnlrp", x)
    undone(FusedAttention, "attention")


def test_a_reference_to_apply_from_before_is_explained(undone):
    (x,) = some((6, 4))
    before = FusedAttention.apply
    undone(FusedAttention, "attention")
    with pytest.raises(lxt.UnknownOperation, match="declared, but was called past the declaration"):
        of_the_patched(Mixer(lambda query, key, value: before(query, key, value)), "attnlrp", x)


def test_vmap_is_explained_and_its_caller_can_be_declared():
    (x,) = some((6, 4))

    def by_row(x):
        return torch.func.vmap(lambda row: row * 3)(x)

    with pytest.raises(
        lxt.UnknownOperation, match=r"'vmap'.*\(test_declare_errors.py:\d+\): inside torch.vmap"
    ) as error:
        of_the_patched(Mixer(attention, by_row), "attnlrp", x)
    assert 'module.function = lxt.declare(module.function, "linear")' in str(error.value)
    _, expected = of_the_patched(Mixer(attention, lambda x: 3 * x), "attnlrp", x)
    assert_same(of_the_patched(Mixer(attention, lxt.declare(by_row, "linear")), "attnlrp", x)[1], expected)


def test_unknown_operations_can_be_pickled():
    (x,) = some((6, 4))
    with pytest.raises(lxt.UnknownOperation) as error:
        of_the_patched(Mixer(fused), "attnlrp", x)
    again = pickle.loads(pickle.dumps(error.value))
    assert (again.operation, str(again)) == ("FusedAttention", str(error.value))
