"""A block of windows → its tally: one forward and one backward for each batch of windows.

What is explained is the sum, over all positions of a window, of the logit of the token that really follows. Relevance
is linear in what is explained, so a neuron's relevance at a token is the sum of its relevances there for each of the
following predictions: what the neuron, at this token, contributed to writing the rest of the window. One backward
gives that for all tokens, where a backward for each prediction would cost as many times more. Chosen targets narrow the
sum to the places where one of these tokens follows.

Windows rather than the whole text bound it: a token counts for predictions in its own window, and the last token of a
window for none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lxt.attributor import Attributor, lock_of
from lxt.inputs import Row, batches, check, offender, prepare, task
from lxt.latents import Site, sites
from lxt.neurons.measuring import KINDS, SIGNS, Measured, measured
from lxt.neurons.ranking import top_of
from lxt.neurons.tally import Tally
from lxt.neurons.windows import Block, Window
from lxt.patches import patch_map_for

__all__ = ["Scorer"]


@dataclass(frozen=True)
class Scorer:
    """Computes blocks; depends on nothing but its arguments and the block.

    Attributes:
        explainer: model, tokenizer and rules.
        layers: which layers' neurons.
        top: how many windows to keep of each neuron.
        batch_size: how many windows run at once.
        targets: the tokens whose predictions are explained; None is all.
    """

    explainer: Attributor
    layers: tuple[int, ...]
    top: int
    batch_size: int
    targets: tuple[int, ...] | None = None

    def every(self) -> tuple[int, ...]:
        """All layers of the model."""
        return tuple(site.layer for site in self._sites())

    def places(self) -> list[Site]:
        """Where the neurons are.

        Raises:
            ValueError: no causal language model, no such layer, or an architecture whose neurons aren't known.
        """
        model, found = self.explainer.model, self._sites()
        wrong = [layer for layer in self.layers if not 0 <= layer < len(found)]
        if wrong:
            raise ValueError(f"there is no layer {wrong[0]}; {type(model).__name__} has layers 0 to {len(found) - 1}")
        return [site for site in found if site.layer in self.layers]

    def __call__(self, block: Block) -> Tally:
        """The block's tally, on the CPU.

        Raises:
            ValueError: numbers that aren't finite.
        """
        model = self.explainer.model
        rows = [Row(window.ids) for window in block.windows]
        check(rows, model)
        groups, parts = batches(rows, model, self.batch_size), []
        checkpoint = "off" if self.explainer.checkpoint == "auto" else self.explainer.checkpoint
        places = self.places()
        with (
            lock_of(model),
            torch.inference_mode(False),
            torch.enable_grad(),
            self.explainer.context(self.explainer._patch, checkpoint),
        ):
            parts = [self._measured([rows[i] for i in group], places, checkpoint == "off") for group in groups]
        order = [i for group in groups for i in group]
        return self._tally(block.windows, parts, torch.tensor(order).argsort())

    def _sites(self) -> list[Site]:
        model = self.explainer.model
        if task(model) != "causal":
            raise ValueError(
                f"{type(model).__name__} predicts no next tokens, which neurons are labelled by; load a causal model"
            )
        patch_map = self.explainer.patch_map
        return sites(model, patch_map if patch_map is not None else patch_map_for(model), ("neuron",))

    def _measured(self, rows: Sequence[Row], places: Sequence[Site], cut: bool) -> Measured:
        model = self.explainer.model
        prepared = prepare(rows, model)
        embeds = prepared.embeds.requires_grad_()
        tokens = torch.stack([self._counted(row, prepared.mask.shape[1]) for row in rows])
        with measured(places, tokens) as found:
            logits = model(inputs_embeds=embeds, **prepared.arguments(model)).logits
            explained = self._explained(logits, prepared.mask, rows)
            if not explained.isfinite():
                raise ValueError(f"the logits of {type(model).__name__} are not finite: {offender(model)}")
            # Below the lowest neurons that are asked for the backward has nothing to tell.
            end = found.lowest if cut and found.lowest is not None else embeds
            torch.autograd.grad(explained, end)
        found.lowest = None
        missing = [place.layer for place in places if (place.layer, "relevance") not in found.found]
        if missing:
            raise ValueError(f"no relevance reached the neurons of layer {missing[0]} of {type(model).__name__}")
        return found

    def _explained(self, logits: Tensor, mask: Tensor, rows: Sequence[Row]) -> Tensor:
        width = mask.shape[1]
        ids = torch.tensor([[0] * (width - len(row)) + list(row.ids) for row in rows], device=logits.device)
        wanted = mask[:, :-1].to(logits.device)
        if self.targets is not None:
            wanted = wanted & torch.isin(ids[:, 1:], torch.tensor(self.targets, device=logits.device))
        following = logits[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
        return following.masked_fill(~wanted, 0).sum(dtype=torch.promote_types(logits.dtype, torch.float32))

    def _counted(self, row: Row, width: int) -> Tensor:
        """[token], True at tokens of the text: special ones collect what has no other place to go."""
        special = self._special()
        counts = [token not in special for token in row.ids]
        return torch.tensor([False] * (width - len(row)) + counts)

    def _special(self) -> frozenset[int]:
        return frozenset(self.explainer.tokenizer.all_special_ids)

    def _tally(self, windows: tuple[Window, ...], parts: Sequence[Measured], order: Tensor) -> Tally:
        numbers = [window.number for window in windows]
        lengths = torch.tensor([len(window.ids) for window in windows])
        padded = torch.cat([torch.full((len(part.tokens),), part.tokens.shape[1]) for part in parts])[order] - lengths
        tops, moments = {}, {}
        for layer in self.layers:
            for kind in KINDS:
                found = [part.found.pop((layer, kind)) for part in parts]
                total = torch.stack([one.moments for one in found]).sum(0).cpu()
                if not total.isfinite().all():
                    raise ValueError(
                        f"the {kind} of neurons in layer {layer} is not finite in the windows from "
                        f"{windows[0].document} on; load the model with dtype='bfloat16' or 'float32'"
                    )
                moments[layer, kind] = total
                for sign, direction in SIGNS.items():
                    score = torch.cat([one.score[sign] for one in found])
                    place, shift = order.to(score.device), padded[:, None].to(score.device)
                    position = torch.cat([one.position[sign] for one in found])
                    best = top_of(score[place], position[place] - shift, numbers, self.top, direction)
                    tops[layer, kind, sign] = best.cpu()
        size = self.explainer.model.get_input_embeddings().weight.shape[0]
        special = self._special()
        ids = torch.tensor([token for window in windows for token in window.ids if token not in special])
        return Tally.named(tops, moments, torch.bincount(ids.long(), minlength=size), windows)
