"""One pass: a batch of rows through the model forward once, and backward as often as a row has goals.

1. Embed the rows, and tap the latents that are wanted.
2. Forward, computing the logits of the explained positions only (`lxt.narrow`), under whatever `patch` gives.
3. Backward of the sum of one explained number of every row: rows don't see each other, so the sum mixes nothing.
4. Relevance is embedding × gradient, summed over the hidden dimension. It and the latents go to the CPU, and the next
   goals have their backward through the same graph (`lxt.turns`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lxt.attention import SEEN_BY_THE_MODE
from lxt.audit import audit
from lxt.coefficients import wide
from lxt.composites import Composite
from lxt.encdec import FromIds, forward, inputs_of, shifted, with_prefix
from lxt.holds import Holds, make_constant
from lxt.inputs import Model, Prepared, Row, offender, prepare, task
from lxt.lastlayer import only_at
from lxt.latents import Keep, LatentRelevance, Sink, Site, capture, residual_layers, sites
from lxt.latents import joined as joined_latents
from lxt.narrow import narrowed
from lxt.patchmap import PatchMap
from lxt.preconditions import attention_names
from lxt.spans import stacked
from lxt.targets import Goal, evaluate
from lxt.turns import Turn, backward, places, turns

__all__ = ["Result", "audited", "run", "traced"]


@dataclass(frozen=True, eq=False)
class Result:
    """What one pass gave, on the CPU: for each goal, those of the first row first.

    Attributes:
        relevance: [goal, token], 0 at padding.
        logits: [row, position, vocabulary], all that were computed.
        spots: [goal, 2], the row and the position in `logits` where each goal is explained (first).
        values: [goal], the explained numbers.
        goals: with the predicted tokens filled in.
        latents: by name, with goals for rows.
        tokens: [goal][token], "" at padding.
        token_ids: [goal, token], or None.
        mask: [goal, token].
        special: [goal, token].
        prefix: [goal], the relevance of the decoder's own tokens; None where there are none.
    """

    relevance: Tensor
    logits: Tensor
    spots: Tensor
    values: Tensor
    goals: list[Goal]
    latents: dict[str, LatentRelevance]
    tokens: list[list[str]]
    token_ids: Tensor | None
    mask: Tensor
    special: Tensor
    prefix: Tensor | None = None


def run(
    model: Model,
    tokenizer: Any,
    rows: Sequence[Row],
    goals: Sequence[Sequence[Goal]],
    latents: Sequence[Keep],
    patch_map: PatchMap,
    patch: Callable[[], AbstractContextManager[Any]],
) -> Result:
    """Explain the rows together.

    Args:
        model: the model.
        tokenizer: for the tokens' display only; may be None.
        rows: prompts that may share a forward (`lxt.inputs.batches`).
        goals: one or several for each row; as many backwards run as the row with most has.
        latents: the wanted ones.
        patch_map: says where latents are.
        patch: makes the context of the forward and backward: `monkey_patch`, or `nullcontext` for the bare model.

    Raises:
        ValueError: numbers that aren't finite, with the weight to blame; a latent that the model doesn't have.
    """
    # An outer no_grad or inference_mode is the caller's habit around models, and would leave nothing to explain.
    with torch.inference_mode(False), torch.enable_grad():
        prepared = with_prefix(prepare(rows, model, tokenizer), model)
        leaves = [leaf.requires_grad_() for leaf in inputs_of(prepared).values()]
        where, dealt = places(rows, goals, task(model)), turns(goals)
        with traced(model, prepared, where, latents, patch_map, patch) as (logits, sink):
            if not logits.requires_grad:
                raise ValueError(
                    f"the logits of {type(model).__name__} don't depend on its embeddings as far as autograd knows: a "
                    "forward or a hook runs under no_grad, or detaches"
                )
            if not logits.isfinite().all():
                raise ValueError(f"the logits of {type(model).__name__} are not finite: {offender(model)}")
            parts = [
                _part(turn, logits, leaves, prepared, latents, sink, again=number < len(dealt))
                for number, turn in enumerate(dealt, 1)
            ]
    for part in parts:
        if not part.relevance.isfinite().all():
            raise ValueError(
                f"the relevance is not finite, though the logits of {type(model).__name__} are: the backward "
                f"overflows in {leaves[0].dtype}; load the model with dtype='bfloat16' or 'float32'"
            )
    return _joined(parts, dealt, logits, prepared)


@contextmanager
def traced(
    model: Model,
    prepared: Prepared,
    where: Tensor,
    latents: Sequence[Keep],
    patch_map: PatchMap,
    patch: Callable[[], AbstractContextManager[Any]],
) -> Iterator[tuple[Tensor, Sink]]:
    """The forward; yields its logits, [row, position, vocabulary], and what their backward, inside, fills.

    Args:
        model: the model.
        prepared: the batch; what is explained requires grad.
        where: [row, position], the explained positions.
        latents: the wanted ones.
        patch_map: says where latents are.
        patch: as in `run`.
    """
    taps = sites(model, patch_map, latents)
    if taps and patch_map.tokens_first and len(prepared.mask) > 1:
        raise ValueError(
            f"the layers of {type(model).__name__} have tokens before rows, so latents are read for one row at a time; "
            "give batch_size=1"
        )
    last = _last_layer(model, patch_map, taps, where)
    with (
        capture(taps, len(prepared.mask), prepared.mask.shape[1], latents) as sink,
        narrowed(_head(model), where) as finish,
        # on the bare model too: torch has another kernel where an attention bias requires grad
        Holds().hold(model.parameters(), make_constant),
        patch(),
        only_at(last, where),  # around the layer's fused forward, where it has one
    ):
        yield finish(_logits(forward(model, prepared), model)), sink


@dataclass(frozen=True, eq=False)
class _Part:
    """What one backward gave, on the CPU: fields as in Result, for the goals of one turn."""

    relevance: Tensor
    values: Tensor
    goals: list[Goal]
    latents: dict[str, LatentRelevance]
    prefix: Tensor | None


def _part(
    turn: Turn,
    logits: Tensor,
    leaves: Sequence[Tensor],
    prepared: Prepared,
    latents: Sequence[Keep],
    sink: Sink,
    again: bool,
) -> _Part:
    values, goals = evaluate(turn.of(logits), turn.goals)
    by_input = backward(values, leaves, again)
    relevance, prefix = _by_token(by_input, prepared)
    inside = {
        name: sink.stacked(name, prepared.mask) if name != "embed" else _embedded(by_input[0], prepared.mask)
        for keep in latents
        for name in keep.names
    }
    sink.values.clear()  # the next backward writes anew
    if not turn.alone:
        relevance = relevance[turn.rows]
        inside = {name: joined_latents([latent], turn.rows) for name, latent in inside.items()}
        prefix = None if prefix is None else prefix[turn.rows]
    relevance = relevance.masked_fill(~prepared.mask[turn.rows], 0)
    return _Part(relevance, values.detach().cpu(), goals, inside, prefix)


def _embedded(relevance: Tensor, mask: Tensor) -> LatentRelevance:
    """What the pass explains anyway, as a latent."""
    return LatentRelevance("embed", relevance.masked_fill(~mask, 0)[None], (0,))


def _joined(parts: Sequence[_Part], dealt: Sequence[Turn], logits: Tensor, prepared: Prepared) -> Result:
    """The turns' parts row by row: all goals of the first row, then those of the second."""
    owners = torch.cat([turn.rows for turn in dealt])
    order = owners.argsort(stable=True)
    rows = owners[order]

    def joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
        return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim).index_select(dim, order)

    goals = [goal for part in parts for goal in part.goals]
    prefixes = [part.prefix for part in parts if part.prefix is not None]
    return Result(
        relevance=joined([part.relevance for part in parts]),
        logits=logits.detach().to(wide(logits.dtype)).cpu(),
        spots=torch.stack([rows, torch.cat([turn.columns[:, 0] for turn in dealt])[order]], dim=1),
        values=joined([part.values for part in parts]),
        goals=[goals[i] for i in order.tolist()],
        latents={name: joined_latents([part.latents[name] for part in parts], order) for name in parts[0].latents},
        tokens=[prepared.labels[row] for row in rows.tolist()],
        token_ids=None if prepared.token_ids is None else prepared.token_ids[rows],
        mask=prepared.mask[rows],
        special=prepared.special[rows],
        prefix=joined(prefixes) if prefixes else None,
    )


