"""The forward's arguments for each task."""

from __future__ import annotations

from inspect import signature
from typing import Any

from torch import Tensor

from lxt.coverage.sizes import tiny_of
from lxt.coverage.sizes.values import normal, token_ids
from lxt.coverage.subjects import Subject

__all__ = ["TOKENS", "arguments"]

TOKENS, STEPS = 9, 4


def arguments(subject: Subject, model: Any) -> dict[str, Any]:
    """Keyword arguments of the model's forward, the same each time."""
    given: dict[str, Any] = {}
    if subject.task in ("causal", "masked", "sequence", "seq2seq", "image-text", "token", "question"):
        given["input_ids"] = token_ids(TOKENS)
    if subject.task in ("seq2seq", "speech"):
        given["decoder_input_ids"] = token_ids(STEPS, seed=1)
    if subject.task in ("image", "image-text"):
        given["pixel_values"] = pixels(model)
    if subject.task == "sequence" and model.config.is_encoder_decoder:
        given["input_ids"][0, -1] = model.config.eos_token_id  # what such a model classifies at
    given["use_cache"] = False
    given["return_dict"] = True
    taken = signature(type(model).forward).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    given = {name: value for name, value in given.items() if name in taken or (open_ended and name != "use_cache")}
    tiny = tiny_of(subject.type, subject.task)
    if tiny.inputs is not None:
        given |= tiny.inputs(model)
    return {name: value for name, value in given.items() if value is not None}


def pixels(model: Any) -> Tensor:
    """[1, channel, height, width] of the size that the configuration asks for."""
    config = model.config
    config = getattr(config, "vision_config", config)
    size = getattr(config, "image_size", 16)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return normal(1, getattr(config, "num_channels", 3), height, width)
