"""What the tests of patching measure: relevance of a tiny model, and everything that a patch could leave behind."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from models import EXAMPLES, build, inputs_of
from torch import Tensor, nn

import lxt


def relevance(model: nn.Module, name: str = "llama", **options: object) -> Tensor:
    """Input * gradient of the example's logit, for all of its inputs in one row."""
    inputs = inputs_of(name, next(model.parameters()).dtype)
    logits = model(**inputs, **options)[0]
    gradients = torch.autograd.grad(EXAMPLES[name].logit(logits), tuple(inputs.values()))
    return torch.cat([(x * g).detach().flatten() for x, g in zip(inputs.values(), gradients, strict=True)])


def under_each(rules: Iterable[str]) -> dict[str | None, Tensor]:
    """Relevance of a fresh llama under each of the rules, None being unpatched."""
    values: dict[str | None, Tensor] = {None: relevance(build("llama"))}
    for name in rules:
        model = build("llama")
        with lxt.monkey_patch(model, name):
            values[name] = relevance(model)
    return values


def state(model: nn.Module) -> list[tuple]:
    """What every module of the model holds, by identity: attributes, hooks, flags, parameters."""
    return [
        (
            {key: id(value) for key, value in module.__dict__.items() if not key.startswith("_")},
            {key: list(value) for key, value in module.__dict__.items() if isinstance(value, dict)},
            sorted(module.__dict__),
            module.training,
            module._forward_hooks.copy(),
            [(parameter.requires_grad, id(parameter)) for parameter in module.parameters(recurse=False)],
        )
        for module in model.modules()
    ]
