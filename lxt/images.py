"""Images explained: what a model that sees was asked for, run, and put into the images' own geometry.

1. `image_request` prepares the images (and texts), resolves the targets and says which rows run together.
2. `ImageExplainer.results` runs it under the rules, `ImageExplainer.audited` by the auditor: `check()` compares them.
3. `tokens_of` gives each row its tokens; `lxt.imagegeometry` each image its pixels and patches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lxt.composites import Composite
from lxt.conversations import conversations, image_token
from lxt.imagepasses import ImagePass, ImageResult, audited, run
from lxt.inputs import Model, Row, task
from lxt.latents import Keep
from lxt.patchmap import PatchMap
from lxt.pixels import PIXELS, classifier_batches
from lxt.targets import resolve
from lxt.tokens import display

__all__ = ["ImageExplainer", "ImageRequest", "image_request", "tokens_of"]


@dataclass(frozen=True, eq=False)
class ImageRequest:
    """What `attribute` was asked for about images, ready to run again.

    Attributes:
        passes: what runs together.
        rows: for each pass its prompts; without tokens for image classifiers.
        latents: none; every request has them.
    """

    passes: list[ImagePass]
    rows: list[list[Row]]
    latents: tuple[Keep, ...] = ()


@dataclass(frozen=True, eq=False)
class ImageExplainer:
    """Runs image requests of a model.

    Attributes:
        model: the model.
        rules: the composite.
        patch_map: as in Attributor.
        patch: makes the context of each forward and backward.
        lock: makes the context in which nobody else runs the model.
    """

    model: Model
    rules: Composite
    patch_map: PatchMap | None
    patch: Callable[[], AbstractContextManager[Any]]
    lock: Callable[[], AbstractContextManager[Any]]

    def results(
        self, request: ImageRequest, patch: Callable[[], AbstractContextManager[Any]] | None = None
    ) -> Iterator[ImageResult]:
        """Run the request, pass by pass; `patch` as in Attributor.results."""
        for batch in request.passes:
            with self.lock():
                yield run(self.model, batch, patch or self.patch)

    def audited(self, request: ImageRequest) -> Iterator[tuple[Tensor, tuple[str, ...]]]:
        """The request's relevance by the auditor's mechanism, with the operations unknown to it."""
        for batch in request.passes:
            yield audited(self.model, batch, self.rules)


def image_request(
    model: Model,
    processor: Any,
    tokenizer: Any,
    inputs: object,
    images: object = None,
    target: object = None,
    contrast: object = None,
    batch_size: int | None = None,
) -> ImageRequest:
    """Prepare what `Attributor.attribute` was given; its docstring says what that may be.

    Raises:
        TypeError: an image for a model that reads, a text for one that classifies images, or neither of both.
        ValueError: what doesn't fit the model or the target.
    """
    if task(model) == "image":
        if images is not None:
            raise TypeError(f"{type(model).__name__} classifies images and reads no text: pass the images themselves")
        batches = classifier_batches(inputs, model, processor, batch_size)
        columns = [None] * len(batches)
        rows = [[Row()] * len(batch["pixel_values"]) for batch in batches]
    else:
        batches = conversations(inputs, images, model, processor)
        columns = [batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool().cpu() for batch in batches]
        rows = [_rows(batch["input_ids"], mask) for batch, mask in zip(batches, columns, strict=True)]
    extended, goals = resolve(target, contrast, [row for group in rows for row in group], model, tokenizer)
    passes, groups = [], []
    for batch, mask, before in zip(batches, columns, rows, strict=True):
        group, aims = extended[: len(before)], goals[: len(before)]
        extended, goals = extended[len(before) :], goals[len(before) :]
        if mask is None:
            passes.append(ImagePass(batch, aims, torch.zeros(len(group), 1, dtype=torch.long), None))
        else:
            added = [row.ids[len(old.ids) :] for row, old in zip(group, before, strict=True)]
            batch, mask = _appended(batch, mask, added)
            passes.append(ImagePass(batch, aims, _places(aims, mask), mask))
        groups.append(group)
    return ImageRequest(passes, groups)


def _rows(ids: Tensor, mask: Tensor) -> list[Row]:
    rows = [Row(tuple(line[keep].tolist())) for line, keep in zip(ids.cpu(), mask, strict=True)]
    if not all(row.ids for row in rows):
        raise ValueError("a row of the attention mask has no 1 in it; give at least one token")
    return rows


def _appended(batch: dict[str, Any], mask: Tensor, added: Sequence[tuple[int, ...]]) -> tuple[dict[str, Any], Tensor]:
    """The prompts with the tokens of a sequence target behind them."""
    count = len(added[0])
    if not any(added):
        return batch, mask
    if len(set(map(len, added))) > 1 or not mask[:, -1].all() or "position_ids" in batch:
        raise ValueError(
            "a target of several tokens continues its prompt, which prepared tensors allow only where all rows end in "
            "the last column, gain as many tokens, and have no position_ids; pass the prompts one by one"
        )
    shape, longer = batch["input_ids"].shape, {}
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.shape[:2] == shape and name not in PIXELS:
            last = value[:, -1:].expand(-1, count, *value.shape[2:])
            if name == "input_ids":
                last = torch.tensor([list(ids) for ids in added]).to(value)
            elif name.endswith("type_ids"):  # what follows is text
                last = torch.zeros_like(last)
            value = torch.cat([value, last], 1)
        longer[name] = value
    return longer, torch.cat([mask, mask[:, -1:].expand(-1, count)], 1)


def _places(goals: Sequence[Any], mask: Tensor) -> Tensor:
    """[batch, K]: the explained positions as columns; rows with fewer repeat their last."""
    most = max(len(goal.positions) for goal in goals)
    columns = [line.nonzero().flatten().tolist() for line in mask]
    return torch.tensor(
        [
            [own[place] for place in (*goal.positions, *[goal.positions[-1]] * (most - len(goal.positions)))]
            for goal, own in zip(goals, columns, strict=True)
        ]
    )


def tokens_of(
    batch: ImagePass, result: ImageResult, rows: Sequence[Row], model: Model, tokenizer: Any
) -> list[tuple[list[str], Tensor, Tensor, Tensor | None]]:
    """For each row its labels, relevance [token], which tokens are special, and ids.

    The tokens of an image classifier are its patches, called "row,column"; without patches, the image is one token.
    """
    if result.tokens is None or batch.mask is None:
        return [_as_patches(result, row) for row in range(len(rows))]
    found = []
    mark = image_token(model)
    for row, keep, line in zip(rows, batch.mask, result.tokens, strict=True):
        labels, special = display(row.ids, tokenizer, model.config)
        ids = torch.tensor(row.ids)
        found.append((labels, line[keep], torch.tensor(special) & (ids != -1 if mark is None else ids != mark), ids))
    return found


def _as_patches(result: ImageResult, row: int) -> tuple[list[str], Tensor, Tensor, None]:
    patches = result.patches
    if patches is None or patches.dim() != 3 or len(patches) != len(result.values):
        whole = result.pixels["pixel_values"][row].sum().reshape(1)
        return ["image"], whole, torch.zeros(1, dtype=torch.bool), None
    rows, columns = patches.shape[1:]
    labels = [f"{y},{x}" for y in range(rows) for x in range(columns)]
    return labels, patches[row].flatten(), torch.zeros(len(labels), dtype=torch.bool), None
