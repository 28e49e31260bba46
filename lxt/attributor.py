"""The Attributor: a model with its tokenizer and rules, which explains what the model predicts.

1. `lxt.inputs` makes rows of token ids, `lxt.targets` says which positions of which rows are explained.
2. Each batch of rows is one pass (`lxt.passes`) under the rules; the model is patched for as long as that takes.
3. The passes' numbers are put together in the order of the prompts.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lxt.attribution import Attribution, Explained, Prediction
from lxt.composites import Composite, resolve
from lxt.inputs import Row, batches, check, read, task
from lxt.latents import names
from lxt.loading import device_of, dtype_of, model_of, tokenizer_of
from lxt.passes import Result, audited, run
from lxt.patches import patch_map_for
from lxt.patching import monkey_patch, rules_of
from lxt.patchmap import PatchMap
from lxt.preconditions import refuse_missing_weights
from lxt.targets import Goal, Score, Target, Token, name_of
from lxt.targets import resolve as resolve_targets
from lxt.tokens import display

if TYPE_CHECKING:
    from lxt.checking import CheckReport

__all__ = ["Attributor", "Request", "Result", "load"]

# One lock per model, since the patch and the hooks of one pass would reach another's forward.
_LOCKS: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()

OneTarget = Token | Target | Score | None


@dataclass(frozen=True, eq=False)
class Request:
    """What `attribute` was asked for, ready to run again: under other rules, or on the bare model.

    Attributes:
        rows: the prompts, with a sequence target's tokens appended.
        goals: one per row.
        groups: which rows run together.
        latents: names of the wanted latents.
    """

    rows: list[Row]
    goals: list[Goal]
    groups: list[list[int]]
    latents: tuple[str, ...] = ()


class Attributor:
    """Explains a model's outputs by the tokens that it read.

    >>> explainer = Attributor(model, tokenizer, rules="cp")  # doctest: +SKIP
    >>> explainer.attribute("I have 5 cats and 3 dogs. My cats love to play with my").relevance  # doctest: +SKIP

    The model is patched while `attribute` runs and is afterwards as it was, also when that fails.

    Args:
        model: a transformers model with a head: a language model (causal, masked, encoder-decoder) or a classifier.
        tokenizer: its tokenizer; None when prompts come as token ids or embeddings.
        rules: a preset's name, or a Composite.
        patch_map: fused forwards and latents in place of the architecture's own.

    Raises:
        ValueError: unknown rules, no explainable head, or weights that were never loaded.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        rules: str | Composite = "attnlrp",
        patch_map: PatchMap | None = None,
    ) -> None:
        if not isinstance(model, nn.Module) or not hasattr(model, "config"):
            raise TypeError(
                f"an Attributor needs a transformers model instance, got {type(model).__name__}; lxt.load takes names"
            )
        self.model: Any = model
        self.tokenizer = tokenizer
        self.rules = resolve(rules)
        self.patch_map = patch_map
        task(model)
        refuse_missing_weights(self.model)

    def __repr__(self) -> str:
        return f"Attributor({self.name}, rules={self.rules.name!r})"

    @property
    def name(self) -> str:
        """The model's name: where it was loaded from, else its class."""
        return getattr(self.model.config, "name_or_path", "") or type(self.model).__name__

    def attribute(
        self,
        inputs: object,
        target: OneTarget | Sequence[OneTarget] = None,
        contrast: Token | Sequence[Token] | None = None,
        latents: str | Sequence[str] = (),
        batch_size: int | None = None,
    ) -> Attribution:
        """Relevance of every input token for the target.

        Args:
            inputs: a string or a list of them; chat messages or a list of chats; token ids; or embeddings.
            target: what is explained: a token as string or id (a string of several tokens: their summed
                log-probability), a class index or label, a Target, a function of the logits [batch, 1, vocabulary],
                or a list with one per prompt. None is what the model predicts.
            contrast: token or tokens to subtract (several: their mean).
            latents: which relevances inside the model to keep: "residual", "head", "neuron".
            batch_size: how many prompts run at once; None is all that can.

        Raises:
            ValueError: inputs, target or latents that the model has no answer for; numbers that aren't finite.
            TypeError: a kind of input or target that there is none of.
        """
        refuse_missing_weights(self.model)
        wanted = names(latents)
        rows, goals = resolve_targets(
            target, contrast, read(inputs, self.model, self.tokenizer), self.model, self.tokenizer
        )
        check(rows, self.model, " with its target")
        request = Request(rows, goals, batches(rows, self.model, batch_size), wanted)
        results, predictions = [], []
        for result in self.results(request):
            predictions += [self._prediction(logits[0]) for logits in result.logits]
            results.append(replace(result, logits=result.logits[:0]))  # those of all prompts would fill the memory
        return self._attribution(request, results, predictions).with_checker(
            partial(self._check, request, [result.relevance for result in results])
        )

    def results(
        self, request: Request, patch: Callable[[], AbstractContextManager[Any]] | None = None
    ) -> Iterator[Result]:
        """Run the request, batch by batch.

        Args:
            request: what to run.
            patch: makes the context of each batch's forward and backward; None is the patch with this Attributor's
                rules, `contextlib.nullcontext` the bare model.
        """
        patch_map = self.patch_map if self.patch_map is not None else patch_map_for(self.model)
        with _progress(len(request.groups)) as advance:
            for group in request.groups:
                rows, goals = [request.rows[i] for i in group], [request.goals[i] for i in group]
                with _lock_of(self.model):
                    result = run(
                        self.model, self.tokenizer, rows, goals, request.latents, patch_map, patch or self._patch
                    )
                yield result
                advance()

    def audited(self, request: Request) -> Iterator[tuple[Tensor, tuple[str, ...]]]:
        """The request's relevance by the auditor's mechanism, batch by batch, with the operations unknown to it."""
        for group in request.groups:
            rows, goals = [request.rows[i] for i in group], [request.goals[i] for i in group]
            yield audited(self.model, self.tokenizer, rows, goals, self.rules)

    def _patch(self) -> AbstractContextManager[Any]:
        theirs = rules_of(self.model)
        if theirs is None:
            return monkey_patch(self.model, self.rules, patch_map=self.patch_map)
        if theirs != self.rules:  # switching would leave the caller's handle dead behind their back
            raise ValueError(
                f"{self.name} is already patched with the rules {theirs.name!r}, and this Attributor's are "
                f"{self.rules.name!r}; remove that patch first, or give the Attributor the same rules"
            )
        return nullcontext()

    def _check(self, request: Request, relevance: Sequence[Tensor]) -> CheckReport:
        from lxt.checking import check as report

        return report(self, request, relevance)

    def _attribution(
        self, request: Request, results: Sequence[Result], predictions: Sequence[Prediction]
    ) -> Attribution:
        """The batches' results as one, in the order in which the prompts were given."""
        order = torch.tensor([i for group in request.groups for i in group]).argsort()
        width = max(result.mask.shape[1] for result in results)

        def joined(parts: Sequence[Tensor], batch: int, token: int) -> Tensor:
            wide = [pad(part, [0, 0] * (part.dim() - 1 - token) + [width - part.shape[token], 0]) for part in parts]
            return torch.cat(wide, batch).index_select(batch, order)

        goals = [goal for result in results for goal in result.goals]
        tokens = [[""] * (width - len(row)) + row for result in results for row in result.tokens]
        explained = [
            self._explained(goal, float(value), row)
            for goal, value, row in zip(
                goals,
                torch.cat([result.values for result in results]),
                [request.rows[i] for group in request.groups for i in group],
                strict=True,
            )
        ]
        ids = [result.token_ids for result in results if result.token_ids is not None]
        return Attribution(
            tokens=[tokens[i] for i in order.tolist()],
            token_ids=joined(ids, 0, 1) if len(ids) == len(results) else None,
            relevance=joined([result.relevance for result in results], 0, 1),
            mask=joined([result.mask for result in results], 0, 1),
            special=joined([result.special for result in results], 0, 1),
            explained=[explained[i] for i in order.tolist()],
            predictions=[predictions[i] for i in order.tolist()],
            model=self.name,
            rules=self.rules.name,
            latents={name: joined([result.latents[name] for result in results], 1, 2) for name in request.latents},
            versions=_versions(),
        )

    def _explained(self, goal: Goal, value: float, row: Row) -> Explained:
        if goal.function is not None:
            label = getattr(goal.function, "__name__", type(goal.function).__name__)
        elif len(goal.ids) > 1 and self.tokenizer is not None:
            label = repr("".join(display(goal.ids, self.tokenizer)[0]))
        else:
            label = self._names(goal.ids)
        foils = self._names(goal.contrast)
        if foils:
            label += f" − {foils}" if len(goal.contrast) == 1 else f" − mean({foils})"
        single = len(goal.positions) == 1 and task(self.model) not in ("sequence", "seq2seq")
        return Explained(label, goal.kind, value, goal.positions[0] if single else None)

    def _names(self, ids: Sequence[int]) -> str:
        return ", ".join(repr(name_of(token, self.model, self.tokenizer)) for token in ids)

    def _prediction(self, logits: Tensor) -> Prediction:
        token = int(logits.argmax())
        probability = float(logits.softmax(-1)[token])
        return Prediction(name_of(token, self.model, self.tokenizer), token, float(logits[token]), probability)


