"""Images and pixel values: what the user gives → what the model takes → pictures to look at.

1. `classifier_batches`: what was given for an image classifier → `pixel_values`, batch by batch.
2. `pictures`: `pixel_values` back into pictures.
"""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lxt.inputs import Model

__all__ = ["PIXELS", "channels", "classifier_batches", "pictures", "raw_image", "sees", "split_processor"]

PIXELS = ("pixel_values", "pixel_values_videos", "flattened_patches", "image_patches")
"""What models of transformers call their image inputs."""

_IMAGES = (
    "a PIL.Image, a numpy array [height, width, channel] or a pathlib.Path (the processor prepares these), prepared "
    "pixel_values (a float tensor [channel, height, width] or [batch, channel, height, width], or the processor's "
    "output), or a list of these"
)


def split_processor(given: Any) -> tuple[Any, Any]:
    """The processor and the tokenizer in what the user gave as either; None for what is not there."""
    if hasattr(given, "image_processor"):
        return given, getattr(given, "tokenizer", None)
    if hasattr(given, "image_mean") or "pixel_values" in (getattr(given, "model_input_names", None) or ()):
        return given, None
    return None, given


def sees(model: Model) -> bool:
    """Whether the model's forward takes images."""
    return bool(set(PIXELS) & set(signature(type(model).forward).parameters))


def classifier_batches(
    inputs: object, model: Model, processor: Any, batch_size: int | None = None
) -> list[dict[str, Tensor]]:
    """The images as `pixel_values` [batch, channel, height, width], on the CPU, in batches.

    Raises:
        TypeError: not a kind of image.
        ValueError: the wrong number of channels, no image, numbers that aren't finite, or no processor for raw ones.
    """
    if isinstance(inputs, Mapping):
        prepared = inputs.get("pixel_values")
        if not isinstance(prepared, Tensor):
            raise TypeError(f"a mapping of prepared inputs needs a tensor under 'pixel_values', got {sorted(inputs)}")
        _check_pixels(prepared, model)
        inputs = prepared
    if isinstance(inputs, Tensor) and inputs.is_floating_point() and inputs.dim() == 4:
        pixels = inputs
    else:
        given = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
        if isinstance(inputs, np.ndarray) and inputs.ndim == 4:
            given = list(inputs)
        if not given:
            raise ValueError(f"inputs is an empty {type(inputs).__name__}; give at least one image: {_IMAGES}")
        parts = [_pixels_of(image, model, processor) for image in given]
        if len({part.shape for part in parts}) > 1:
            sizes = ", ".join(sorted({"×".join(map(str, part.shape[1:])) for part in parts}))
            raise ValueError(f"the images have different sizes, {sizes} pixels; explain them one by one")
        pixels = torch.stack(parts)
    _check_pixels(pixels, model)
    if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
        raise ValueError(f"batch_size must be a whole number >= 1 or None, got {batch_size!r}")
    return [{"pixel_values": part} for part in pixels.detach().split(batch_size or len(pixels))]


def _pixels_of(image: object, model: Model, processor: Any) -> Tensor:
    """[channel, height, width] of one image."""
    if isinstance(image, Tensor) and image.is_floating_point():
        if image.dim() != 3:
            raise ValueError(f"one image's pixel_values are [channel, height, width], got {tuple(image.shape)}")
        return image
    raw = raw_image(image, model)
    if processor is None:
        raise ValueError(
            f"{type(image).__name__} needs the model's image processor, which scales and normalises it: "
            "lxt.load(model, processor); without one, pass pixel_values [batch, channel, height, width]"
        )
    prepare = getattr(processor, "image_processor", processor)
    prepared = prepare(images=raw, return_tensors="pt")["pixel_values"]
    if not isinstance(prepared, Tensor) or prepared.dim() != 4 or len(prepared) != 1:
        raise ValueError(
            f"{type(prepare).__name__} made {tuple(getattr(prepared, 'shape', ()))} of one image, not "
            "[1, channel, height, width]; prepare the pixel_values yourself"
        )
    return prepared[0]


