"""Residual connections that run together with the norm behind them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lxt.composites import Composite
from lxt.mode import unwatched
from lxt.norm_rules import NormStyle, add_layer_norm, add_rms_norm
from lxt.patches._forwards import is_watched
from lxt.patchmap import ForwardFactory

__all__ = ["post_norm_output", "pre_norm_layer"]

PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


def pre_norm_layer(style: NormStyle, eps: str = "variance_epsilon") -> ForwardFactory:
    """The layer y = h + attention(norm(h)), y + mlp(norm(y)); its parts are called as PARTS.

    The second norm, an RMSNorm of the layer's own modeling file, is not called as a module. Where it is another, or
    somebody hooks it, or accelerate loads its weight for the call, or transformers checkpoints the layer by its
    class's forward, that forward runs.
    """

    def factory(module: nn.Module, composite: Composite) -> Callable | None:
        norm: Any = getattr(module, PARTS[2], None)
        names = inspect.unwrap(type(module).forward).__code__.co_names
        theirs = type(module).__module__.startswith("transformers.models.")  # names alone don't tell what is done
        if (
            not theirs
            or composite.norm == "gradient"
            or names != PARTS
            or not _is_rms_norm_of(type(norm), type(module))
        ):
            return None
        cls: Any = type(norm)
        known = cls, cls.forward

        def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            norm = self.post_attention_layernorm
            checkpoints = self.training and getattr(self, "gradient_checkpointing", False)
            if args or checkpoints or not _stands_in(norm, *known):
                return type(self).forward(self, hidden_states, *args, **kwargs)
            attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
            norm_of = norm.weight, getattr(norm, eps), style
            normed, residual = unwatched(add_rms_norm, attended, hidden_states, *norm_of)
            return residual + self.mlp(normed)

        return forward

    return factory


def post_norm_output(module: nn.Module, composite: Composite) -> Callable | None:
    """LayerNorm(dense(x) + residual), as BERT ends its blocks; the norm is not called as a module, as above."""
    if composite.norm == "gradient" or nn.LayerNorm.forward.__module__ != nn.LayerNorm.__module__:
        return None
    known = nn.LayerNorm, nn.LayerNorm.forward

    def forward(self: Any, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        norm = self.LayerNorm
        if (
            not _stands_in(norm, *known)
            or is_watched(self.dropout)
            or hidden_states.shape[:-1] != input_tensor.shape[:-1]
        ):
            return type(self).forward(self, hidden_states, input_tensor)
        x = self.dense(hidden_states)
        norm_of = norm.normalized_shape, norm.weight, norm.bias, norm.eps
        return unwatched(add_layer_norm, x, input_tensor, *norm_of)[0]

    return forward


def _is_rms_norm_of(norm: type, layer: type) -> bool:
    """Whether a class is the RMSNorm that the layer's modeling file defines, with the forward from there."""
    home = layer.__module__
    return norm.__name__.endswith("RMSNorm") and norm.__module__ == home and norm.forward.__module__ == home


def _stands_in(norm: nn.Module, known: type, forward: Callable) -> bool:
    """Whether the norm is still what was known, and nobody's hooks, accelerate's included, need the call."""
    return type(norm) is known and known.forward is forward and not is_watched(norm) and not hasattr(norm, "_hf_hook")
