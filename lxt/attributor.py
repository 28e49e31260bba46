"""The Attributor: a model with its tokenizer and rules, which explains what the model predicts.

1. `lxt.inputs` makes rows of token ids, `lxt.targets` says which positions of which rows are explained.
2. Each batch of rows is one pass (`lxt.passes`) under the rules; the model is patched for as long as that takes.
3. The passes' numbers are put together in the order of the prompts.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lxt.assembling import assembled, explained, prediction, predictions, standing, standings
from lxt.attribution import Attribution
from lxt.checkpointing import Checkpoint, checkpointed
from lxt.compiling import uncompiled
from lxt.composites import Composite, resolve
from lxt.conversations import refuse_missing_images, shows_images
from lxt.fitting import Choice, checked, in_passes
from lxt.imagegeometry import image_relevances
from lxt.images import ImageExplainer, ImageRequest, image_request, tokens_of
from lxt.inputs import read, task
from lxt.latents import Keep, streams
from lxt.latents import wanted as wanted_latents
from lxt.memory import parse_bytes
from lxt.passes import Result, audited, run
from lxt.patches import patch_map_for
from lxt.patching import monkey_patch, rules_of
from lxt.patchmap import PatchMap
from lxt.pixels import split_processor
from lxt.planning import Planner
from lxt.preconditions import refuse_missing_weights, refuse_virtual_tokens
from lxt.qk import attribute_attention
from lxt.qkrelevance import AttentionRelevance, Foil
from lxt.requesting import Request, request_of, targets_of
from lxt.steering import Key, Steering
from lxt.steps import Steps, attribute_steps
from lxt.targets import Kind, Score, Target, Token
from lxt.targets import resolve as resolve_targets
from lxt.versions import versions

if TYPE_CHECKING:
    from lxt.checking import CheckReport
    from lxt.forecast import Forecast

__all__ = ["Attributor", "Request", "Result", "lock_of", "versions"]

# One lock per model, since the patch and the hooks of one pass would reach another's forward.
_LOCKS: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()

OneTarget = Token | Target | Score | None


class Attributor:
    """Explains a model's outputs by the tokens that it read.

    >>> explainer = Attributor(model, tokenizer, rules="cp")  # doctest: +SKIP
    >>> explainer.attribute("I have 5 cats and 3 dogs. My cats love to play with my").relevance  # doctest: +SKIP

    The model is patched while `attribute` runs and is afterwards as it was, also when that fails.

    Args:
        model: a transformers model with a head: a language model (causal, masked, encoder-decoder), a classifier of
            texts or images, or a model that continues text with images.
        tokenizer: its tokenizer, or its processor if it sees; None when prompts come as token ids or embeddings, and
            images as pixel values.
        rules: a preset's name, or a Composite.
        patch_map: fused forwards and latents in place of the architecture's own.
        checkpoint: run layers a second time in the backward instead of keeping what they compute: "off", "layer"
            (each of them; about a third more time), "nested" (twice where that saves more; two thirds), or "auto", the
            fastest that fits. None is "auto" where `memory` is given, and "off" elsewhere.
        memory: how much of the CPU's memory this process may take, as "4GiB" or in bytes, the weights included that it
            holds. None is what there is.

    Raises:
        ValueError: unknown rules, no explainable head, or weights that were never loaded.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        rules: str | Composite = "attnlrp",
        patch_map: PatchMap | None = None,
        checkpoint: Choice | None = None,
        memory: str | int | None = None,
    ) -> None:
        if not isinstance(model, nn.Module) or not hasattr(model, "config"):
            raise TypeError(
                f"an Attributor needs a transformers model instance, got {type(model).__name__}; lxt.load takes names"
            )
        self.model: Any = uncompiled(model)
        self.processor, self.tokenizer = split_processor(tokenizer)
        self.rules = resolve(rules)
        self.patch_map = patch_map
        self.memory = None if memory is None else parse_bytes(memory)
        self.checkpoint: Choice = checked(checkpoint, self.memory)
        self._said: set[str] = set()
        task(self.model)
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
        latents: str | Keep | Sequence[str | Keep] = (),
        batch_size: int | None = None,
        images: object = None,
    ) -> Attribution:
        """Relevance of every input token for the target, and of every pixel where there are images.

        Args:
            inputs: a string or a list of them; chat messages or a list of chats; token ids; or embeddings. For image
                classifiers images: PIL images, arrays, paths, or pixel values [batch, channel, height, width]. For
                models that read and see also what their processor makes, a mapping of tensors.
            target: what is explained: a token as string or id (a string of several tokens: their summed
                log-probability), a class index or label, a Target, a function of the logits [batch, 1, vocabulary],
                or a list with one per prompt (several of one prompt: `attribute_targets`). None is what the model
                predicts.
            contrast: token or tokens to subtract (several: their mean).
            latents: what inside the model to keep the relevance of: `lxt.latents.KINDS`, a module's path, or Keep.
            batch_size: how many prompts run at once; None is all that can. Texts with images run one by one.
            images: those of the one prompt, or a list with those of each prompt, where the inputs don't hold them.

        Raises:
            ValueError: inputs, target or latents that the model has no answer for; numbers that aren't finite.
            TypeError: a kind of input or target that there is none of.
            MemoryError: more memory than there is; says how much, and what would do.
        """
        refuse_missing_weights(self.model)
        refuse_virtual_tokens(self.model)
        wanted = wanted_latents(latents)
        if images is not None or task(self.model) == "image" or shows_images(inputs):
            return self._attribute_images(inputs, images, target, contrast, wanted, batch_size)
        prompts = read(inputs, self.model, self.tokenizer)
        refuse_missing_images(prompts, self.model)
        rows, goals = resolve_targets(target, contrast, prompts, self.model, self.tokenizer)
        return self._attribute(request_of(rows, goals, range(len(rows)), self.model, batch_size, wanted))

    def forecast(
        self,
        inputs: object,
        target: OneTarget | Sequence[OneTarget] = None,
        latents: str | Keep | Sequence[str | Keep] = (),
        batch_size: int | None = None,
    ) -> Forecast:
        """What `attribute` with the same arguments would take of memory and time; nothing is computed.

        >>> explainer.forecast("I have 5 cats and 3 dogs.").show()  # doctest: +SKIP

        Args:
            inputs: text, chats, token ids or embeddings, as in `attribute`.
            target: as in `attribute`.
            latents: as in `attribute`.
            batch_size: as in `attribute`; the forecast is that of the largest batch.

        Raises:
            ValueError: images, or a model that decides by its numbers what to compute.
        """
        wanted = wanted_latents(latents)
        if task(self.model) == "image" or shows_images(inputs):
            raise ValueError("forecast knows text alone so far; leave images out")
        prompts = read(inputs, self.model, self.tokenizer)
        rows, goals = resolve_targets(target, None, prompts, self.model, self.tokenizer)
        request = request_of(rows, goals, range(len(rows)), self.model, batch_size, wanted)
        return self._planner().forecast(request)

    def attribute_targets(
        self,
        inputs: object,
        targets: Sequence[OneTarget] | Sequence[Sequence[OneTarget]] | Tensor | None = None,
        top: int | None = None,
        contrast: Token | Sequence[Token] | None = None,
        latents: str | Keep | Sequence[str | Keep] = (),
        batch_size: int | None = None,
    ) -> Attribution:
        """Relevance of every input token for each of several targets: one forward, and one backward for each target.

        >>> explainer.attribute_targets("I like my", [" dogs", " cats"]).relevance.shape  # doctest: +SKIP
        torch.Size([2, 4])

        Row k of the result is what `attribute` gives for target k; several prompts follow each other with all of their
        targets. A target of several tokens continues the prompt, so it takes a row of the forward for itself.

        Args:
            inputs: text, chats, token ids or embeddings, one prompt or several, as in `attribute`.
            targets: for every prompt, each as in `attribute`; or for each prompt a list of its own.
            top: in place of targets, how many of the most probable tokens (or classes) to explain.
            contrast: token or tokens to subtract from every target.
            latents: as in `attribute`; [layer, row, token, ...], so they take as much memory as there are targets.
            batch_size: how many prompts run at once; None is all that can.

        Raises:
            ValueError: as `attribute`; or images, no targets, or targets for another number of prompts.
            TypeError: as `attribute`; or targets that are no list.
        """
        refuse_missing_weights(self.model)
        refuse_virtual_tokens(self.model)
        wanted = wanted_latents(latents)
        if task(self.model) == "image" or shows_images(inputs):
            raise ValueError("attribute_targets explains text; where there are images call attribute() for each target")
        prompts = read(inputs, self.model, self.tokenizer)
        refuse_missing_images(prompts, self.model)
        several = targets_of(targets, top, len(prompts))
        flat = [target for own in several for target in own]
        which = [number for number, own in enumerate(several) for _ in own]
        each = [prompts[number] for number in which]
        rows, goals = resolve_targets(flat, contrast, each, self.model, self.tokenizer)
        return self._attribute(request_of(rows, goals, which, self.model, batch_size, wanted))

    def attribute_steps(
        self,
        source: object,
        target: str | Sequence[int] | None = None,
        kind: Kind = "logit",
        max_new_tokens: int = 64,
    ) -> Steps:
        """Relevance of the source and of the prefix for every token that an encoder-decoder writes.

        One forward in all, one backward for each step.

        Args:
            source: one prompt: text, token ids, or embeddings.
            target: what the decoder writes, as text (with the special tokens that the tokenizer gives labels) or ids.
                None is what the model writes by itself, greedily.
            kind: what of the target's token is explained at each step, as in Target.
            max_new_tokens: how many tokens to write at most.

        Raises:
            ValueError: a model that is no encoder-decoder, several prompts, a target out of the vocabulary.
            TypeError: a kind of source or target that there is none of.
        """
        if kind not in get_args(Kind):
            raise ValueError(f"unknown kind {kind!r} of target; allowed: {', '.join(get_args(Kind))}")
        refuse_missing_weights(self.model)
        with lock_of(self.model):
            found = attribute_steps(self.model, self.tokenizer, source, target, kind, max_new_tokens, self._patch)
        return Steps(**found, model=self.name, rules=self.rules.name, versions=versions())

    def attribute_attention(
        self, inputs: object, layer: int, head: int, query: int = -1, key: int | None = None, contrast: Foil = "mean"
    ) -> AttentionRelevance:
        """Why a head looked where it looked: an attention score by source token, through its query and its key.

        Args:
            inputs: one prompt, as in `attribute`.
            layer: the head's.
            head: which; negative numbers count from the end, as those of layers and tokens do.
            query: the position of the token that looks.
            key: that of the token it looks at. None is where it looks most.
            contrast: what is subtracted: "mean" of the scores of all keys that the query sees, since a softmax sees
                differences only; the position of one other key; or None.

        Raises:
            ValueError: no such layer, head or position; a key that a mask hides; a layer without attention scores.
        """
        with lock_of(self.model):
            asked = inputs, layer, head, query, key, contrast
            found = attribute_attention(self.model, self.tokenizer, *asked, self._map(), self._patch)
        return AttentionRelevance(**found, model=self.name, rules=self.rules.name, versions=versions())

    def steer(self, interventions: Mapping[Key, Any]) -> Steering:
        """With some activations set or changed, inside `with`; see `lxt.steering` for what and how."""
        return Steering(self.model, self._map(), interventions)

    def _attribute(self, request: Request) -> Attribution:
        request = self._planner().fitted(request)
        results, predicted, stands = [], [], []
        for result in self.results(request):
            predicted += predictions(result, self.model, self.tokenizer)
            stands += standings(result)
            results.append(replace(result, logits=result.logits[:0]))  # those of all prompts would fill the memory
        found = assembled(request, results, predicted, stands, self.model, self.tokenizer)
        return Attribution(**found, model=self.name, rules=self.rules.name, versions=versions()).with_checker(
            partial(self._check, request, [result.relevance for result in results])
        )

    def _attribute_images(
        self,
        inputs: object,
        images: object,
        target: object,
        contrast: object,
        latents: tuple[Keep, ...],
        batch_size: int | None,
    ) -> Attribution:
        if latents:
            raise ValueError(
                f"latents are read for text alone so far, got {', '.join(keep.name for keep in latents)}; leave "
                "latents out where there are images"
            )
        model, processor = self.model, self.processor
        request = image_request(model, processor, self.tokenizer, inputs, images, target, contrast, batch_size)
        runs = ImageExplainer(model, self.rules, self.patch_map, self._patch, partial(lock_of, model))
        rows, targets, predicted, pictures, everything = [], [], [], [], []
        for batch, prompts, result in zip(request.passes, request.rows, runs.results(request), strict=True):
            pictures += image_relevances(batch, result, model, processor, len(rows))
            rows += tokens_of(batch, result, prompts, model, self.tokenizer)
            values = result.values.tolist()
            stands = map(standing, result.goals, (logits[0] for logits in result.logits))
            each = zip(result.goals, values, prompts, stands, strict=True)
            targets += [explained(*one[:3], None, model, self.tokenizer, one[3]) for one in each]
            predicted += [prediction(logits[0], model, self.tokenizer) for logits in result.logits]
            everything.append(result.relevance)
        width = max(len(labels) for labels, *_ in rows)

        def left(parts: Sequence[Tensor]) -> Tensor:
            return torch.stack([pad(part, [width - len(part), 0]) for part in parts])

        return Attribution(
            tokens=[[""] * (width - len(labels)) + labels for labels, *_ in rows],
            token_ids=left([row[3] for row in rows if row[3] is not None]) if rows[0][3] is not None else None,
            relevance=left([row[1] for row in rows]),
            mask=left([torch.ones(len(row[1]), dtype=torch.bool) for row in rows]),
            special=left([row[2] for row in rows]),
            explained=targets,
            predictions=predicted,
            model=self.name,
            rules=self.rules.name,
            versions=versions(),
            images=tuple(pictures),
        ).with_checker(partial(self._check_images, runs, request, everything))

    def results(
        self, request: Request, patch: Callable[[], AbstractContextManager[Any]] | None = None
    ) -> Iterator[Result]:
        """Run the request, batch by batch.

        Args:
            request: what to run.
            patch: makes the context of each batch's forward and backward; None is the patch with this Attributor's
                rules, `contextlib.nullcontext` the bare model.
        """
        patch_map = self._map()
        with _progress(len(request.groups)) as advance:

            def one(group: list[int], checkpoint: Checkpoint) -> Result:
                rows, goals = [request.rows[i] for i in group], [request.goals[i] for i in group]
                context = partial(self.context, patch or self._patch, checkpoint)
                with lock_of(self.model):
                    return run(self.model, self.tokenizer, rows, goals, request.latents, patch_map, context)

            for result in in_passes(request.groups, request.checkpoint, one):
                yield result
                advance()

    def audited(self, request: Request) -> Iterator[tuple[Tensor, tuple[str, ...]]]:
        """The request's relevance by the auditor's mechanism, batch by batch, with the operations unknown to it."""
        operations = self._map().operations
        for group in request.groups:
            rows, goals = [request.rows[i] for i in group], [request.goals[i] for i in group]
            yield audited(self.model, self.tokenizer, rows, goals, self.rules, operations)

    @contextmanager
    def context(self, patch: Callable[[], AbstractContextManager[Any]], checkpoint: Checkpoint) -> Iterator[None]:
        """The patch, and under it the checkpoints."""
        layers = [] if checkpoint == "off" else streams(self.model, self._map())
        with patch(), checkpointed(layers, checkpoint):
            yield

    def _planner(self) -> Planner:
        def context(checkpoint: Checkpoint) -> AbstractContextManager[Any]:
            return self.context(self._patch, checkpoint)

        lock = lock_of(self.model)
        return Planner(self.model, self._map(), context, lock, self.checkpoint, self.memory, self._said)

    def _map(self) -> PatchMap:
        return self.patch_map if self.patch_map is not None else patch_map_for(self.model)

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

    def _check_images(self, runs: ImageExplainer, request: ImageRequest, relevance: Sequence[Tensor]) -> CheckReport:
        from lxt.checking import check as report

        return report(runs, request, relevance)


def lock_of(model: nn.Module) -> AbstractContextManager[Any]:
    """The model's lock: one pass at a time."""
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
