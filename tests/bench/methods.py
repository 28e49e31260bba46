"""For cpu.py: what is timed, each as a case: made ready outside of the clock, called inside it.

The baseline is the plain model as one would run it for gradient x input: frozen weights, no cache, the head on the last
position alone, as two-dimensional input (`logits_to_keep=1` would take a bf16 path that is 50 times slower on a CPU).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

import lxt

__all__ = ["attribute", "checkpointed", "forward", "many_targets", "one_by_one", "patched", "plain", "step"]

Run = Callable[[], object]


def step(model: Any, embeds: Tensor) -> Tensor:
    """Forward and backward from the last position's largest logit; the gradient of the embeddings."""
    leaf = embeds.detach().clone().requires_grad_()
    hidden = model.model(inputs_embeds=leaf, use_cache=False).last_hidden_state
    return torch.autograd.grad(model.lm_head(hidden[:, -1]).max(), leaf)[0]


@contextmanager
def plain(model: Any, embeds: Tensor) -> Iterator[Run]:
    """The baseline."""
    yield partial(step, model, embeds)


@contextmanager
def forward(model: Any, embeds: Tensor) -> Iterator[Run]:
    """The plain forward, without a graph."""

    def run() -> Tensor:
        with torch.no_grad():
            return model.lm_head(model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state[:, -1])

    yield run


@contextmanager
def patched(model: Any, embeds: Tensor, rules: str = "attnlrp", patch_map: lxt.PatchMap | None = None) -> Iterator[Run]:
    """The baseline's own program on a patched model. An empty PatchMap leaves the operator mode alone."""
    with lxt.monkey_patch(model.model, rules, patch_map):
        yield partial(step, model, embeds)


@contextmanager
def attribute(model: Any, embeds: Tensor, rules: str = "attnlrp") -> Iterator[Run]:
    """What users call: patching, one forward, one backward, the relevance of each token; nothing made ready."""
    explainer = lxt.Attributor(model, rules=rules)
    yield partial(explainer.attribute, embeds.detach())


@contextmanager
def many_targets(model: Any, embeds: Tensor, count: int, rules: str = "attnlrp") -> Iterator[Run]:
    """`count` targets out of one forward."""
    explainer = lxt.Attributor(model, rules=rules)
    yield partial(explainer.attribute_targets, embeds.detach(), list(range(2, 2 + count)))


@contextmanager
def one_by_one(model: Any, embeds: Tensor, count: int, rules: str = "attnlrp") -> Iterator[Run]:
    """`count` targets, each with a forward of its own."""
    explainer = lxt.Attributor(model, rules=rules)
    yield lambda: [explainer.attribute(embeds.detach(), token) for token in range(2, 2 + count)]


@contextmanager
def checkpointed(model: Any) -> Iterator[None]:
    """Gradient checkpointing of each layer, in eval(): transformers asks the layer alone whether it is in training."""
    model.activation_checkpointing_enable({"use_reentrant": False})
    try:
        for layer in model.model.layers:
            layer.training = True
        yield
    finally:
        model.activation_checkpointing_disable()
        model.eval()
