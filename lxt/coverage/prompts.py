"""Prompts and pictures for the models that take special ones: single lines in the tables of `lxt.coverage.sizes`."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from lxt.coverage.sizes.values import normal, token_ids

__all__ = ["Inputs", "flattened", "grid", "image_token", "image_tokens", "patches", "prompt"]

Inputs = Callable[[Any], dict[str, Any]]  # what Tiny.inputs is: (model) -> keyword arguments of its forward


def image_token(model: Any) -> int:
    """The id that stands for a patch of an image in the prompt."""
    names = ("image_token_id", "image_token_index", "image_patch_id", "video_token_index")
    found = (getattr(model.config, name, None) for name in names)
    return next(token for token in found if token is not None)


def prompt(model: Any, count: int, token: int | None = None) -> dict[str, Any]:
    """Text, `count` places for an image, text: ids, and which of them are the image's, where the model asks for it.

    Args:
        model: its forward's signature and its configuration are asked.
        count: of places.
        token: the id that stands for a patch.
    """
    token = image_token(model) if token is None else token
    ids = torch.cat([token_ids(3), torch.full((1, count), token), token_ids(4, seed=1)], dim=1)
    taken = signature(type(model).forward).parameters
    kinds = {name: (ids == token).long() for name in _KINDS if name in taken}
    return {"input_ids": ids, **kinds}


def image_tokens(count: int, **more: Any) -> Inputs:
    """Inputs with one image, in the size of the configuration, at `count` places of the prompt, and `more`."""
    return lambda model: prompt(model, count) | more


def grid(height: int, width: int, places: int, **more: Any) -> Inputs:
    """Inputs with one image as flat patches, [patch, channel × time × height × width], and the shape of its grid.

    Args:
        height: in patches.
        width: in patches.
        places: tokens of the prompt that the patches become.
        more: further arguments.
    """

    def inputs(model: Any) -> dict[str, Any]:
        vision = model.config.vision_config
        channels = (
            getattr(vision, "in_channels", None)
            or getattr(vision, "in_chans", None)
            or getattr(vision, "num_channels", 3)
        )
        side, frames = vision.patch_size, getattr(vision, "temporal_patch_size", 1)
        pixels = normal(height * width, channels * frames * side * side)
        return (
            prompt(model, places)
            | {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, height, width]])}
            | more
        )

    return inputs


def patches(height: int, width: int, numbers: int) -> dict[str, Tensor]:
    """One image as flat patches of so many numbers, [1, patch, number], and the place (x, y) of each."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([x, y], -1).reshape(1, -1, 2)
    return {"pixel_values": normal(1, height * width, numbers), "image_position_ids": places}


def flattened(height: int, width: int, numbers: int) -> Tensor:
    """One image as flat patches of so many numbers behind their row and column, [1, patch, 2 + number]."""
    rows, columns = torch.meshgrid(torch.arange(1, height + 1), torch.arange(1, width + 1), indexing="ij")
    places = torch.stack([rows, columns], -1).reshape(1, -1, 2)
    return torch.cat([places, normal(1, height * width, numbers)], dim=-1)


_KINDS = ("mm_token_type_ids", "token_type_ids")
