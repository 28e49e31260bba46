"""A block of windows → its tally: one forward and one backward for each batch of windows.

What is explained is the sum, over all positions of a window, of the logit of the token that really follows. Relevance
is linear in what is explained, so a neuron's relevance at a token is the sum of its relevances there for each of the
following predictions: what the neuron, at this token, contributed to writing the rest of the window. One backward
gives that for all tokens, where a backward for each prediction would cost as many times more. Chosen targets narrow the
sum to the places where one of these tokens follows.

Windows of like length run together, and short ones more at a time: a batch has the tokens of several full windows,
whatever the documents' lengths are, and little padding. Each window stays a row of its own, so attention needs no mask
that keeps documents apart, which only some implementations of attention take.

Windows rather than the whole text bound it: a token counts for predictions in its own window, and the last token of a
window for none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lxt.attributor import Attributor, lock_of
from lxt.inputs import Model, Row, batches, check, offender, prepare, task
from lxt.latents import Keep, Site, UnknownPlace, sites
from lxt.neurons.measuring import KINDS, SIGNS, Measured, measured
from lxt.neurons.ranking import top_of
from lxt.neurons.tally import Tally
from lxt.neurons.windows import Block, Window
from lxt.patches import patch_map_for

__all__ = ["Scorer"]

# What a batch costs beside its tokens, in tokens. On the CPU 10 to 30 were measured (hidden size 512 and 128). On a GPU
# nothing was: a forward and a backward launch for about as long as a thousand tokens take.
_CPU_BATCH, _GPU_BATCH = 32, 1024


@dataclass(frozen=True)
class Scorer:
    """Computes blocks; depends on nothing but its arguments and the block.

    Attributes:
        explainer: model, tokenizer and rules.
        layers: which layers' neurons.
        top: how many windows to keep of each neuron.
        batch_size: how many full windows run at once, or short ones that take their room.
        length: tokens of a full window.
        targets: the tokens whose predictions are explained; None is all.
        latent: one of LABELLED.
    """

    explainer: Attributor
    layers: tuple[int, ...]
    top: int
    batch_size: int
    length: int
    targets: tuple[int, ...] | None = None
    latent: str = "neuron"

    def every(self) -> tuple[int, ...]:
        """All layers of the model."""
        return tuple(site.layer for site in self._sites(None))

    def places(self) -> list[Site]:
        """Where the neurons or heads are.

        Raises:
            ValueError: no causal language model, no such layer, or an architecture whose neurons aren't known.
        """
        return self._sites(self.layers)

    def __call__(self, block: Block) -> Tally:
        """The block's tally, on the CPU.

        Raises:
            ValueError: numbers that aren't finite.
        """
        model = self.explainer.model
        rows = [Row(window.ids) for window in block.windows]
        check(rows, model)
        groups = _groups(rows, model, self.length, self.batch_size)
        # "auto" is the choice where memory is limited: without checkpoints the graph keeps all weights that were read
        checkpoint = "layer" if self.explainer.checkpoint == "auto" else self.explainer.checkpoint
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

    def _sites(self, layers: tuple[int, ...] | None) -> list[Site]:
        model = self.explainer.model
        if task(model) != "causal":
            raise ValueError(
                f"{type(model).__name__} predicts no next tokens, which neurons are labelled by; load a causal model"
            )
        patch_map = self.explainer.patch_map
        known = patch_map if patch_map is not None else patch_map_for(model)
        try:
            return sites(model, known, [Keep(self.latent, layers=layers)])
        except UnknownPlace as error:
            ways = []
            if error.layers:
                numbers = ",".join(map(str, error.layers))
                ways.append(f"the layers that have one: layers={error.layers}, --layers {numbers}")
            if error.experts:
                ways.append("heads: latent='head', --latent head")
            ways = ways or [f"another latent, or give the Attributor a PatchMap with the {self.latent} path"]
            raise ValueError(f"{error.what} Label {'; or '.join(ways)}") from None

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
            raise ValueError(f"no relevance reached the {self.latent}s of layer {missing[0]} of {type(model).__name__}")
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
                        f"the {kind} of {self.latent}s in layer {layer} is not finite in the windows from "
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


def _groups(rows: Sequence[Row], model: Model, length: int, batch_size: int) -> list[list[int]]:
    """Which rows run at once: by length, and so split that padding and the batches' own cost are least together.

    At most as many tokens as `batch_size` full windows have, padding included.
    """
    own = _CPU_BATCH if model.device.type in ("cpu", "meta") else _GPU_BATCH
    found: list[list[int]] = []
    for alike in batches(rows, model):
        order = sorted(alike, key=lambda i: len(rows[i]))
        best, cut = [0.0], [0]  # of the first n rows: the least cost, and where their last batch begins
        for end, longest in enumerate((len(rows[i]) for i in order), 1):
            starts = [s for s in range(end) if s == end - 1 or (end - s) * longest <= batch_size * length]
            cut.append(min(starts, key=lambda s: best[s] + (end - s) * longest))
            best.append(best[cut[-1]] + (end - cut[-1]) * longest + own)
        end, groups = len(order), []
        while end:
            groups.append(order[cut[end] : end])
            end = cut[end]
        found += reversed(groups)
    return found
