"""Make a request fit the memory: refuse what can't, choose checkpoints and batches where a budget is given, and try
again once where memory ran out all the same.

A forecast takes about a second for a large model, so a bound that takes none decides first whether one is needed.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar, get_args

import torch

from lxt.checkpointing import CHECKPOINTS, Checkpoint
from lxt.forecast import Forecast
from lxt.inputs import Model, Row
from lxt.latents import Keep
from lxt.memory import available, format_bytes, give_back_freed, resident
from lxt.requesting import Request

__all__ = [
    "Choice",
    "Forecaster",
    "Plan",
    "checked",
    "fitted",
    "in_passes",
    "is_out_of_memory",
    "largest",
    "plans",
    "surely_fits",
]

Result = TypeVar("Result")
Choice = Literal["off", "layer", "nested", "auto"]
Forecaster = Callable[[Sequence[int], tuple[Keep, ...], Checkpoint], Forecast]
"""(rows that run together, latents, checkpoint) -> what they take."""


def checked(checkpoint: Choice | None, memory: int | None) -> Choice:
    """The choice; None is "auto" where there is a budget and "off" where there is none.

    Raises:
        ValueError: it is none of them.
    """
    if checkpoint is None:
        return "off" if memory is None else "auto"
    if checkpoint not in get_args(Choice):
        raise ValueError(f"unknown checkpoint {checkpoint!r}; allowed: {', '.join(get_args(Choice))}")
    return checkpoint


def surely_fits(model: Model, request: Request, free: int) -> bool:
    """Whether half of the memory is enough however generously one counts: a forecast takes a second."""
    tokens = max((len(group) * max(len(request.rows[i]) for i in group) for group in request.groups), default=0)
    longest = max(len(row) + len(row.decoder) for row in request.rows)
    weights = list(model.parameters())
    if any(weight.is_meta for weight in weights):
        return False
    # Every linear map's output and input, its gradient and two temporaries, and attention's scores likewise, where
    # they are kept at all.
    width = sum(sum(weight.shape[-2:]) for weight in weights if weight.dim() > 1)
    heads = getattr(model.config.get_text_config(), "num_attention_heads", 16)
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", 32)
    scores = longest * heads * layers if isinstance(heads, int) and isinstance(layers, int) else longest * 512
    maps = any(keep.name in ("pattern", "flow") for keep in request.latents)
    if getattr(model.config, "_attn_implementation", None) == "sdpa" and not maps:
        scores = 0
    positions = max(sum(len(goal.positions) for goal in goals) for goals in request.goals)
    logits = positions * getattr(model.config.get_text_config(), "vocab_size", 0) // longest
    return tokens * (width + scores + logits) * 4 * 4 <= free // 2


@dataclass(frozen=True)
class Plan:
    """How a request may run, and what its largest group takes then."""

    checkpoint: Checkpoint
    groups: list[list[int]]
    forecast: Forecast


def fitted(
    request: Request, choice: Choice, forecast: Forecaster, budget: int | None, offloaded: bool
) -> tuple[Request, str | None]:
    """The request as it fits, and what was chosen for it, if anything was.

    Args:
        request: as it was asked for.
        choice: of checkpoints; "auto" leaves them and the batches to this function.
        forecast: of a group of its rows.
        budget: as the user gave it; for messages.
        offloaded: whether weights are read while they are needed: without checkpoints the graph would keep them all.

    Raises:
        MemoryError: it doesn't fit; says by how much, and what would.
    """
    tried: list[Plan] = []
    for plan in plans(request, choice, forecast, offloaded):
        tried.append(plan)
        if plan.forecast.fits:
            if any(usage.needed > usage.free // 4 for usage in plan.forecast.devices.values()):
                give_back_freed()
            chosen = replace(request, groups=plan.groups, checkpoint=plan.checkpoint)
            return chosen, _said(request, plan) if choice == "auto" else None
    raise MemoryError(_refusal(request, tried, forecast, budget))


def plans(request: Request, choice: Choice, forecast: Forecaster, offloaded: bool) -> Iterator[Plan]:
    """From the fastest to the leanest: checkpoints first, then half of the batch, and so on; arguments as `fitted`."""
    allowed = (choice,) if choice != "auto" else CHECKPOINTS[1:] if offloaded else CHECKPOINTS
    groups = request.groups
    while True:
        most = largest(request.rows, groups)
        for how in allowed:
            yield Plan(how, groups, forecast(most, request.latents, how))
        if choice != "auto" or len(most) == 1:
            return
        size = (len(most) + 1) // 2
        groups = [group[at : at + size] for group in groups for at in range(0, len(group), size)]


def largest(rows: Sequence[Row], groups: Sequence[list[int]]) -> list[int]:
    """The group that takes most memory: that with most tokens, padding included."""
    return max(groups, key=lambda group: len(group) * max(len(rows[i]) for i in group))


def _said(request: Request, plan: Plan) -> str | None:
    parts = []
    if plan.checkpoint != "off":
        parts.append(f"checkpoint={plan.checkpoint!r}")
    if len(plan.groups) > len(request.groups):
        parts.append(f"batch_size={max(map(len, plan.groups))}")
    if not parts:
        return None
    needed = max(plan.forecast.devices.values(), key=lambda usage: usage.needed / max(usage.free, 1))
    return (
        f"to fit the memory: {' and '.join(parts)}; takes about {format_bytes(needed.needed)} beside the weights, of "
        f"{format_bytes(needed.free)} that are left"
    )


def _refusal(request: Request, tried: Sequence[Plan], forecast: Forecaster, budget: int | None) -> str:
    first = min(tried, key=_excess)
    device, usage = max(first.forecast.devices.items(), key=lambda item: item[1].needed - item[1].free)
    group = largest(request.rows, first.groups)
    prompts = f"{len(group)} prompts" if len(group) > 1 else "a prompt"
    limit = "" if budget is None else f" within memory={format_bytes(budget)}"
    start = (
        f"{prompts} of {first.forecast.tokens} tokens would take {format_bytes(usage.needed)} on {device} beside the "
        f"weights, with checkpoint={first.checkpoint!r}, and {format_bytes(usage.free)} are left{limit}: "
        f"{format_bytes(usage.needed - usage.free)} too little. "
    )
    ways = []
    for how in CHECKPOINTS[CHECKPOINTS.index(first.checkpoint) + 1 :]:
        other = forecast(group, request.latents, how)
        ways.append((other.fits, f"checkpoint={how!r} ({_needs(other)})"))
    if request.latents:
        other = forecast(group, (), first.checkpoint)
        ways.append((other.fits, f"no latents ({_needs(other)})"))
    if len(group) > 1:
        other = forecast(group[:1], request.latents, first.checkpoint)
        ways.append((other.fits, f"batch_size=1 ({_needs(other)})"))
    if budget is not None and device == "cpu" and usage.needed <= available(torch.device("cpu")):
        ways.append((True, f"memory='{-(-(resident() + usage.needed) // 2**20)}MiB'"))
    good = [way for fits, way in ways if fits]
    if good:
        return f"{start}These would fit: {', '.join(good)}"
    less = f" (less, but not enough: {', '.join(way for _, way in ways)})" if ways else ""
    return f"{start}Shorten the prompt, load the model in bfloat16, or take a machine with more memory{less}"


def _excess(plan: Plan) -> int:
    return max(usage.needed - usage.free for usage in plan.forecast.devices.values())


def _needs(forecast: Forecast) -> str:
    return format_bytes(max(usage.needed for usage in forecast.devices.values()))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: a GPU's, or what the CPU's allocator could get."""
    words = ("not enough memory", "can't allocate memory", "out of memory")
    known = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, known) or (isinstance(error, RuntimeError) and any(w in str(error) for w in words))