def _logits(output: Any, model: Model) -> Tensor:
    if task(model) == "question":
        return stacked(output)
    return output.logits if hasattr(output, "logits") else output[0]


def _by_token(parts: Sequence[Tensor], prepared: Prepared) -> tuple[Tensor, Tensor | None]:
    """The relevance of the prompt's tokens, [batch, token], and of the decoder's own tokens, [batch]."""
    if len(parts) == 1:
        return parts[0], None
    if not prepared.reads_source:
        return parts[0], parts[1].sum(-1)
    again, start = shifted(parts[1])
    return parts[0] + again, start


def audited(
    model: Model,
    tokenizer: Any,
    rows: Sequence[Row],
    goals: Sequence[Sequence[Goal]],
    rules: Composite,
    operations: Mapping[str, str],
) -> tuple[Tensor, tuple[str, ...]]:
    """The goals' relevance by the auditor, all logits computed, [goal, token]; and the operations unknown to it."""
    with torch.inference_mode(False), torch.enable_grad():
        prepared = with_prefix(prepare(rows, model, tokenizer), model)
        where, dealt = places(rows, goals, task(model)), turns(goals)
        explained = inputs_of(prepared)
        called = model if prepared.decoder_embeds is None else FromIds(model)
        parts: list[Tensor] = []
        unknown: dict[str, None] = {}
        for turn in dealt:
            with narrowed(None, where) as finish:

                def target(output: Any, turn: Turn = turn, finish: Callable[[Tensor], Tensor] = finish) -> Tensor:
                    return evaluate(turn.of(finish(_logits(output, model))), turn.goals)[0].sum()

                found = audit(
                    called, explained | prepared.arguments(model), target, rules, tuple(explained), operations
                )
            relevance, _ = _by_token([found.relevance[name].sum(-1).cpu() for name in explained], prepared)
            parts.append(relevance.masked_fill(~prepared.mask, 0)[turn.rows])
            unknown |= dict.fromkeys(found.unknown)
    order = torch.cat([turn.rows for turn in dealt]).argsort(stable=True)
    return torch.cat(parts)[order], tuple(unknown)


def _head(model: Model) -> nn.Module | None:
    return model.get_output_embeddings() if task(model) in ("causal", "masked", "seq2seq") else None


_AROUND_LAYERS = ("residual", "residual_pre")  # what is read of a layer without running all of it


def _last_layer(model: Model, patch_map: PatchMap, taps: Sequence[Site], where: Tensor) -> nn.Module | None:
    """A causal model's last layer, if it may run at the explained positions alone.

    Not where a latent or somebody's hook wants all of its insides, nor under attention with masks of another form, nor
    where a position stands twice in a row: it would count twice.
    """
    once = all(len(set(row)) == len(row) for row in where.tolist())
    if task(model) != "causal" or not once or not patch_map.layers:
        return None
    layers = residual_layers(model, patch_map)
    if any(tap.latent not in _AROUND_LAYERS and tap.layer == len(layers) - 1 for tap in taps):
        return None
    layer = layers[-1]
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in layer.modules())
    return None if hooked or attention_names(model) - set(SEEN_BY_THE_MODE) else layer
