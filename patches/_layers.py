"""Residual connections that run together with the norm behind them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lxt.composites import Composite
from lxt.mode import unwatched
from lxt.norm_rules import NormStyle, add_layer_norm, add_rms_norm
from lxt.patches._forwards import hooked
from lxt.patchmap import ForwardFactory

__all__ = ["post_norm_output", "pre_norm_layer"]

PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


def pre_norm_layer(style: NormStyle, eps: str = "variance_epsilon") -> ForwardFactory:
    """The layer y = h + attention(norm(h)), y + mlp(norm(y)); its parts are called as PARTS, its norms are RMSNorms.

    The second norm is not called as a module. Where somebody hooks it, accelerate loads its weight for the call, or
    transformers checkpoints the layer by its class's forward, that forward runs.
    """

    def factory(module: nn.Module, composite: Composite) -> Callable | None:
        if composite.norm == "gradient" or not _is_plain(module):
            return None

        def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            norm = self.post_attention_layernorm
            if args or _is_watched(norm) or (self.training and getattr(self, "gradient_checkpointing", False)):
                return type(self).forward(self, hidden_states, *args, **kwargs)
            attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
            norm_of = norm.weight, getattr(norm, eps), style
            normed, residual = unwatched(add_rms_norm, attended, hidden_states, *norm_of)
            return residual + self.mlp(normed)

        return forward

    return factory


def post_norm_output(module: nn.Module, composite: Composite) -> Callable | None:
    """LayerNorm(dense(x) + residual), as BERT ends its blocks; the norm is not called as a module, as above."""
    if composite.norm == "gradient" or type(module.LayerNorm) is not nn.LayerNorm:
        return None

    def forward(self: Any, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        norm = self.LayerNorm
        if _is_watched(norm) or hooked(self.dropout) or hidden_states.shape[:-1] != input_tensor.shape[:-1]:
            return type(self).forward(self, hidden_states, input_tensor)
        x = self.dense(hidden_states)
        norm_of = norm.normalized_shape, norm.weight, norm.bias, norm.eps
        return unwatched(add_layer_norm, x, input_tensor, *norm_of)[0]

    return forward


def _is_watched(norm: nn.Module) -> bool:
    """Whether the module has to be called, for somebody's hooks or for accelerate's, which load its weights."""
    return hooked(norm) or hasattr(norm, "_hf_hook")


def _is_plain(module: nn.Module) -> bool:
    """Whether the layer's own forward calls these parts in this order and nothing else, and the norm is its class's."""
    names = inspect.unwrap(type(module).forward).__code__.co_names
    norm = module._modules.get("post_attention_layernorm")
    return names == PARTS and norm is not None and "forward" not in vars(norm) and hasattr(norm, "weight")
