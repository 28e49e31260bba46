"""Labelling: read, compute the blocks that are missing, fold them together, name the neurons.

Where blocks are computed is left to a `Compute`: something that takes the function and the blocks, and gives each
block's number and tally in whatever order. Here it is this process, one after the other; results don't depend on it.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lxt.attributor import Attributor, load, versions
from lxt.inputs import context
from lxt.neurons.corpus import Corpus
from lxt.neurons.measuring import KINDS
from lxt.neurons.results import Detect, Explain, Neurons
from lxt.neurons.scoring import Scorer
from lxt.neurons.storing import Folder
from lxt.neurons.tally import Tally
from lxt.neurons.windows import Block, Reading

__all__ = ["Compute", "label", "model_fingerprint"]

Compute = Callable[[Callable[[Block], Tally], Reading], Iterable[tuple[int, Tally]]]
"""(function of a block, blocks) -> (number of a block, its tally), in any order; `counts` of the blocks are filled."""

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

    Started again with the same arguments it goes on where it stopped, however it stopped.

    >>> lxt.neurons.label("tiny", ["My cats love my dogs."], layers=[2]).best(2, top=3)  # doctest: +SKIP

    Args:
        model: an Attributor, or what `lxt.load` takes.
        corpus: a file, a folder, a dataset of the hub, texts, or a Corpus that says how to read them.
        latent: "neuron".
        layers: which layers; None is all.
        by: "relevance" or "activation": which contexts the names come from; both are kept.
        top: how many contexts to keep of each neuron, by relevance and by activation, positive and negative.
        out: the results folder; None keeps them in memory alone.
        targets: explain the predictions of these tokens alone; None is every next token.
        length: tokens in a window; None is the model's context, 512 at most.
        batch_size: windows that run at once.
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
    if latent != "neuron":
        raise ValueError(f"unknown latent {latent!r}; labelled are: neuron")
    for name, value in (("top", top), ("batch_size", batch_size), ("block_size", block_size)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
    if layers is not None and not list(layers):
        raise ValueError("layers is empty; leave it out to label the neurons of every layer")
    if by not in KINDS:
        raise ValueError(f"neurons are labelled by {' or '.join(KINDS)}, not by {by!r}")
    explainer = model if isinstance(model, Attributor) else load(model)
    if explainer.tokenizer is None:
        raise ValueError("labelling needs a tokenizer: lxt.load(model, tokenizer)")
    given = corpus if isinstance(corpus, Corpus) else Corpus(corpus)
    wanted = Scorer(explainer, (), top, batch_size).every() if layers is None else tuple(sorted(set(layers)))
    scorer = Scorer(explainer, wanted, top, batch_size, _target_ids(targets, explainer.tokenizer))
    scorer.places()  # raises before anything is written
    length = _length(length, explainer.model)
    settings = {
        "model": model_fingerprint(explainer.model),
        "model_name": explainer.name,
        "rules": repr(explainer.rules),
        "versions": versions(),
        "corpus": given.fingerprint(),
        "latent": latent,
        "layers": list(wanted),
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
            found = Neurons.of(folder, explainer.tokenizer, by)
            found.name_all(explain, detect)
            if out is not None:
                found.save()
        finally:
            folder.close()
    return found


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


def model_fingerprint(model: Any) -> str:
    """Equal for models of one class with the same weights: a hash of all of them; offloaded ones count by shape."""
    import torch

    digest = hashlib.sha256(type(model).__name__.encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
        if value.device.type == "meta" or not isinstance(value, torch.Tensor):
            continue
        for row in value.detach().reshape(-1).split(1 << 24):
            digest.update(row.contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _target_ids(targets: Sequence[str | int] | None, tokenizer: Any) -> tuple[int, ...] | None:
    if targets is None:
        return None
    found = []
    for target in [targets] if isinstance(targets, (str, int)) else targets:
        ids = [target] if isinstance(target, int) else tokenizer(target, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise ValueError(f"the target {target!r} is {len(ids)} tokens; give targets of one token, or their ids")
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
