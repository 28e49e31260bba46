"""One pass: a batch of rows through the model forward once and backward once.

1. Embed the rows, and tap the latents that are wanted.
2. Forward, computing the logits of the explained positions only (`lxt.narrow`), under whatever `patch` gives.
3. Backward of the sum of the rows' explained numbers: rows don't see each other, so the sum mixes nothing.
4. Relevance is embedding × gradient, summed over the hidden dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lxt.audit import audit
from lxt.coefficients import wide
from lxt.composites import Composite
from lxt.encdec import FromIds, forward, inputs_of, shifted, with_prefix
from lxt.holds import Holds, make_constant
from lxt.inputs import Model, Prepared, Row, offender, prepare, task
from lxt.interfaces import SEEN_BY_THE_MODE
from lxt.lastlayer import only_at
from lxt.latents import capture, residual_layers, sites
from lxt.narrow import narrowed
from lxt.patchmap import PatchMap
from lxt.preconditions import attention_names
from lxt.spans import stacked
from lxt.targets import Goal, evaluate

__all__ = ["Result", "audited", "run"]


@dataclass(frozen=True, eq=False)
class Result:
    """What one pass gave, on the CPU.

    Attributes:
        relevance: [batch, token], 0 at padding.
        logits: [batch, K, vocabulary] at the explained positions; rows with fewer repeat their last one.
        values: [batch], the explained numbers.
        goals: one per row, with the predicted tokens filled in.
        latents: [layer, batch, token, …] by name.
        tokens: [batch][token], "" at padding.
        token_ids: [batch, token], or None.
        mask: [batch, token].
        special: [batch, token].
        prefix: [batch], the relevance of the decoder's own tokens; None where there are none.
    """

    relevance: Tensor
    logits: Tensor
    values: Tensor
    goals: list[Goal]
    latents: dict[str, Tensor]
    tokens: list[list[str]]
    token_ids: Tensor | None
    mask: Tensor
    special: Tensor
    prefix: Tensor | None = None


def run(
    model: Model,
    tokenizer: Any,
    rows: Sequence[Row],
    goals: Sequence[Goal],
    latents: Sequence[str],
    patch_map: PatchMap,
    patch: Callable[[], AbstractContextManager[Any]],
) -> Result:
    """Explain the rows together.

    Args:
        model: the model.
        tokenizer: for the tokens' display only; may be None.
        rows: prompts that may share a forward (`lxt.inputs.batches`).
        goals: one per row.
        latents: names of the wanted latents.
        patch_map: says where latents are.
        patch: makes the context of the forward and backward: `monkey_patch`, or `nullcontext` for the bare model.

    Raises:
        ValueError: numbers that aren't finite, with the weight to blame; a latent that the model doesn't have.
    """
    # An outer no_grad or inference_mode is the caller's habit around models, and would leave nothing to explain.
    with torch.inference_mode(False), torch.enable_grad():
        prepared = with_prefix(prepare(rows, model, tokenizer), model)
        leaves = [leaf.requires_grad_() for leaf in inputs_of(prepared).values()]
        where = _places(rows, goals, task(model))
        last = _last_layer(model, patch_map, latents, goals)
        with (
            capture(sites(model, patch_map, latents), *prepared.mask.shape) as sink,
            narrowed(_head(model), where) as finish,
            only_at(last, where),
            # on the bare model too: torch has another kernel where an attention bias requires grad
            Holds().hold(model.parameters(), make_constant),
            patch(),
        ):
            output = forward(model, prepared)
            logits = finish(_logits(output, model))
            if not logits.requires_grad:
                raise ValueError(
                    f"the logits of {type(model).__name__} don't depend on its embeddings as far as autograd knows: a "
                    "forward or a hook runs under no_grad, or detaches"
                )
            if not logits.isfinite().all():
                raise ValueError(f"the logits of {type(model).__name__} are not finite: {offender(model)}")
            values, filled = evaluate(logits, goals)
            gradients = torch.autograd.grad(values.sum(), leaves)
    dtype = wide(leaves[0].dtype)
    parts = [
        (leaf.detach().to(dtype) * gradient.to(dtype)).sum(-1).cpu()
        for leaf, gradient in zip(leaves, gradients, strict=True)
    ]
    relevance, prefix = _by_token(parts, prepared)
    if not relevance[prepared.mask].isfinite().all():
        raise ValueError(
            f"the relevance is not finite, though the logits of {type(model).__name__} are: the backward overflows in "
            f"{leaves[0].dtype}; load the model with dtype='bfloat16' or 'float32'"
        )
    return Result(
        relevance=relevance.masked_fill(~prepared.mask, 0),
        logits=logits.detach().to(wide(logits.dtype)).cpu(),
        values=values.detach().cpu(),
        goals=filled,
        latents={name: sink.stacked(name, prepared.mask) for name in latents},
        tokens=prepared.labels,
        token_ids=prepared.token_ids,
        mask=prepared.mask,
        special=prepared.special,
        prefix=prefix,
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
    goals: Sequence[Goal],
    rules: Composite,
    operations: Mapping[str, str],
) -> tuple[Tensor, tuple[str, ...]]:
    """The rows' relevance by the auditor, all logits computed, [batch, token]; and the operations unknown to it."""
    with torch.inference_mode(False), torch.enable_grad():
        prepared = with_prefix(prepare(rows, model, tokenizer), model)
        where = _places(rows, goals, task(model))
        explained = inputs_of(prepared)
        called = model if prepared.decoder_embeds is None else FromIds(model)
        with narrowed(None, where) as finish:

            def target(output: Any) -> Tensor:
                logits = finish(_logits(output, model))
                return evaluate(logits, goals)[0].sum()

            found = audit(called, explained | prepared.arguments(model), target, rules, tuple(explained), operations)
    relevance, _ = _by_token([found.relevance[name].sum(-1).cpu() for name in explained], prepared)
    return relevance.masked_fill(~prepared.mask, 0), found.unknown


def _places(rows: Sequence[Row], goals: Sequence[Goal], kind: str) -> Tensor:
    """[batch, K]: where in the padded batch the explained logits are; shorter rows repeat their last position."""
    width, count = max(len(row) for row in rows), max(len(goal.positions) for goal in goals)
    return torch.tensor(
        [
            [
                place + (0 if kind in ("seq2seq", "question") else width - len(row))
                for place in (*goal.positions, *[goal.positions[-1]] * (count - len(goal.positions)))
            ]
            for row, goal in zip(rows, goals, strict=True)
        ]
    )


def _head(model: Model) -> nn.Module | None:
    return model.get_output_embeddings() if task(model) in ("causal", "masked", "seq2seq") else None


def _last_layer(model: Model, patch_map: PatchMap, latents: Sequence[str], goals: Sequence[Goal]) -> nn.Module | None:
    """A causal model's last layer, if it may run at the explained positions alone.

    Not where a latent or somebody's hook wants all of its insides, nor under attention with masks of another form, nor
    where rows have unlike numbers of positions: the shorter rows' last ones stand there twice, and would count twice.
    """
    same = len({len(goal.positions) for goal in goals}) == 1
    if task(model) != "causal" or not same or not patch_map.layers or {"head", "neuron"} & set(latents):
        return None
    layer = residual_layers(model, patch_map)[-1]
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in layer.modules())
    return None if hooked or attention_names(model) - set(SEEN_BY_THE_MODE) else layer
