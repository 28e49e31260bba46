"""The last layer at the explained positions only: the same logits and gradients, with less work."""

from __future__ import annotations

import pytest
import torch
from equations import Float64
from models import DECODERS, HIDDEN, TOKENS, build
from torch import Tensor, nn

import lxt
from lxt.lastlayer import only_at
from lxt.latents import residual_layers
from lxt.patches import patch_map_for

MODELS = [
    (name, attention)
    for name in (*DECODERS, "qwen3_moe")
    for attention in ("eager", "sdpa")
    if (name, attention) != ("gemma2", "sdpa")
]
LAST = torch.tensor([[TOKENS - 1], [TOKENS - 1]])
SOME = torch.tensor([[2, 4], [3, TOKENS - 1]])
PADDED = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * TOKENS])


def explained(model: nn.Module, places: Tensor, mask: Tensor | None, narrow: bool) -> tuple[Tensor, Tensor, list[int]]:
    """Logits at `places`, the embeddings' gradient, and how many positions the last layer's last linear map saw."""
    layer = residual_layers(model, patch_map_for(model))[-1]
    linear = [
        module for module in layer.modules() if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    ]
    seen: list[int] = []
    handle = linear[-1].register_forward_hook(lambda module, args, output: seen.append(args[0].flatten(0, -2).shape[0]))
    embeds = torch.randn(2, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    embeds.requires_grad_()
    with Float64(), lxt.monkey_patch(model), only_at(layer if narrow else None, places):
        logits = model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits
    handle.remove()
    logits = logits[torch.arange(2)[:, None], places]
    (gradient,) = torch.autograd.grad(logits[..., 5].sin().sum(), embeds)
    return logits.detach(), gradient, seen


@pytest.mark.parametrize(("name", "attention"), MODELS)
@pytest.mark.parametrize("mask", [None, PADDED], ids=["no mask", "left padding"])
@pytest.mark.parametrize("places", [LAST, SOME], ids=["last", "some"])
def test_it_is_exact_and_does_less(name: str, attention: str, mask: Tensor | None, places: Tensor) -> None:
    model = build(name, attention)
    logits, gradient, seen = explained(model, places, mask, narrow=True)
    full_logits, full_gradient, full_seen = explained(model, places, mask, narrow=False)
    for a, b in ((logits, full_logits), (gradient, full_gradient)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * b.abs().max().item())
    if name != "qwen3_moe":  # there the last linear map may be of an expert or of attention
        assert seen == [places.numel()]
        assert full_seen == [2 * TOKENS]


def test_where_it_does_not_understand_it_runs_in_full() -> None:
    class Layer(nn.Linear):
        def forward(self, hidden: Tensor, extra: object = None) -> Tensor:
            return super().forward(hidden)

    layer, x = Layer(4, 4), torch.randn(2, TOKENS, 4, requires_grad=True)
    with only_at(layer, LAST):
        assert torch.equal(layer(x, extra=object()), nn.functional.linear(x, layer.weight, layer.bias))


def test_generation_meanwhile_and_the_model_afterwards() -> None:
    model = build("llama")
    layer = model.model.layers[-1]
    ids = torch.arange(2 * TOKENS).view(2, TOKENS)
    expected = model(ids).logits
    with only_at(layer, LAST), torch.no_grad():
        assert torch.equal(model(ids).logits, expected)
    assert "forward" not in layer.__dict__
    with pytest.raises(RuntimeError, match="inside"), only_at(layer, LAST):
        raise RuntimeError("inside")
    assert "forward" not in layer.__dict__
