"""What an attribution will take in memory and time, before anything of it runs.

1. The pass runs as it would, patched, checkpointed and with its latents, on fake tensors (`lxt.allocations`).
2. What is alive at the end of the forward, and the most that is alive at any time, are read off there.
3. Time is the counted operations at the rate of a matrix product measured now, and the bytes that everything else
   moves at the rate of a copy.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lxt import rules
from lxt.accelerate_hooks import computing_device, loading_hooks
from lxt.allocations import Allocations, fakes, standing_in
from lxt.checkpointing import Checkpoint, segment_length
from lxt.coefficients import wide
from lxt.encdec import inputs_of
from lxt.inputs import Model, Prepared, pads_left
from lxt.latents import Keep, streams
from lxt.memory import format_bytes
from lxt.passes import traced
from lxt.patchmap import PatchMap

__all__ = ["Forecast", "Usage", "forecast_pass"]

# What a process takes on beside its tensors: pages of torch's code, the matrix products' own buffers, holes that small
# blocks leave. Measured (tests/bench/forecast.py): 2 to 8 MiB, whatever the architecture, from 512 tokens on.
_FIRST_RUN = 6 * 2**20


@dataclass(frozen=True)
class Usage:
    """Memory on one device, in bytes.

    Attributes:
        weights: parameters and buffers; of those that are read from disk, what is there at once.
        activations: what the graph keeps for the backward when the forward is done.
        checkpoints: inputs of layers that run again.
        logits: of the explained positions.
        latents: their relevance, which the result holds.
        working: what the largest moment takes beside all of these: one layer that runs again, gradients on their way.
        process: what a first run brings beside tensors: code, buffers of matrix products, small blocks.
        free: what the device has left now.
    """

    weights: int = 0
    activations: int = 0
    checkpoints: int = 0
    logits: int = 0
    latents: int = 0
    working: int = 0
    process: int = 0
    free: int = 0

    @property
    def needed(self) -> int:
        """What the run takes at its largest, beside the weights."""
        return self.activations + self.checkpoints + self.logits + self.latents + self.working + self.process

    @property
    def peak(self) -> int:
        """`needed` and the weights."""
        return self.weights + self.needed


@dataclass(frozen=True)
class Forecast:
    """What one pass will take; several batches run one after the other and take no more memory.

    Attributes:
        devices: device -> what is used there.
        prompts: how many run at once.
        tokens: how many each has, padding included.
        checkpoint: how the layers are checkpointed.
        latents: which are read.
        flops: floating point operations.
        seconds: an estimate, without what is read from disk; expect a factor of two either way.
    """

    devices: dict[str, Usage]
    prompts: int
    tokens: int
    checkpoint: Checkpoint
    latents: tuple[str, ...]
    flops: int
    seconds: float

    @property
    def fits(self) -> bool:
        """Whether every device has enough left."""
        return all(usage.needed <= usage.free for usage in self.devices.values())

    def show(self) -> None:
        """Print it as a table."""
        from rich.console import Console

        Console().print(self)

    def __rich__(self) -> Any:
        from rich.table import Table

        prompts = f"{self.prompts} prompt{'s' if self.prompts > 1 else ''}"
        short = [
            f"{format_bytes(usage.needed - usage.free)} too little on {device}"
            for device, usage in self.devices.items()
            if usage.needed > usage.free
        ]
        table = Table(
            title=f"{prompts} of {self.tokens} tokens, checkpoint={self.checkpoint!r}",
            caption=f"about {_duration(self.seconds)} ({self.flops / 1e12:.3g} TFLOP)"
            + (f"\n[red]does not fit: {', '.join(short)}[/]" if short else ""),
        )
        table.add_column("")
        for device in self.devices:
            table.add_column(device, justify="right")
        for name in ("weights", "activations", "checkpoints", "logits", "latents", "working", "process"):
            table.add_row(name, *[format_bytes(getattr(usage, name)) for usage in self.devices.values()])
        table.add_section()
        table.add_row("peak", *[format_bytes(usage.peak) for usage in self.devices.values()])
        fits = "[green]{}[/]" if self.fits else "[red]{}[/]"
        table.add_row("left beside the weights", *[fits.format(format_bytes(u.free)) for u in self.devices.values()])
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=100, color_system=None)
        with console.capture() as captured:
            console.print(self)
        return captured.get()


def forecast_pass(
    model: Model,
    patch_map: PatchMap,
    patch: Callable[[], AbstractContextManager[Any]],
    prompts: int,
    tokens: int,
    where: Tensor | None = None,
    latents: Sequence[Keep] = (),
    checkpoint: Checkpoint = "off",
    steps: int = 0,
    free: Callable[[torch.device], int] | None = None,
) -> Forecast:
    """What a pass takes.

    Args:
        model: the model; weights that are on the meta device are never read.
        patch_map: says where latents are.
        patch: makes the context of the forward and backward, with the rules and the checkpoints.
        prompts: how many run at once.
        tokens: of each of them, padding included.
        where: [prompt, position], the explained positions; None is the last one of each.
        latents: the wanted ones.
        checkpoint: what `patch` does, for the account.
        steps: the decoder's tokens, for encoder-decoders.
        free: what a device has left; None asks nothing.

    Raises:
        ValueError: the model can't run without numbers, since it decides by them what to compute.
    """
    mode, account = fakes(), Allocations()
    where = torch.full((prompts, 1), tokens - 1) if where is None else where
    try:
        with torch.inference_mode(False), torch.enable_grad(), standing_in(model, mode):
            device, dtype = _place(model)
            with mode:
                embeds = torch.empty(prompts, tokens, _width(model), dtype=dtype, device=device)
                written = torch.empty(prompts, steps, _width(model), dtype=dtype, device=device) if steps else None
            prepared = _prepared(embeds, written, model)
            with account:
                found = _measured(model, prepared, where, latents, patch_map, patch, account)
    except Exception as error:
        if isinstance(error, ValueError) and "rules" in str(error):  # a patch of somebody else's
            raise
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"what {type(model).__name__} takes can't be forecast: without numbers it stops with "
            f"{type(error).__name__}: {reason[0][:200] if reason else ''}"
        ) from error
    forward, logits, inside = found
    kept = _checkpoints(model, patch_map, embeds, written, checkpoint)
    devices = {}
    weights = _weights(model, checkpoint, patch_map)
    for place in sorted({*account.peak, *weights}, key=str):
        here = place == device
        parts = {
            "checkpoints": min(kept, forward[place]) if here else 0,
            "logits": logits if here else 0,
            "latents": inside if place.type == "cpu" else 0,
        }
        parts["activations"] = max(0, forward[place] - parts["checkpoints"] - parts["logits"])
        working = max(0, account.peak[place] - sum(parts.values()))
        over = max(0, sum(parts.values()) - account.peak[place])  # latents that come when the activations have gone
        parts["activations"] -= min(over, parts["activations"])
        devices[str(place)] = Usage(
            weights=weights.get(place, 0),
            working=working,
            process=_FIRST_RUN if place.type == "cpu" else 0,
            free=free(place) if free is not None else 0,
            **parts,
        )
    seconds = account.flops / _rate(device, dtype) + account.moved / _bandwidth(device)
    return Forecast(devices, prompts, tokens, checkpoint, tuple(keep.name for keep in latents), account.flops, seconds)


def _measured(
    model: Model,
    prepared: Prepared,
    where: Tensor,
    latents: Sequence[Keep],
    patch_map: PatchMap,
    patch: Callable[[], AbstractContextManager[Any]],
    account: Allocations,
) -> tuple[dict[torch.device, int], int, int]:
    """What is alive after the forward by device, the size of the logits, and that of the latents."""
    leaves = [leaf.requires_grad_() for leaf in inputs_of(prepared).values()]
    for leaf in leaves:
        account.add(leaf)
    with traced(model, prepared, where, latents, patch_map, patch) as (logits, sink):
        alive = dict(account.live)
        logits.isfinite()
        values = logits.to(wide(logits.dtype)).sum()
        gradients = torch.autograd.grad(values, leaves)
        relevance = [rules.relevance(leaf.detach(), c).cpu() for leaf, c in zip(leaves, gradients, strict=True)]
        # As `Sink.stacked`: memory is taken when it is written, a layer at a time, and each goes as its copy comes.
        keys = sorted(sink.values)
        stacks = [torch.empty_like(part, device="cpu") for key in keys for part in sink.values.pop(key)]
        logits.detach().to(wide(logits.dtype)).cpu()
    del relevance
    size = sum(stack.numel() * stack.element_size() for stack in stacks)
    return {place: alive.get(place, 0) for place in account.peak}, logits.numel() * logits.element_size(), size


def _prepared(embeds: Tensor, written: Tensor | None, model: Model) -> Prepared:
    prompts, tokens = embeds.shape[:2]
    ones = torch.ones(prompts, tokens, dtype=torch.long, device=embeds.device)
    mask = torch.ones(prompts, tokens, dtype=torch.bool)
    steps = 0 if written is None else written.shape[1]
    return Prepared(
        embeds=embeds,
        attention_mask=ones,
        position_ids=ones.cumsum(-1) - 1 if pads_left(model) else None,
        decoder_ids=torch.zeros(prompts, steps, dtype=torch.long, device=embeds.device) if steps else None,
        token_ids=torch.zeros(prompts, tokens, dtype=torch.long) if steps else None,
        labels=[],
        mask=mask,
        special=~mask,
        decoder_embeds=written,
    )


def _place(model: Model) -> tuple[torch.device, torch.dtype]:
    weight = model.get_input_embeddings().weight
    return weight.device, weight.dtype


def _width(model: Model) -> int:
    return model.get_input_embeddings().weight.shape[1]


def _checkpoints(
    model: Model, patch_map: PatchMap, embeds: Tensor, written: Tensor | None, checkpoint: Checkpoint
) -> int:
    """The size of the states that are kept, the embeddings among them."""
    if checkpoint == "off":
        return 0
    total = 0
    for layers, state in zip(streams(model, patch_map), (embeds, written), strict=False):
        if state is not None:
            length = 1 if checkpoint == "layer" else segment_length(len(layers))
            last = (len(layers) - 1) // length * length
            states = -(-last // length) + (len(layers) - 1 - last)
            total += states * state.numel() * state.element_size()
    return total


def _weights(model: Model, checkpoint: Checkpoint, patch_map: PatchMap) -> dict[torch.device, int]:
    """Bytes of weights by device; those on the meta device come when they are needed, to where they are needed."""
    sizes: dict[torch.device, int] = {}
    seen: set[int] = set()

    def size(module: nn.Module, absent: bool) -> int:
        total = 0
        for tensor in (*module.parameters(), *module.buffers()):
            if id(tensor) not in seen and tensor.is_meta == absent:
                seen.add(id(tensor))
                total += tensor.numel() * tensor.element_size()
                if not absent:
                    sizes[tensor.device] = sizes.get(tensor.device, 0) + tensor.numel() * tensor.element_size()
        return total

    size(model, absent=False)
    if not any(parameter.is_meta for parameter in model.parameters()):
        return sizes
    layers = [size(layer, absent=True) for stream in streams(model, patch_map) for layer in stream]
    table = model.get_input_embeddings()
    seen.update(map(id, table.parameters()))  # its rows are looked up one by one
    rest = size(model, absent=True)
    loaded = sum(layers) + rest if checkpoint == "off" else max(*layers, rest, 0)  # the graph keeps what it needs
    place = _executing(model)
    sizes[place] = sizes.get(place, 0) + loaded
    return sizes


def _executing(model: Model) -> torch.device:
    """Where weights that are brought are brought to."""
    return next((computing_device(module) for module in model.modules() if loading_hooks(module)), torch.device("cpu"))


@functools.lru_cache(maxsize=16)  # 50 ms each, and a machine's rates stay
def _rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating point operations per second of a matrix product of the size that layers have."""
    a, b = torch.ones(512, 1024, device=device, dtype=dtype), torch.ones(1024, 1024, device=device, dtype=dtype)
    return 2 * 512 * 1024 * 1024 / _seconds(lambda: a @ b, device)


@functools.lru_cache(maxsize=16)
def _bandwidth(device: torch.device) -> float:
    """Bytes per second that an element-wise operation reads and writes."""
    x = torch.ones(2**23, device=device)
    return 2 * x.numel() * 4 / _seconds(lambda: x.neg(), device)


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    """The median of a few runs."""
    taken = []
    for _ in range(6):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return sorted(taken[1:])[2]


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
