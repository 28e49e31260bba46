"""Handlers of norms: 1/sigma is a constant, whether a norm is one operation or written out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from lxt import opnames, rules
from lxt.composites import Composite
from lxt.marks import is_activation
from lxt.operands import constant, positional

__all__ = ["batch_norm", "group_norm", "layer_norm", "norm_part", "rms_norm"]


def norm_part(composite: Composite, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A root or a statistic, as norms that are written out have them."""
    if composite.norm == "gradient":
        raise ValueError(
            f"Composite(norm='gradient') can't reach a norm that is written out in operations "
            f"({opnames.operation_name(func)}): its products would still be shared. Use norm='identity', or "
            "product='gradient' as well"
        )
    return constant(func, args, kwargs)


def layer_norm(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """rules.layer_norm, however it is called."""
    args, kwargs = positional(args, kwargs, "input", "normalized_shape", "weight", "bias", "eps")
    kwargs.pop("cudnn_enable", None)
    args = (args[0], tuple(args[1]), *args[2:5]) if len(args) > 1 else args
    _refuse_active_weights("layer_norm", args[2:4])
    return rules.layer_norm(*args, **kwargs)


def rms_norm(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """rules.rms_norm_function, however it is called."""
    named = dict(zip(("input", "normalized_shape", "weight", "eps"), args, strict=False)) | kwargs
    _refuse_active_weights("rms_norm", (named.get("weight"),))
    return rules.rms_norm_function(named["input"], named["normalized_shape"], named.get("weight"), named.get("eps"))


def group_norm(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """rules.group_norm, however it is called."""
    args, kwargs = positional(args, kwargs, "input", "num_groups", "weight", "bias", "eps")
    kwargs.pop("cudnn_enabled", None)
    _refuse_active_weights("group_norm", args[2:4])
    return rules.group_norm(*args[:5], **kwargs)


def batch_norm(composite: Composite, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """rules.batch_norm, by running statistics."""
    statistics, affine = ("running_mean", "running_var"), ("weight", "bias")
    first = (*affine, *statistics) if func is torch.batch_norm else (*statistics, *affine)
    names = ("input", *first, "training", "momentum", "eps", "cudnn_enabled")
    named = dict(zip(names, args, strict=False)) | kwargs
    if named.get("training"):
        if composite.norm == "gradient":
            return func(*args, **kwargs)
        raise ValueError(
            "BatchNorm in training mode has no rule: its statistics mix the batch; call model.eval() first"
        )
    _refuse_active_weights("batch_norm", (named.get("weight"), named.get("bias")))
    mean, variance = (named[name] for name in statistics)
    return rules.batch_norm(named["input"], mean, variance, *map(named.get, affine), eps=named.get("eps", 1e-5))


def _refuse_active_weights(operation: str, weights: Iterable[Any]) -> None:
    if any(map(is_activation, weights)):
        raise ValueError(
            f"{operation} got a weight or bias that depends on the input, which its rule does not share with; apply "
            "them outside: y = norm(x, shape); y * weight + bias"
        )
