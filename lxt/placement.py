"""Where a model's weights go when they are more than the memory: a GPU, the CPU, or the disk they lie on already.

1. The model is built without weights, which says how large each part is and in which files its weights are.
2. The layers fill the GPU, then the CPU's memory, up to what is left for computing. The others stay on the disk.
3. transformers and accelerate load it that way. safetensors files are read where they lie; what has another form in
the model than in its files (experts that are stacked, .bin files) is written to a temporary folder first.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lxt.memory import format_bytes, resident
from lxt.stored import Stored

__all__ = ["Budget", "Placement", "blocks_of", "load_placed", "plan"]

FOR_ACTIVATIONS = 4  # one part in so many of each memory stays free of weights
CPU = torch.device("cpu")
SMALL = 64 * 2**20  # bytes; what isn't a layer and smaller stays in memory: norms, positions, a classifier's head


@dataclass(frozen=True)
class Budget:
    """How much memory there is, in bytes.

    Attributes:
        memory: of the CPU, for the whole process.
        gpu_memory: of the GPU; 0 is none.
        device: what computes.
    """

    memory: int
    gpu_memory: int = 0
    device: torch.device = CPU


@dataclass(frozen=True)
class Placement:
    """Which part of the model goes where.

    Attributes:
        device_map: part -> "cpu", "disk", or the GPU's number, as accelerate has it.
        sizes: part -> bytes of its weights in the dtype that they are loaded in.
        blocks: the layers, in order.
        written: bytes that have to be written to a temporary folder.
    """

    device_map: dict[str, str | int]
    sizes: dict[str, int]
    blocks: list[str] = field(default_factory=list)
    written: int = 0

    def on(self, device: str | int) -> int:
        """Bytes of weights on that device."""
        return sum(self.sizes[part] for part, place in self.device_map.items() if place == device)

    @property
    def offloaded(self) -> bool:
        """Whether weights come to the computing device only while they are needed."""
        return len(set(self.device_map.values())) > 1 or "disk" in self.device_map.values()

    def __str__(self) -> str:
        places = sorted(set(self.device_map.values()), key=lambda place: (place == "disk", place == "cpu", str(place)))
        parts = []
        for place in places:
            layers = sum(self.device_map.get(block) == place for block in self.blocks)
            name = f"GPU {place}" if isinstance(place, int) else {"cpu": "memory", "disk": "disk"}[place]
            parts.append(f"{format_bytes(self.on(place))} ({layers} of {len(self.blocks)} layers) on {name}")
        return ", ".join(parts).replace("on memory", "in memory").replace("on disk", "read from disk")


def load_placed(
    fetch: Callable[..., Any],
    empty: nn.Module,
    stored: Stored,
    budget: Budget,
    offload_folder: str | Path | None,
) -> tuple[Any, Placement]:
    """Load a model so that its weights leave room to compute within the budget.

    Args:
        fetch: `from_pretrained` of the model, for its remaining options.
        empty: the same model on the meta device.
        stored: what its files hold.
        budget: how much there is.
        offload_folder: where weights may be written that can't be read in place.

    Raises:
        ImportError: accelerate isn't installed, and something has to be offloaded.
        ValueError: it doesn't fit however it is placed, or weights have to be written and there is no folder given.
        OSError: the folder's disk is too small for them.
    """
    placement = plan(empty, stored, budget)
    if not placement.offloaded:
        return fetch().to(budget.device), placement
    if importlib.util.find_spec("accelerate") is None:
        raise ImportError(
            f"the model has {format_bytes(sum(placement.sizes.values()))} of weights, more than the memory it may "
            "take; placing them needs accelerate, which isn't installed: pip install 'lxt[large]'"
        )
    from lxt.offloading import install
    from lxt.scratch import Scratch

    scratch = None
    if placement.written:
        if offload_folder is None:
            raise ValueError(
                f"{format_bytes(placement.written)} of weights are stored in another form than the model has (experts "
                "one by one, or files that aren't safetensors) and have to be written to disk while it is used: give "
                "an offload_folder on a disk with that much room"
            )
        scratch = Scratch(Path(offload_folder).expanduser(), placement.written)
    try:
        folder = None if scratch is None else str(scratch.path)
        with _without_warning():
            model = fetch(device_map=placement.device_map, offload_folder=folder)
        # Weights are constants while lxt explains; those that come and go would forget a flag that is set meanwhile.
        model.requires_grad_(False)
        install(model, [part for part in placement.device_map if part != _table(empty).rpartition(".")[0]], scratch)
    except BaseException:
        if scratch is not None:
            scratch.remove()
        raise
    return model, placement


def plan(empty: nn.Module, stored: Stored, budget: Budget) -> Placement:
    """Decide where each part of a model goes.

    Args:
        empty: the model on the meta device, in the dtype that it will have.
        stored: what its files hold.
        budget: how much memory there is.

    Raises:
        ValueError: a part doesn't fit beside what runs already; says how much would do.
    """
    parts, blocks = _parts(empty), blocks_of(empty)
    sizes = _sizes(empty, parts)
    here: str | int = "cpu" if budget.device.type == "cpu" else budget.device.index or 0
    taken = resident()
    free = budget.memory - taken - budget.memory // FOR_ACTIVATIONS
    if here != "cpu":
        gpu_free = budget.gpu_memory - budget.gpu_memory // FOR_ACTIVATIONS
        room = {here: gpu_free, "cpu": free}
    else:
        room = {here: free}
    if sum(sizes.values()) <= room[here]:
        return Placement(dict.fromkeys(parts, here), sizes, blocks)

    table = _part(_table(empty), parts) if _table(empty) else None
    largest = max((part for part in parts if part != table), key=lambda part: sizes[part])
    if here != "cpu" and sizes[largest] > room[here]:
        raise ValueError(
            f"gpu_memory={format_bytes(budget.gpu_memory)} is too little: {largest} alone has "
            f"{format_bytes(sizes[largest])}, and a quarter is left for activations; give at least "
            f"{format_bytes(sizes[largest] * FOR_ACTIVATIONS // (FOR_ACTIVATIONS - 1))}, or device='cpu'"
        )
    device_map = _map(empty, parts, sizes, room, here, reserve=sizes[largest])
    weights = _weights(empty)
    on_disk = {name for name in weights if _place(name, device_map) == "disk"}
    written = {name for name in on_disk if name not in stored.in_place}
    _refuse_too_little(empty, stored, on_disk - written, written, taken, budget.memory)
    return Placement(device_map, sizes, blocks, sum(weights[name] for name in written))


@contextmanager
def _without_warning() -> Iterator[None]:
    """Silence accelerate about offloaded weights on the meta device, which is what was asked for."""
    logger = logging.getLogger("accelerate.big_modeling")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def blocks_of(model: nn.Module) -> list[str]:
    """The names of the model's layers: the items of its outermost lists."""
    found: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1 and not _inside(name, found):
            found += [f"{name}.{i}" for i in range(len(module))]
    return found


