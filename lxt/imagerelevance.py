"""Relevance on an image: of its pixels and of its patches, in the image's own geometry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ImageRelevance", "from_tensors", "stacked", "to_tensors"]

_PARTS = ("pixels", "patches", "picture")


@dataclass(frozen=True, eq=False, repr=False)
class ImageRelevance:
    """Relevance on one image (or one tile, where the model cuts images up).

    Attributes:
        row: the row of the Attribution that it belongs to.
        pixels: [height, width], each pixel value times its coefficient, summed over the channels; None where the
            model's pixel layout isn't known. Depends on which colour the pixel values call 0.
        patches: [rows, columns], read behind the first convolution (the patch embedding, its bias included); None for
            models without one.
        picture: uint8 [height, width, 3], what the model saw; None where it isn't known.

    Raises:
        ValueError: the wrong number of dimensions, or numbers that aren't finite.
    """

    row: int
    pixels: Tensor | None
    patches: Tensor | None = None
    picture: Tensor | None = None

    def __post_init__(self) -> None:
        for name, dims in zip(_PARTS, (2, 2, 3), strict=True):
            part = getattr(self, name)
            if part is None:
                continue
            if part.dim() != dims:
                raise ValueError(f"an image's {name} must have {dims} dimensions, got shape {tuple(part.shape)}")
            part = part.detach().cpu()
            if part.is_floating_point():
                if not part.isfinite().all():
                    raise ValueError(f"an image's {name} hold numbers that aren't finite; use a wider dtype")
                part = part if part.dtype == torch.float64 else part.float()
            object.__setattr__(self, name, part)

    def __repr__(self) -> str:
        parts = ((name, getattr(self, name)) for name in _PARTS)
        shown = (f"{name} {' × '.join(map(str, part.shape[:2]))}" for name, part in parts if part is not None)
        return f"ImageRelevance(row {self.row}: {', '.join(shown)})"

    @property
    def total(self) -> float | None:
        """The sum of the pixels' relevance, in float64."""
        return None if self.pixels is None else float(self.pixels.double().sum())


def stacked(images: Sequence[ImageRelevance], part: str, batch: int) -> Tensor:
    """[batch, …]: the pixels or patches of all images, where each row has one and all have the same size.

    Raises:
        ValueError: there are none, or they don't stack; says what there is.
    """
    found = [getattr(image, part) for image in images]
    if not found or all(one is None for one in found):
        raise ValueError(f"there are no {part}: the model saw no image, or has no such map of it")
    shapes = sorted({tuple(one.shape) if one is not None else () for one in found})
    if [image.row for image in images] != list(range(batch)) or len(shapes) != 1:
        raise ValueError(
            f"{len(found)} images of shapes {', '.join(map(str, shapes))} in {batch} rows don't make one tensor of "
            f"{part}; take them one by one: out.images[i].{part}"
        )
    return torch.stack(found)


def to_tensors(images: Sequence[ImageRelevance]) -> dict[str, Tensor]:
    """What is there of the images, by names for a file; their rows go beside it."""
    parts = ((f"images.{i}.{name}", getattr(image, name)) for i, image in enumerate(images) for name in _PARTS)
    return {name: part for name, part in parts if part is not None}


def from_tensors(tensors: Mapping[str, Tensor], rows: Sequence[int]) -> tuple[ImageRelevance, ...]:
    """The images of `to_tensors`."""
    return tuple(
        ImageRelevance(row, *(tensors.get(f"images.{i}.{name}") for name in _PARTS)) for i, row in enumerate(rows)
    )
