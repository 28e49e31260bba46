"""What an encoder-decoder wrote, step by step: relevance of the source and of the prefix for every token of the target.

1. The target is given, or the model writes it greedily.
2. One forward under the rules, in which the decoder reads the target shifted one place to the right.
3. One backward for each step through the same graph. Step k reads the source and the k tokens before it, so what it
   explains splits into `source_relevance[k]` and `prefix_relevance[k, : k + 1]`; the rest of the prefix is 0.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lxt.assembling import prediction
from lxt.attribution import Attribution, Explained, Prediction
from lxt.coefficients import wide
from lxt.encdec import forward, inputs_of, with_prefix
from lxt.inputs import Model, Row, check, context, offender, prepare, read, task
from lxt.targets import Goal, Kind, evaluate
from lxt.tokens import display
from lxt.turns import backward, turns

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Steps", "attribute_steps"]


@dataclass(frozen=True, eq=False, repr=False)
class Steps:
    """Relevance for each step of a decoder; `steps[k]` is one of them as an Attribution.

    Attributes:
        source: the encoder's tokens.
        prefix: the decoder's input, one token for each step: the start, then the target without its last token.
        target: the tokens that are explained, one for each step.
        source_special: which tokens of the source are special.
        prefix_special: which tokens of the prefix are.
        source_relevance: [step, source], in units of the step's value.
        prefix_relevance: [step, prefix]; 0 above the diagonal, since step k reads the prefix up to its own place k.
        values: [step], what is explained: by default the logit of the target's token.
        predictions: what the model predicts at each step.
        kind: as in `lxt.Target`.
        model: the model's name.
        rules: the composite's name.
        versions: package -> version of what computed it.
    """

    source: list[str]
    prefix: list[str]
    target: list[str]
    source_special: list[bool]
    prefix_special: list[bool]
    source_relevance: Tensor
    prefix_relevance: Tensor
    values: Tensor
    predictions: list[Prediction]
    kind: str
    model: str
    rules: str
    versions: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.target)

    def __iter__(self) -> Iterator[Attribution]:
        return (self[step] for step in range(len(self)))

    def __getitem__(self, step: int) -> Attribution:
        """One step as an Attribution: the source's tokens, then the prefix that the step read."""
        if isinstance(step, bool) or not isinstance(step, Integral):
            raise TypeError(f"a step is chosen by its number, got {step!r}")
        place = int(step) + (len(self) if step < 0 else 0)
        if not 0 <= place < len(self):
            raise IndexError(f"step {step} of {len(self)}; allowed: 0 to {len(self) - 1}")
        seen = place + 1
        relevance = torch.cat([self.source_relevance[place], self.prefix_relevance[place, :seen]])[None]
        return Attribution(
            tokens=[self.source + self.prefix[:seen]],
            token_ids=None,
            relevance=relevance,
            mask=torch.ones(relevance.shape, dtype=torch.bool),
            special=torch.tensor([self.source_special + self.prefix_special[:seen]]),
            explained=[Explained(repr(self.target[place]), self.kind, float(self.values[place]))],
            predictions=[self.predictions[place]],
            model=self.model,
            rules=self.rules,
            versions=self.versions,
        )

    @property
    def total(self) -> Tensor:
        """[step]: the relevance of the source and the prefix together, in float64."""
        return self.source_relevance.double().sum(-1) + self.prefix_relevance.double().sum(-1)

    @property
    def conservation(self) -> Tensor:
        """[step]: total relevance over the explained value; NaN where the value is 0."""
        values = self.values.double()
        return torch.where(values == 0, torch.nan, self.total / values)

    def __repr__(self) -> str:
        return (
            f"Steps({len(self)} steps, {len(self.source)} source tokens, {self.kind}, model={self.model!r}, "
            f"rules={self.rules!r})"
        )

    def _repr_html_(self) -> str:
        from lxt.show.steps import fragment

        return fragment(self)

    def show(self) -> None:
        """Show steps × tokens, in the terminal or the notebook that runs this: first the source, then the prefix."""
        from lxt.show.steps import show

        show(self)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write one self-contained page that needs no network."""
        from lxt.show.files import check_suffix, write
        from lxt.show.steps import page

        check_suffix(path, (".html", ".htm"), "to_html")
        write(path, page(self).encode())

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Steps × tokens as a heat map.

        Args:
            path: where to write it, as .png, .pdf or .svg; None only returns the figure.
        """
        from lxt.show.figure import written
        from lxt.show.steps import picture

        return written(picture(self), path)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain lists and numbers, ready for `json.dumps`."""
        return {
            "source": self.source,
            "prefix": self.prefix,
            "target": self.target,
            "source_relevance": self.source_relevance.tolist(),
            "prefix_relevance": self.prefix_relevance.tolist(),
            "values": self.values.tolist(),
            "kind": self.kind,
            "model": self.model,
            "rules": self.rules,
            "versions": dict(self.versions),
        }


@dataclass(frozen=True)
class Written:
    """What the decoder reads and is to write, [step] each."""

    prefix: tuple[int, ...]
    target: tuple[int, ...]


def attribute_steps(
    model: Model,
    tokenizer: Any,
    source: object,
    target: str | Sequence[int] | None,
    kind: Kind,
    max_new_tokens: int,
    patch: Callable[[], AbstractContextManager[Any]],
) -> dict[str, Any]:
    """The fields of a Steps that the model decides; arguments as in `Attributor.attribute_steps`.

    Raises:
        ValueError: not an encoder-decoder, several prompts, a target that is empty or out of the vocabulary.
    """
    if task(model) != "seq2seq":
        raise ValueError(
            f"{type(model).__name__} is not an encoder-decoder that writes, so it has no decoder steps; explain its "
            "prediction with attribute(), a whole continuation with attribute(text, target=...)"
        )
    rows = read(source, model, tokenizer)
    if len(rows) != 1:
        raise ValueError(f"attribute_steps explains one prompt at a time, got {len(rows)}; call it for each")
    with torch.inference_mode(False), torch.no_grad():
        written = _given(target, model, tokenizer) if target is not None else _greedy(rows[0], model, max_new_tokens)
    row = Row(rows[0].ids, rows[0].embeds, written.prefix)
    check([row], model, " with its target")
    limit = context(model)
    if limit is not None and len(written.target) > limit:
        raise ValueError(f"the target has {len(written.target)} tokens, and {type(model).__name__} takes {limit}")
    with torch.inference_mode(False), torch.enable_grad():
        prepared = with_prefix(prepare([row], model, tokenizer), model)
        if prepared.decoder_embeds is None:
            raise ValueError(f"it isn't known how {type(model).__name__} embeds its decoder's tokens; use attribute()")
        leaves = [leaf.requires_grad_() for leaf in inputs_of(prepared).values()]
        with patch():
            output = forward(model, prepared)
            logits = (output.logits if hasattr(output, "logits") else output[0])[:, : len(written.target)]
            if not logits.isfinite().all():
                raise ValueError(f"the logits of {type(model).__name__} are not finite: {offender(model)}")
            goals = [Goal((token,), (step,), kind) for step, token in enumerate(written.target)]
            values, found = [], []
            for number, turn in enumerate(turns([goals]), 1):
                value, _ = evaluate(turn.of(logits), turn.goals)
                found.append(backward(value, leaves, again=number < len(goals)))
                values.append(value.detach().cpu())
    source_relevance, prefix_relevance = (torch.cat(side) for side in zip(*found, strict=True))
    names, marks = display(written.prefix, tokenizer, model.config)
    return {
        "source": prepared.labels[0],
        "prefix": names,
        "target": display(written.target, tokenizer, model.config)[0],
        "source_special": prepared.special[0].tolist(),
        "prefix_special": marks,
        "source_relevance": source_relevance,
        "prefix_relevance": prefix_relevance,
        "values": torch.cat(values),
        "predictions": [
            prediction(scores, model, tokenizer) for scores in logits[0].detach().to(wide(logits.dtype)).cpu()
        ],
        "kind": kind,
    }


def _given(target: str | Sequence[int], model: Model, tokenizer: Any) -> Written:
    """A given target: as the labels that the model is trained on, special tokens included."""
    if isinstance(target, str):
        if not target:
            raise ValueError("the target is an empty string; give the text that the decoder is to write, or None")
        if tokenizer is None:
            raise ValueError(f"the target {target!r} needs a tokenizer: lxt.load(model, tokenizer); or give its ids")
        ids = tuple(tokenizer(text_target=target)["input_ids"])
    else:
        given = target.tolist() if isinstance(target, Tensor) else target
        if not isinstance(given, (list, tuple)) or not all(
            isinstance(i, Integral) and not isinstance(i, bool) for i in given
        ):
            raise TypeError(f"the target must be a string, token ids [step], or None; got {type(target).__name__}")
        ids = tuple(int(token) for token in given)
    if not ids:
        raise ValueError("the target has no tokens; give at least one, or None for what the model writes")
    size = model.get_output_embeddings().weight.shape[0]
    wrong = [token for token in ids if not 0 <= token < size]
    if wrong:
        raise ValueError(f"the target's id {wrong[0]} is out of range: {type(model).__name__} has ids 0 to {size - 1}")
    return Written(_shifted(ids, model), ids)


def _shifted(ids: tuple[int, ...], model: Model) -> tuple[int, ...]:
    start = getattr(model.config, "decoder_start_token_id", None)
    if start is not None:
        return (start, *ids[:-1])
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)  # mBART begins with the language, its last
    if shift is None:
        raise ValueError(
            f"the configuration of {type(model).__name__} has no decoder_start_token_id, which its decoder begins "
            "with; set model.config.decoder_start_token_id"
        )
    return tuple(shift(labels=torch.tensor([ids]))[0].tolist())


def _greedy(row: Row, model: Model, max_new_tokens: int) -> Written:
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be a whole number >= 1, got {max_new_tokens!r}")
    device = next(model.parameters()).device
    if row.embeds is not None:
        given = {"inputs_embeds": row.embeds[None].to(device, model.dtype)}
    else:
        given = {"input_ids": torch.tensor([row.ids], device=device)}
    mask = torch.ones(1, len(row), dtype=torch.long, device=device)
    options = {"num_beams": 1, "do_sample": False, "max_new_tokens": max_new_tokens}
    ids = tuple(model.generate(**given, attention_mask=mask, **options)[0].tolist())
    return Written(ids[:-1], ids[1:])