def _map(
    empty: nn.Module, parts: list[str], sizes: dict[str, int], room: dict[str | int, int], here: str | int, reserve: int
) -> dict[str, str | int]:
    """Layers where the computing is, then in the CPU's memory, then on the disk.

    Of the other parts, the small ones are where the computing is. The large ones, embeddings and the output
    projection, stay on the disk: a pass reads the rows of its tokens of the one, and the other once.
    """
    blocks = set(blocks_of(empty))
    tied = {_part(target, parts): _part(source, parts) for target, source in _tied(empty).items()}
    room = room | {here: room[here] - reserve}
    device_map: dict[str, str | int] = {}
    for part in parts:
        if part not in blocks and part not in tied:
            device_map[part] = here if sizes[part] <= SMALL else "disk"
            room[here] -= sizes[part] if sizes[part] <= SMALL else 0
    for part in parts:
        if part in blocks:
            device_map[part] = next((place for place in room if sizes[part] <= room[place]), "disk")
            if device_map[part] in room:
                room[device_map[part]] -= sizes[part]
    for part, source in tied.items():
        device_map.setdefault(part, device_map[source])
    return {part: device_map[part] for part in parts}


def _refuse_too_little(
    empty: nn.Module, stored: Stored, read: set[str], written: set[str], taken: int, memory: int
) -> None:
    """What is read as it lies is the kernel's to keep or drop; what changes its form on the way takes memory."""
    sizes, dtypes = _weights(empty), {name: parameter.dtype for name, parameter in empty.named_parameters()}
    table = _table(empty)
    cast = {name: sizes[name] for name in read - {table} if stored.in_place[name] != dtypes[name]}
    # The experts' own tensors lie in mapped files; the stack, and its halves before they are joined, do not.
    stacked = {name: 2 * sizes[name] for name in written}
    for found, why, instead in (
        (cast, "is stored in another precision, and read", "leave dtype out"),
        (stacked, "is rewritten while loading", "a checkpoint that has it in one piece"),
    ):
        name = max(found, key=lambda name: found[name], default="")
        if name and taken + found[name] > memory:
            raise ValueError(
                f"memory={format_bytes(memory)} is too little: {name} {why}, which takes {format_bytes(found[name])} "
                f"beside the {format_bytes(taken)} of this process; give at least "
                f"{format_bytes(taken + found[name])}, or {instead}"
            )
    if taken > memory:
        raise ValueError(
            f"memory={format_bytes(memory)} is too little: this process has {format_bytes(taken)} before any weight is "
            f"loaded; give at least {format_bytes(taken * FOR_ACTIVATIONS // (FOR_ACTIVATIONS - 1))}"
        )


