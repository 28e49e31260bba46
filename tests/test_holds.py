"""Changes that runs share: made once, undone by the last, on every part of a model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lxt.holds import Holds, make_constant, make_still, parts_of


class Tied(nn.Module):
    """A module used twice, a parameter used twice, and slots that are empty."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2, bias=False))
        self.again = self.first
        self.head = nn.Linear(2, 2)
        self.head.weight = self.first[0].weight
        self.empty = None
        self.register_module("absent", None)
        self.scale = nn.Parameter(torch.ones(1))


def test_parts_are_those_that_torch_names():
    model = Tied()
    modules, parameters = parts_of(model)
    assert len(modules) == len(set(modules)) == len(list(model.modules()))
    assert set(modules) == set(model.modules())
    assert len(parameters) == len(list(model.parameters()))
    assert {id(p) for p in parameters} == {id(p) for p in model.parameters()}


def test_the_last_of_overlapping_runs_undoes():
    model, holds = Tied().train(), Holds()
    frozen = model.head.bias.requires_grad_(False)
    modules, parameters = parts_of(model)
    with holds.hold(parameters, make_constant), holds.hold(modules, make_still):
        with pytest.raises(KeyError), holds.hold(parameters, make_constant), holds.hold(modules, make_still):
            raise KeyError
        assert not any(parameter.requires_grad for parameter in parameters)
        assert not any(module.training for module in modules)
    assert [p for p in parameters if not p.requires_grad] == [frozen]
    assert all(module.training for module in modules)


def test_a_change_that_fails_leaves_nothing_changed():
    good = nn.Parameter(torch.ones(1))
    computed = nn.Parameter(torch.ones(1)) * 2
    with pytest.raises(ValueError, match="computed from others"), Holds().hold([good, computed], make_constant):
        pass
    assert good.requires_grad
