"""Weights that stay in their files: read when a module runs, given back after it.

accelerate's hooks do that for each module. What is added to them here:
 1. Of an embedding table only the rows of the tokens are read.
 2. While a layer computes, the kernel is asked for the next one's part of the file. In the backward, which recomputes
    the layers from the last to the first, that is the one before.
 3. Where the page cache can't hold the model, what was read is dropped from it when the next layer begins: otherwise
    the kernel drops what was just read ahead, and reads it again.
 4. An output projection that is larger than the page cache is taken in pieces.
 5. A recomputation may stop inside a module, once it has all that the backward needs, and the hook that gives the
    module's weights back never runs. They are given back when another layer begins.
"""

from __future__ import annotations

import os
import queue
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lxt.accelerate_hooks import loading_hooks
from lxt.memory import available
from lxt.stored import Header, read_header

__all__ = ["WeightReader", "byte_ranges", "give_back", "install"]

PART_OF_CACHE = 0.75  # of what is left, beyond which one matrix can't stay in the page cache while it is used
PIECE = 2**20  # bytes; the kernel cuts a larger request to its read-ahead size
Range = tuple[str, int, int]
"""A file, and where in it the bytes begin and how many they are."""


def install(model: Any, parts: Sequence[str], keep: object = None) -> WeightReader | None:
    """Have accelerate's hooks read the offloaded weights through a WeightReader.

    Args:
        model: dispatched by accelerate.
        parts: the layers and what else is read as a whole, in the order in which they run.
        keep: kept alive as long as the weights are needed: the folder in which they lie.

    Returns:
        None where nothing is offloaded.
    """
    hooks = [(name, module, hook) for name, module in model.named_modules() for hook in loading_hooks(module)]
    if not hooks:
        return None
    reader = WeightReader(hooks[0][2].weights_map.dataset, parts, keep)
    table = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    left = available(torch.device("cpu"))
    for name, module, hook in hooks:
        hook.weights_map.dataset = reader
        reader.serves(name, module)
        if module is table and isinstance(module, nn.Embedding) and module.max_norm is None:
            _read_rows_only(module, hook)
        if module is head and type(module) is nn.Linear and module.weight.nbytes > PART_OF_CACHE * left:
            _compute_in_pieces(module, int(left * PART_OF_CACHE / 4))
    return reader


class WeightReader(Mapping[str, Tensor]):
    """accelerate's map of offloaded weights, that looks ahead."""

    def __init__(self, weights: Any, parts: Sequence[str], keep: object = None) -> None:
        self.keep = keep
        self._weights, self._parts = weights, list(parts)
        self._modules: dict[int, list[nn.Module]] = {}
        self._current: int | None = None
        self._page_cache = _PageCache()
        ranges = byte_ranges(weights.index)
        self._part_of = {name: self._number(name) for name in weights}
        # An expert that the router doesn't choose is never read: what is stacked is left to what is asked for.
        self._ranges: dict[int, list[Range]] = {}
        for name, (place, shape) in ranges.items():
            number = self._part_of.get(name)
            if number is not None and len(shape) < 3:
                self._ranges.setdefault(number, []).append(place)
        self._sizes = {number: sum(count for _, _, count in found) for number, found in self._ranges.items()}
        left = available(torch.device("cpu"))
        self._cache = int(left * PART_OF_CACHE)
        self._drops = sum(self._sizes.values()) > left

    def _number(self, name: str) -> int | None:
        return next((i for i, part in enumerate(self._parts) if name == part or name.startswith(f"{part}.")), None)

    def serves(self, name: str, module: nn.Module) -> None:
        """Tell it of a module whose weights it hands out."""
        number = self._number(name)
        if number is not None:
            self._modules.setdefault(number, []).append(module)

    def __getitem__(self, name: str) -> Tensor:
        number = self._part_of[name]
        if number is not None and number != self._current:
            self._moves(self._current, number)
            self._current = number
        return self._weights[name]

    def _moves(self, before: int | None, now: int) -> None:
        if before is not None:
            give_back(self._modules.get(before, ()))
            if self._drops:
                self._page_cache.drop(self._ranges.get(before, ()))
        following = now + (1 if before is None or now > before else -1)
        room = self._cache - self._sizes.get(now, 0)
        self._page_cache.read(_first(self._ranges.get(following, ()), room))

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def give_back(modules: Iterable[nn.Module]) -> None:
    """Put offloaded weights that were left in these modules back where they came from."""
    for module in modules:
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.is_meta:
                module._parameters[name] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)