def _parts(model: nn.Module) -> list[str]:
    """Modules, and parameters above them, that hold all the weights between them, none within another."""
    blocks = blocks_of(model)
    parts: list[str] = []

    def visit(name: str, module: nn.Module) -> None:
        prefix = f"{name}." if name else ""
        if name in blocks or (name and not any(block.startswith(prefix) for block in blocks)):
            parts.append(name)
            return
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        parts.extend(f"{prefix}{key}" for key, _ in own)
        for key, child in module.named_children():
            visit(f"{prefix}{key}", child)

    visit("", model)
    return parts


def _sizes(model: nn.Module, parts: list[str]) -> dict[str, int]:
    sizes = dict.fromkeys(parts, 0)
    buffers = {name: buffer.numel() * buffer.element_size() for name, buffer in model.named_buffers()}
    for name, count in (_weights(model) | buffers).items():
        sizes[_part(name, parts)] += count
    return sizes


def _weights(model: nn.Module) -> dict[str, int]:
    """Bytes of each parameter; of those that share one, of the first."""
    tied = _tied(model)
    return {
        name: parameter.numel() * parameter.element_size()
        for name, parameter in model.named_parameters()
        if name not in tied
    }


def _tied(model: nn.Module) -> Mapping[str, str]:
    return getattr(model, "all_tied_weights_keys", None) or {}


def _table(model: Any) -> str:
    """The input embeddings, of which only rows are read; "" where the output projection is the same weight."""
    table = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    weight = getattr(table, "weight", None)
    name = next((name for name, parameter in model.named_parameters() if parameter is weight), "")
    return "" if name in _tied(model).values() else name


def _inside(name: str, parts: Iterable[str]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def _part(name: str, parts: Iterable[str]) -> str:
    return next(part for part in parts if _inside(name, [part]))


def _place(name: str, device_map: Mapping[str, str | int]) -> str | int:
    return device_map[_part(name, device_map)]