def _lock_of(model: nn.Module) -> AbstractContextManager[Any]:
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(model, threading.RLock())


@contextmanager
def _progress(batches: int) -> Iterator[Callable[[], None]]:
    """A bar on stderr, when there are several batches and someone is watching."""
    if batches < 2 or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("attributing", total=batches)
        yield lambda: progress.advance(bar)


def _versions() -> dict[str, str]:
    found = {}
    for package in ("lxt", "torch", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def load(
    name_or_model: str | Path | nn.Module,
    tokenizer: Any = None,
    rules: str | Composite = "attnlrp",
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> Attributor:
    """An Attributor for a model by name, folder or instance.

    >>> lxt.load("tiny").attribute("My cats love to play with my")  # doctest: +SKIP

    Args:
        name_or_model: "tiny" (bundled), a folder, a name on the hub, or a model instance, which is not copied.
        tokenizer: the tokenizer, or its name; None is the model's own, and none at all for an instance.
        rules: a preset's name, or a Composite.
        device: where to put the model. None is a GPU if there is one, and leaves an instance where it is.
        dtype: as torch.dtype or its name. None is the checkpoint's own.

    Raises:
        ValueError: no such model, rules or dtype, or a model that lxt cannot explain.
    """
    composite = resolve(rules)
    kind = dtype_of(dtype)
    place = device_of(device)
    if isinstance(name_or_model, nn.Module):
        model = name_or_model
        if device is not None or kind is not None:
            model = model.to(device=place if device is not None else None, dtype=kind)
        return Attributor(
            model, tokenizer_of(tokenizer) if isinstance(tokenizer, (str, Path)) else tokenizer, composite
        )
    if not isinstance(name_or_model, (str, Path)):
        raise TypeError(f"lxt.load takes a name, a folder or a model instance, got {type(name_or_model).__name__}")
    name = str(name_or_model)
    if name == "tiny":
        from lxt import tiny

        name = str(tiny.path())
    model = model_of(name, kind).eval()
    if place is not None:
        model = model.to(place)
    if tokenizer is None or isinstance(tokenizer, (str, Path)):
        tokenizer = tokenizer_of(name if tokenizer is None else tokenizer)
    attributor = Attributor(model, tokenizer, composite)
    if str(name_or_model) == "tiny":
        model.config.name_or_path = "tiny"
    return attributor
