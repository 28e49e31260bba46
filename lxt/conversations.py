"""Text with images → the tensors that an image-text model takes, one mapping for each prompt.

The model's own processor makes them, so that image tokens, tiles and sizes are those that it was trained with; a
mapping of prepared tensors is taken as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lxt.inputs import Model, Row, task
from lxt.pixels import PIXELS, raw_image, sees

__all__ = ["conversations", "image_token", "refuse_missing_images", "shows_images"]


def shows_images(inputs: object) -> bool:
    """Whether the inputs are or hold images: pictures, prepared tensors, or chat messages with a place for some."""
    if isinstance(inputs, Mapping):
        return bool(set(PIXELS) & set(inputs)) or _placeholders(inputs)
    if isinstance(inputs, (list, tuple)):
        return any(shows_images(item) for item in inputs)
    return isinstance(inputs, Path) or type(inputs).__module__.split(".")[0] == "PIL"


def refuse_missing_images(rows: Sequence[Row], model: Model) -> None:
    """Check that no prompt without images has a place for one, which would be explained as a word.

    Raises:
        ValueError: one has.
    """
    mark = image_token(model) if sees(model) else None
    if mark is not None and any(mark in row.ids for row in rows):
        raise ValueError(
            f"the prompt has a place for an image (the token {mark}), and no image was given: attribute(text, "
            "images=image)"
        )


def conversations(inputs: Any, images: Any, model: Model, processor: Any) -> list[dict[str, Any]]:
    """One mapping of tensors for each forward: those of one prompt, or the batch that was given as prepared tensors.

    Args:
        inputs: a text, a chat, a list of either, or a mapping of prepared tensors.
        images: the images of the one prompt (one, or a list), or a list with those of each prompt; None where the
            chats or the prepared tensors hold them.
        model: for messages, and for what its head can do.
        processor: the model's own.

    Raises:
        TypeError: the model doesn't take images, or not a kind of input.
        ValueError: no processor, no place for the image in the text, or nothing prepared that can be explained.
    """
    if not sees(model):
        raise TypeError(
            f"{type(model).__name__} reads text only and takes no images; leave `images` out, or load a model that "
            "sees, such as one of AutoModelForImageTextToText"
        )
    if task(model) != "causal":
        raise ValueError(
            f"attribute() explains images with text for models that continue a text; {type(model).__name__} is an "
            "encoder-decoder or has another head: use lxt.monkey_patch(model) and a backward of your own"
        )
    if isinstance(inputs, Mapping):
        if images is not None:
            raise ValueError("inputs are prepared tensors, which hold the images already; leave `images` out")
        return [_checked(dict(inputs), model, processor)]
    if processor is None or not hasattr(processor, "tokenizer"):
        raise ValueError(
            f"images with text need the model's processor: lxt.load(model, AutoProcessor.from_pretrained(...)); "
            f"without one, pass what it would make of them, a mapping with input_ids and {', '.join(_taken(model))}"
        )
    if isinstance(inputs, str) or _is_chat(inputs):
        prompts, each = [inputs], [images]
    elif isinstance(inputs, (list, tuple)) and inputs and all(isinstance(i, str) or _is_chat(i) for i in inputs):
        prompts, each = list(inputs), [None] * len(inputs) if images is None else images
        if not isinstance(each, (list, tuple)) or len(each) != len(prompts):
            count = len(each) if isinstance(each, (list, tuple)) else "one image"
            raise ValueError(f"{len(prompts)} prompts need a list with the images of each, got {count}")
    else:
        raise TypeError(
            f"images go with a text, chat messages, a list of either, or inside a mapping of prepared tensors; got "
            f"{type(inputs).__name__}"
        )
    return [
        _checked(_processed(prompt, _several(some, model), processor), model, processor)
        for prompt, some in zip(prompts, each, strict=True)
    ]


def _several(images: Any, model: Model) -> list[Any]:
    if images is None:
        return []
    return [raw_image(image, model) for image in (images if isinstance(images, (list, tuple)) else [images])]


def _processed(prompt: Any, images: list[Any], processor: Any) -> dict[str, Any]:
    if isinstance(prompt, str):
        options = {"text": [prompt], "images": images or None, "return_tensors": "pt"}
        try:
            return dict(processor(**options))
        except (ValueError, TypeError, IndexError, StopIteration) as error:
            mark = _placeholder(processor)
            if mark is None or mark in prompt:
                raise
            raise ValueError(_no_place(mark, error)) from error
    messages = _filled(prompt, images)
    if not getattr(processor, "chat_template", None):
        raise ValueError("the processor has no chat template; pass the text itself, with the image's placeholder")
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return dict(processor.apply_chat_template(messages, **options))


def _no_place(mark: str | None, error: object = None) -> str:
    where = f"write {mark!r} where it stands" if mark else "write the processor's image token where it stands"
    reason = f" (the processor says: {error})" if error else ""
    return f"the text has no place for its image; {where}, or pass chat messages with {{'type': 'image'}}{reason}"


def _placeholder(processor: Any) -> str | None:
    token = getattr(processor, "image_token", None)
    return token if isinstance(token, str) else getattr(token, "content", None)


def _is_chat(inputs: Any) -> bool:
    return isinstance(inputs, (list, tuple)) and bool(inputs) and all(isinstance(item, Mapping) for item in inputs)


def _placeholders(item: Any) -> bool:
    content = item.get("content") if isinstance(item, Mapping) else None
    return isinstance(content, list) and any(isinstance(part, Mapping) and _is_image(part) for part in content)


def _is_image(part: Mapping[str, Any]) -> bool:
    return part.get("type") == "image"


def _filled(messages: Sequence[Mapping[str, Any]], images: list[Any]) -> list[dict[str, Any]]:
    """The messages, with the given images in those of their image parts that hold none."""
    left, filled = list(images), []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            parts = []
            for part in content:
                if _is_image(part) and not {"image", "url", "path", "base64"} & set(part):
                    if not left:
                        raise ValueError("the messages have more image parts than there are images; give one for each")
                    part = {**part, "image": left.pop(0)}
                parts.append(part)
            content = parts
        filled.append({**message, "content": content})
    if left:
        raise ValueError(
            f"{len(left)} of {len(images)} images have no place in the messages; give a user message with the content "
            "[{'type': 'image'}, {'type': 'text', 'text': ...}]"
        )
    return filled


def _taken(model: Model) -> list[str]:
    parameters = signature(type(model).forward).parameters
    return [name for name in PIXELS if name in parameters]


def _checked(prepared: dict[str, Any], model: Model, processor: Any) -> dict[str, Any]:
    """The prepared inputs without what the forward doesn't take."""
    ids = prepared.get("input_ids")
    pixels = [name for name in PIXELS if prepared.get(name) is not None]
    if not isinstance(ids, Tensor) or ids.dim() != 2 or not ids.numel():
        raise ValueError("prepared inputs need input_ids, a tensor [batch, token] (return_tensors='pt')")
    if not pixels:
        raise ValueError(
            f"there is no image in the inputs ({', '.join(prepared)}); pass images=..., or the text alone as a string"
        )
    for name in pixels:
        value = prepared[name]
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"{name} must be one float tensor, got {type(value).__name__}; use return_tensors='pt'")
        if not value.isfinite().all():
            raise ValueError(f"{name} holds NaN or inf; give finite numbers")
    mark = image_token(model)
    if mark is not None and "pixel_values" in pixels and not (ids == mark).any():
        raise ValueError(_no_place(_placeholder(processor)))
    parameters = signature(type(model).forward).parameters
    kept = {name: value for name, value in prepared.items() if name in parameters and value is not None}
    return {"attention_mask": torch.ones_like(ids), **kept} if "attention_mask" in parameters else kept


def image_token(model: Model) -> int | None:
    """The id of the token in whose places the image stands, None where the configuration names none."""
    for name in ("image_token_id", "image_token_index"):
        if isinstance(getattr(model.config, name, None), int):
            return getattr(model.config, name)
    return None
