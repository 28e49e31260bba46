"""Where relevance belongs on the images: pixels and patches in rows and columns, whatever layout the model reads.

Models take images as [image, channel, height, width], the same with tiles in front, or as one sequence of flattened
patches. Each image or tile is brought back to height and width and given to the row of its prompt.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lxt.conversations import image_token
from lxt.imagepasses import ImagePass, ImageResult
from lxt.imagerelevance import ImageRelevance
from lxt.inputs import Model
from lxt.pixels import channels, pictures

__all__ = ["image_relevances"]


def image_relevances(
    batch: ImagePass, result: ImageResult, model: Model, processor: Any, first: int
) -> list[ImageRelevance]:
    """The images of one pass; `first` is the Attribution's row of the pass's first one."""
    found: list[ImageRelevance] = []
    for name, relevance in result.pixels.items():
        values = batch.inputs[name].detach().cpu()
        grid = batch.inputs.get(name.replace("pixel_values", "image_grid_thw"))
        if values.dim() == 2 and isinstance(grid, Tensor):
            found += _from_sequence(values, relevance, result.patches, grid.tolist(), batch, model, processor, first)
        elif _is_picture(values, result.patches, batch, model):
            values, relevance = values.flatten(0, -4), relevance.flatten(0, -4)
            found += _from_pictures(values, relevance, result.patches, batch, model, processor, first)
    return found


def _is_picture(values: Tensor, patches: Tensor | None, batch: ImagePass, model: Model) -> bool:
    """Whether the last three dimensions are channel, height and width of something larger than one patch.

    Some models take a sequence of patches that looks alike, and say elsewhere how to arrange it.
    """
    arranged = any(word in name for name in batch.inputs for word in ("grid", "target_sizes", "tgt_sizes", "shapes"))
    single = patches is not None and patches[0].numel() == 1
    return values.dim() >= 4 and values.shape[-3] == (channels(model) or 3) and not arranged and not single


def _from_pictures(
    values: Tensor,
    relevance: Tensor,
    patches: Tensor | None,
    batch: ImagePass,
    model: Model,
    processor: Any,
    first: int,
) -> list[ImageRelevance]:
    """Images [image, channel, height, width], or tiles of them; tiles of zeros only fill up the batch."""
    real = [i for i, image in enumerate(values) if image.any()] or list(range(len(values)))
    per = range(len(values)) if patches is not None and len(patches) == len(values) else real
    usable = patches is not None and patches.dim() == 3 and len(patches) == len(per)
    at = {image: place for place, image in enumerate(per)} if usable else {}
    owners, shown = _owners(len(values), batch, model), pictures(values, processor)
    return [
        ImageRelevance(
            row=first + owners[i],
            pixels=relevance[i].sum(0),
            patches=patches[at[i]] if patches is not None and i in at else None,
            picture=shown[i],
        )
        for i in real
    ]


def _owners(count: int, batch: ImagePass, model: Model) -> list[int]:
    """Which row of the pass each image or tile belongs to."""
    rows = len(batch.goals)
    if count % rows == 0 and (batch.mask is None or batch.inputs["pixel_values"].dim() > 4 or rows in (1, count)):
        return [i // (count // rows) for i in range(count)]
    mark = image_token(model)
    tokens = (batch.inputs["input_ids"] == mark).sum(-1).tolist() if mark is not None else [0] * rows
    each = sum(tokens) // count
    if not each or any(number % each for number in tokens) or each * count != sum(tokens):
        raise ValueError(f"{count} images in {rows} rows: can't tell whose they are; pass the prompts one by one")
    return [row for row, number in enumerate(tokens) for _ in range(number // each)]


def _from_sequence(
    values: Tensor,
    relevance: Tensor,
    patches: Tensor | None,
    grids: list[list[int]],
    batch: ImagePass,
    model: Model,
    processor: Any,
    first: int,
) -> list[ImageRelevance]:
    """Images as one sequence of flattened patches, those that are merged later side by side (Qwen2-VL's layout)."""
    config = model.config.vision_config
    merge, size = getattr(config, "spatial_merge_size", 1), config.patch_size
    deep = getattr(config, "temporal_patch_size", 1)
    count = values.shape[1] // (deep * size * size)
    if count * deep * size * size != values.shape[1] or sum(t * h * w for t, h, w in grids) != len(values):
        return []
    flat = patches.flatten(1).sum(1) if patches is not None and len(patches) == len(values) else None
    owners = _owners_of_sequences(grids, merge, batch, model)
    found, start = [], 0
    for owner, (times, high, wide) in zip(owners, grids, strict=True):
        part = slice(start, start := start + times * high * wide)
        shape = (times, high // merge, wide // merge, merge, merge)

        def image(x: Tensor, shape: tuple[int, ...] = shape) -> Tensor:
            """[channel, time, height, width]."""
            whole = x.view(*shape, count, deep, size, size).permute(5, 0, 6, 1, 3, 7, 2, 4, 8)
            return whole.reshape(count, shape[0] * deep, shape[1] * merge * size, shape[2] * merge * size)

        by_patch = None if flat is None else flat[part].view(*shape).permute(0, 1, 3, 2, 4).sum(0)
        found.append(
            ImageRelevance(
                row=first + owner,
                pixels=image(relevance[part]).sum((0, 1)),
                patches=None if by_patch is None else by_patch.reshape(high, wide),
                picture=pictures(image(values[part])[None, :, 0], processor)[0],
            )
        )
    return found


def _owners_of_sequences(grids: list[list[int]], merge: int, batch: ImagePass, model: Model) -> list[int]:
    """Which row each image belongs to: rows take images until their image tokens are spent."""
    mark, owners, row = image_token(model), [], 0
    left = (batch.inputs["input_ids"] == mark).sum(-1).tolist()
    for times, high, wide in grids:
        need = times * high * wide // (merge * merge)
        while row < len(left) - 1 and left[row] < need:
            row += 1
        left[row] -= need
        owners.append(row)
    return owners
