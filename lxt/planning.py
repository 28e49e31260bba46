"""What one explainer's requests take, and how they run within its memory: its model and budget with `lxt.fitting`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from lxt.checkpointing import Checkpoint
from lxt.fitting import Choice, fitted, plans, surely_fits
from lxt.forecast import Forecast, forecast_pass
from lxt.inputs import Model, task
from lxt.latents import Keep, sites
from lxt.memory import available, give_back_freed, resident
from lxt.patchmap import PatchMap
from lxt.requesting import Request
from lxt.turns import places

__all__ = ["Planner"]


@dataclass(frozen=True)
class Planner:
    """Forecasts requests and makes them fit.

    Attributes:
        model: the model.
        patch_map: says where latents are.
        context: checkpoint -> the context of a pass.
        lock: what a pass holds.
        choice: of checkpoints.
        memory: how much of the CPU's memory the process may take; None is what there is.
        said: what was warned of already; each choice is said once.
    """

    model: Model
    patch_map: PatchMap
    context: Callable[[Checkpoint], AbstractContextManager[Any]]
    lock: AbstractContextManager[Any]
    choice: Choice
    memory: int | None
    said: set[str] = field(default_factory=set)

    def forecast(self, request: Request) -> Forecast:
        """Of the largest batch, as it would run; where it doesn't fit, as it was asked for."""
        forecasts = (one.forecast for one in plans(request, self.choice, partial(self._pass, request), self._reads))
        first = next(forecasts)
        return first if first.fits else next((one for one in forecasts if one.fits), first)

    def fitted(self, request: Request) -> Request:
        """The request as it runs.

        Raises:
            MemoryError: it can't.
            ValueError: a latent that the model doesn't have.
        """
        sites(self.model, self.patch_map, request.latents)  # refuses what there is none of before anything runs
        if self.memory is not None:
            give_back_freed()
        plain = replace(request, checkpoint="off" if self.choice == "auto" else self.choice)
        device = self.model.get_input_embeddings().weight.device
        if device.type != "meta" and surely_fits(self.model, request, self._free(device)):
            return plain
        try:
            request, chosen = fitted(request, self.choice, partial(self._pass, request), self.memory, self._reads)
        except ValueError as error:
            if self.choice != "auto":
                return plain  # as if nobody had asked: most that can't be forecast fits
            self._warn(f"{error}; it runs with checkpoint='layer', and may need more than there is", str(error))
            return replace(request, checkpoint="layer")
        if chosen is not None:
            self._warn(chosen, f"{request.checkpoint}, {max(map(len, request.groups))}")
        return request

    def _warn(self, message: str, about: str) -> None:
        if about not in self.said:
            self.said.add(about)
            warnings.warn(message, stacklevel=5)

    @property
    def _reads(self) -> bool:
        return any(parameter.is_meta for parameter in self.model.parameters())

    def _free(self, device: torch.device) -> int:
        left = available(device)
        return left if self.memory is None or device.type != "cpu" else min(left, max(0, self.memory - resident()))

    def _pass(
        self, request: Request, group: Sequence[int], latents: tuple[Keep, ...], checkpoint: Checkpoint
    ) -> Forecast:
        rows, goals = [request.rows[i] for i in group], [request.goals[i] for i in group]
        tokens, steps = max(map(len, rows)), max(len(row.decoder) for row in rows)
        if not steps and getattr(self.model.config, "is_encoder_decoder", False):
            steps = tokens  # a classifier's decoder reads the source
        with self.lock:
            return forecast_pass(
                self.model,
                self.patch_map,
                partial(self.context, checkpoint),
                len(group),
                tokens,
                places(rows, goals, task(self.model)),
                latents,
                checkpoint,
                steps,
                self._free,
            )