def raw_image(image: object, model: Model) -> Any:
    """What an image processor takes: a PIL image or an array, with the number of channels that the model wants."""
    if isinstance(image, Path):
        image = _opened(image)
    if isinstance(image, str):
        raise TypeError(
            f"got the text {image[:40]!r} where {type(model).__name__} needs an image: {_IMAGES}. To read a file, "
            "pass pathlib.Path(...)"
        )
    count = channels(model)
    if type(image).__module__.split(".")[0] == "PIL":
        pil: Any = image
        return pil.convert("RGB") if count in (None, 3) else pil
    array = image.numpy() if isinstance(image, Tensor) else image
    if not isinstance(array, np.ndarray):
        raise TypeError(f"got {type(image).__name__} where {type(model).__name__} needs an image: {_IMAGES}")
    last = isinstance(image, np.ndarray)
    if array.ndim != 3:
        raise ValueError(
            f"an image has three dimensions, {'[height, width, channel]' if last else '[channel, height, width]'}, got "
            f"{array.shape}; for a grey one, repeat it over {count or 'the'} channels"
        )
    if count is not None and last and array.shape[-1] != count == array.shape[0]:
        raise ValueError(
            f"the image of shape {array.shape} has its channels first; a numpy array is [height, width, channel]: "
            "image.transpose(1, 2, 0)"
        )
    if count is not None and array.shape[-1 if last else 0] != count:
        raise ValueError(
            f"the image of shape {array.shape} has {array.shape[-1 if last else 0]} channels, and "
            f"{type(model).__name__} takes {count}; convert it (PIL: image.convert('RGB'))"
        )
    return array


def _opened(path: Path) -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise ImportError(
            f"reading {str(path)!r} needs pillow; install it with the extra lxt[vision], or pass pixel_values"
        ) from None
    if not path.expanduser().is_file():
        raise FileNotFoundError(f"no image at {str(path)!r}; give the path of an image file")
    return Image.open(path.expanduser())


def _check_pixels(pixels: Tensor, model: Model) -> None:
    count = channels(model)
    if pixels.dim() != 4:
        raise ValueError(
            f"pixel_values must be [batch, channel, height, width], got {tuple(pixels.shape)}; for a model that takes "
            "flattened patches use lxt.monkey_patch(model) and a backward of your own"
        )
    if not len(pixels):
        raise ValueError(f"inputs hold no image: their first dimension is 0; give at least one: {_IMAGES}")
    if count is not None and pixels.shape[1] != count:
        raise ValueError(
            f"pixel_values of shape {tuple(pixels.shape)} have {pixels.shape[1]} channels, and {type(model).__name__} "
            f"takes [batch, {count}, height, width]"
            + ("; move the last dimension: .movedim(-1, 1)" if pixels.shape[-1] == count else "")
        )
    if not pixels.isfinite().all():
        raise ValueError("pixel_values hold NaN or inf; give finite numbers")


def channels(model: Model) -> int | None:
    """How many channels the model's images have, None where its configuration doesn't say."""
    config = getattr(model.config, "vision_config", model.config)
    found = getattr(config, "num_channels", getattr(config, "in_channels", None))
    return found if isinstance(found, int) else None


def pictures(pixels: Tensor, processor: Any = None) -> Tensor:
    """What the pixel values look like: uint8 [image, height, width, 3].

    Args:
        pixels: [image, channel, height, width].
        processor: knows the mean and the deviation that they were normalised with; without one, each image is
            stretched between its darkest and its brightest value.
    """
    source = getattr(processor, "image_processor", processor)
    mean, deviation = getattr(source, "image_mean", None), getattr(source, "image_std", None)
    shown = pixels.detach().float().cpu()
    if mean is not None and deviation is not None and getattr(source, "do_normalize", True) and shown.shape[1] == 3:
        shown = shown * torch.tensor(deviation).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
    elif source is None or shown.min() < 0 or shown.max() > 1:
        low, high = shown.amin((1, 2, 3), keepdim=True), shown.amax((1, 2, 3), keepdim=True)
        shown = (shown - low) / (high - low).clamp(min=1e-12)
    if shown.shape[1] != 3:
        shown = shown.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    return (shown.clamp(0, 1) * 255).round().to(torch.uint8).movedim(1, -1).contiguous()