def byte_ranges(index: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[Range, tuple[int, ...]]]:
    """Where each weight of accelerate's index lies, and its shape, for those in safetensors files."""
    headers: dict[str, Header] = {}
    found = {}
    for name, entry in index.items():
        file = entry.get("safetensors_file")
        if file is None:
            continue
        if file not in headers:
            headers[file] = read_header(file)
        header = headers[file]
        tensor = header.tensors[entry.get("weight_name", name)]
        begin, end = tensor["data_offsets"]
        found[name] = (file, header.start + begin, end - begin), tuple(tensor["shape"])
    return found


def _first(ranges: Sequence[Range], most: int) -> list[Range]:
    """The ranges as far as they come to so many bytes: what is read ahead must not displace what is in use."""
    found: list[Range] = []
    for file, start, count in ranges:
        if most > 0:
            found.append((file, start, min(count, most)))
        most -= count
    return found


class _PageCache:
    """Asks the kernel to read parts of files, or to drop them, in a thread: asking waits while the disk is busy."""

    def __init__(self) -> None:
        self._asked: queue.SimpleQueue[tuple[str, Sequence[Range]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _PageCache:
        return self  # copies of a model read the same files

    def read(self, ranges: Sequence[Range]) -> None:
        self._ask("POSIX_FADV_WILLNEED", ranges)

    def drop(self, ranges: Sequence[Range]) -> None:
        self._ask("POSIX_FADV_DONTNEED", ranges)

    def _ask(self, advice: str, ranges: Sequence[Range]) -> None:
        if not ranges or not hasattr(os, "posix_fadvise"):
            return
        if self._thread is None or not self._thread.is_alive():  # a fork has no threads
            self._thread = threading.Thread(target=_advise, args=(self._asked,), daemon=True)
            self._thread.start()
            weakref.finalize(self, self._asked.put, None)
        self._asked.put((advice, ranges))


def _advise(asked: queue.SimpleQueue[tuple[str, Sequence[Range]] | None]) -> None:
    while (one := asked.get()) is not None:
        advice, ranges = getattr(os, one[0]), one[1]
        for file, start, count in ranges:
            try:
                descriptor = os.open(file, os.O_RDONLY)
            except OSError:
                continue  # whoever needs the weight says so better
            try:
                for offset in range(start, start + count, PIECE):
                    os.posix_fadvise(descriptor, offset, min(PIECE, start + count - offset), advice)
            finally:
                os.close(descriptor)


def _compute_in_pieces(head: nn.Linear, size: int) -> None:
    """Let the output projection take its rows piece by piece, forward and backward.

    A matmul goes over a matrix more than once. One that the page cache can't hold would be read each time.

    Args:
        head: the output projection.
        size: of a piece, in bytes.
    """
    rows = max(1, size // (head.in_features * head.weight.element_size()))

    def in_pieces(module: nn.Linear, x: Tensor) -> Tensor:
        wide = x.float()  # the pieces' gradients are added up in it
        biases = [None] * len(module.weight) if module.bias is None else module.bias.split(rows)
        pieces = zip(module.weight.split(rows), biases, strict=False)
        return torch.cat([nn.functional.linear(wide.to(x.dtype), *piece) for piece in pieces], -1)

    head.__dict__["_old_forward"] = MethodType(in_pieces, head)  # where accelerate keeps a module's own


def _read_rows_only(table: nn.Embedding, hook: Any) -> None:
    """Instead of the table, give its forward the rows that the ids name, and ids that count those."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    class RowsOnly(ModelHook):
        offload = True  # for which transformers looks when it saves the model, as for weights_map

        def __init__(self) -> None:
            self.weights_map, self.execution_device = hook.weights_map, hook.execution_device

    def rows_only(module: nn.Embedding, input: Tensor) -> Tensor:
        if not module.weight.is_meta:
            return type(module).forward(module, input)
        rows, places = input.unique(return_inverse=True)
        own = loading_hooks(module)[0]
        found = own.weights_map["weight"][rows.cpu()].to(own.execution_device, module.weight.dtype)
        absent, padding = module._parameters["weight"], module.padding_idx
        try:
            # torch asks that padding_idx be one of the rows; it matters to the weight's gradient alone.
            module._parameters["weight"], module.padding_idx = nn.Parameter(found, requires_grad=False), None
            return type(module).forward(module, places.to(own.execution_device))
        finally:
            module._parameters["weight"], module.padding_idx = absent, padding

    add_hook_to_module(table, RowsOnly())  # takes the place of the hook that reads all of it
    table.__dict__["_old_forward"] = MethodType(rows_only, table)