def in_passes(
    groups: list[list[int]], checkpoint: Checkpoint, run: Callable[[list[int], Checkpoint], Result]
) -> Iterator[Result]:
    """`run(group, checkpoint)` for each group; where memory runs out, once more with half of it or more checkpoints.

    Args:
        groups: rows that run together; one that is halved is halved in this list, so that others see it too.
        checkpoint: to start with.
        run: one pass.

    Raises:
        MemoryError: memory ran out a second time, or nothing smaller is possible.
    """
    again, number = True, 0
    while number < len(groups):
        try:
            result = run(groups[number], checkpoint)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if not again or (len(groups[number]) == 1 and checkpoint == CHECKPOINTS[-1]):
                raise MemoryError(
                    f"memory ran out{'' if again else ' again'}, with {len(groups[number])} at once and "
                    f"checkpoint={checkpoint!r}: give the Attributor checkpoint='nested', a smaller batch_size, fewer "
                    "latents or shorter prompts; explainer.forecast(inputs) says beforehand what each of these takes"
                ) from error
        else:
            yield result
            number += 1
            continue
        # Only here is the error gone, and with it the frames that hold what has to be freed.
        again = False
        groups[number : number + 1], checkpoint = _smaller(groups[number], checkpoint)


def _smaller(group: list[int], checkpoint: Checkpoint) -> tuple[list[list[int]], Checkpoint]:
    """Half of the rows, or for a single one more checkpoints; what was held is freed, and a warning says so."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    give_back_freed()
    if len(group) > 1:
        half = (len(group) + 1) // 2
        warnings.warn(
            f"memory ran out with {len(group)} prompts at once: trying again with {half}; set batch_size={half} to "
            "start there",
            stacklevel=3,
        )
        return [group[:half], group[half:]], checkpoint
    how: Checkpoint = "nested" if checkpoint == "layer" else "layer"
    warnings.warn(
        f"memory ran out with checkpoint={checkpoint!r}: trying again with {how!r}; give the Attributor "
        f"checkpoint={how!r} to start there",
        stacklevel=3,
    )
    return [group], how
