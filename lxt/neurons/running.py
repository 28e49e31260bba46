"""Labelling: read, compute the blocks that are missing, fold them together, name the neurons.

Where blocks are computed is left to a `Compute`: something that takes the function and the blocks, and gives each
block's number and tally in whatever order. Here it is this process, one after the other; results don't depend on it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from lxt.attributor import Attributor, versions
from lxt.inputs import context
from lxt.neurons.corpus import Corpus
from lxt.neurons.fingerprint import model_fingerprint
from lxt.neurons.measuring import KINDS, LABELLED
from lxt.neurons.results import Detect, Explain, Neurons, saved
from lxt.neurons.results import load as load_results
from lxt.neurons.scoring import Scorer
from lxt.neurons.storing import READABLE, Folder
from lxt.neurons.tables import TABLES, available
from lxt.neurons.tally import Tally
from lxt.neurons.windows import Block, Reading
from lxt.opening import load

__all__ = ["Compute", "label"]

Compute = Callable[[Callable[[Block], Tally], Reading], Iterable[tuple[int, Tally]]]
"""(function of a block, blocks) -> (number of a block, its tally), in any order; `counts` of the blocks are filled.

When the next pair is asked for, the last one is on disk.
"""

_LENGTH = 512  # tokens of a window where the model has room for more: what is kept of a batch grows with it
_FOLD = 16  # blocks: the tally is read and written once for so many


def label(
    model: Any,
    corpus: str | Path | Sequence[str] | Corpus,
    latent: str = "neuron",
    layers: Sequence[int] | None = None,
    by: str = "relevance",
    top: int = 20,
    out: str | Path | None = None,
    targets: Sequence[str | int] | None = None,
    length: int | None = None,
    batch_size: int = 8,
    block_size: int = 64,
    explain: Explain | None = None,
    detect: Detect | None = None,
    compute: Compute | None = None,
    progress: Callable[[int], None] | None = None,
) -> Neurons:
    """The places of a corpus where each neuron matters most, and a name for each neuron.

    Started again with the same arguments it goes on where it stopped, however it stopped. What is finished is read.

    >>> lxt.neurons.label("tiny", ["My cats love my dogs."], layers=[2]).best(2, top=3)  # doctest: +SKIP

    Args:
        model: an Attributor, or what `lxt.load` takes.
        corpus: a file, a folder, a dataset of the hub, texts, or a Corpus that says how to read them.
        latent: "neuron" or "head".
        layers: which layers; None is all.
        by: "relevance" or "activation": which contexts the names come from; both are kept.
        top: how many contexts to keep of each neuron, by relevance and by activation, positive and negative.
        out: the results folder; None keeps them in memory alone.
        targets: explain the predictions of these tokens alone; None is every next token.
        length: tokens in a window; None is the model's context, 512 at most.
        batch_size: full windows that run at once; short ones take their room, more at a time.
        block_size: windows of a block, which is what a stopped run repeats at most.
        explain: writes a name from contexts, instead of distinctive tokens.
        detect: says how well a name fits texts, for testing what `explain` wrote.
        compute: where blocks are computed; None is here.
        progress: called with the number of each block that is finished.

    Raises:
        BadRow: a row of the corpus that is no text.
        ValueError: no such layer, an empty corpus, a folder with other results, numbers that aren't finite.
        OSError: files that can't be read or written; a full disk.
    """
    if latent not in LABELLED:
        raise ValueError(f"{latent!r} can't be labelled; those that can are: {', '.join(LABELLED)}")
    for name, value in (("top", top), ("batch_size", batch_size), ("block_size", block_size)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
    if isinstance(layers, (int, str)):
        raise ValueError(f"layers are a list such as [3, 7], or None for all, got {layers!r}")
    if layers is not None and not list(layers):
        raise ValueError("layers is empty; leave it out to label the neurons of every layer")
    if by not in KINDS:
        raise ValueError(f"neurons are labelled by {' or '.join(KINDS)}, not by {by!r}")
    explainer = model if isinstance(model, Attributor) else load(model)
    if explainer.tokenizer is None:
        raise ValueError("labelling needs a tokenizer: lxt.load(model, tokenizer)")
    given = corpus if isinstance(corpus, Corpus) else Corpus(corpus)
    length = _length(length, explainer.model)
    scorer = Scorer(explainer, (), top, batch_size, length, _target_ids(targets, explainer), latent)
    scorer = replace(scorer, layers=scorer.every() if layers is None else tuple(sorted(set(layers))))
    scorer.places()  # raises before anything is written
    settings = {
        "model": model_fingerprint(explainer.model),
        "model_name": explainer.name,
        "rules": repr(explainer.rules),
        "rules_name": explainer.rules.name,
        "versions": versions(),
        "corpus": given.fingerprint(),
        "latent": latent,
        "layers": list(scorer.layers),
        "top": top,
        "targets": None if scorer.targets is None else list(scorer.targets),
        "length": length,
        "batch_size": batch_size,
        "block_size": block_size,
    }
    with tempfile.TemporaryDirectory(prefix="lxt-neurons-") as scratch:
        folder = Folder(scratch if out is None else out, settings)
        try:
            if not folder.finished:
                _run(folder, scorer, given, length, block_size, compute or in_process, progress or (lambda block: None))
            elif explain is None and folder.saved == saved(by, explained=False) and _is_whole(folder):
                with suppress(ValueError):  # what was damaged since is written again, as is what was deleted
                    return load_results(folder.path)
            found = Neurons.of(folder, explainer.tokenizer, by)
            found.name_all(explain, detect)
            if out is not None:
                found.save()
        finally:
            folder.close()
    return found


def _is_whole(folder: Folder) -> bool:
    return all((folder.path / name).exists() for name in (*READABLE, *(TABLES if available() else ())))


def in_process(function: Callable[[Block], Tally], todo: Reading) -> Iterator[tuple[int, Tally]]:
    """One block after the other."""
    for block in todo:
        yield block.number, function(block)


def _run(
    folder: Folder,
    scorer: Scorer,
    corpus: Corpus,
    length: int,
    size: int,
    compute: Compute,
    progress: Callable[[int], None],
) -> None:
    reading = Reading(corpus, scorer.explainer.tokenizer, length, size, frozenset(folder.done()))
    for number, tally in compute(scorer, reading):
        folder.add(number, tally)
        folder.fold(_FOLD)
        progress(number)
    counts = reading.counts
    if counts is None:
        raise RuntimeError("the blocks were not computed to the end; run again with the same arguments")
    if not counts["windows"]:
        raise ValueError("no document of the corpus has two tokens, so there is nothing to predict; give longer ones")
    folder.fold()
    folder.finish(counts)


def _target_ids(targets: Sequence[str | int] | None, explainer: Attributor) -> tuple[int, ...] | None:
    if targets is None:
        return None
    tokenizer, count = explainer.tokenizer, explainer.model.get_input_embeddings().weight.shape[0]
    found = []
    for target in [targets] if isinstance(targets, (str, int)) else targets:
        ids = [target] if isinstance(target, int) else tokenizer(target, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise ValueError(f"the target {target!r} is {len(ids)} tokens; give targets of one token, or their ids")
        if not 0 <= ids[0] < count:
            raise ValueError(f"the target {target!r} is no token: the model's ids are 0 to {count - 1}")
        found.append(ids[0])
    if not found:
        raise ValueError("targets is empty; leave it out to explain every next token")
    return tuple(sorted(set(found)))


def _length(length: int | None, model: Any) -> int:
    limit = context(model)
    if length is None:
        return min(limit or _LENGTH, _LENGTH)
    if type(length) is not int or length < 2:
        raise ValueError(f"length must be a whole number >= 2, got {length!r}")
    if limit is not None and length > limit:
        raise ValueError(f"length is {length}, and the context of {type(model).__name__} is {limit}; give at most that")
    return length
