"""Encoder-decoders, run on token ids with the outputs of their embedding modules as what is explained.

Both sides are inputs: the encoder reads the source, the decoder the prefix of what it writes, and relevance goes to
both. Embeddings are not passed to the forward: Marian, Pegasus and others scale them only where they look up ids, and
classifiers look for a token among the ids. The model runs on ids, its embedding modules run as ever, and hooks put the
explained tensors in the place of what they return.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lxt.inputs import Model, Prepared

__all__ = ["FromIds", "forward", "inputs_of", "replaced", "shifted", "with_prefix"]


class FromIds(nn.Module):
    """The model as a function of both sides' embeddings: what the auditor can run."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs_embeds: Tensor, decoder_inputs_embeds: Tensor, **arguments: Any) -> Any:
        """The model's output; `arguments` hold `input_ids`, or the source is given as embeddings."""
        by_ids = "input_ids" in arguments
        given = {} if by_ids else {"inputs_embeds": inputs_embeds}
        with replaced(self.model, inputs_embeds if by_ids else None, decoder_inputs_embeds):
            return self.model(**given, **arguments)


def forward(model: Model, prepared: Prepared) -> Any:
    """The model's output for a prepared batch, whichever kind of model it is."""
    called = model if prepared.decoder_embeds is None else FromIds(model)
    return called(**inputs_of(prepared), **prepared.arguments(model))


def inputs_of(prepared: Prepared) -> dict[str, Tensor]:
    """What is explained, by name: the source's embeddings, and the decoder's where there are some."""
    inputs = {"inputs_embeds": prepared.embeds}
    return inputs if prepared.decoder_embeds is None else inputs | {"decoder_inputs_embeds": prepared.decoder_embeds}


def _embedding(model: Model, side: str) -> nn.Module | None:
    getter = getattr(model, f"get_{side}", None)
    part = getter() if getter is not None else None
    if part is None or part is model:
        return None
    try:
        found = part.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        found = None
    return found if found is not None else getattr(part, "embed_tokens", None)


@contextmanager
def replaced(model: Model, source: Tensor | None, prefix: Tensor) -> Iterator[None]:
    """Meanwhile the first outputs of the embedding modules are these tensors; `source` None leaves the encoder's alone.

    Raises:
        ValueError: the model embeds its tokens elsewhere, so that nothing or something else would be explained.
    """
    sides = [(_embedding(model, "encoder"), source), (_embedding(model, "decoder"), prefix)]
    waiting: dict[nn.Module, list[Tensor]] = {}
    for module, given in sides:
        if given is not None and module is not None:
            waiting.setdefault(module, []).append(given)

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if not waiting[module]:
            return None  # more than once: padding that a windowed attention adds
        given = waiting[module].pop(0)
        if given.shape != output.shape:
            raise ValueError(
                f"{type(model).__name__} embeds tokens of shape {tuple(output.shape[:2])} where "
                f"{tuple(given.shape[:2])} are explained; use lxt.monkey_patch(model) and a backward of your own"
            )
        return given

    with ExitStack() as undo:
        for module in waiting:
            undo.callback(module.register_forward_hook(hook).remove)
        yield
        if any(waiting.values()):
            raise ValueError(
                f"{type(model).__name__} did not embed its tokens by the modules that it names as its embeddings; use "
                "lxt.monkey_patch(model) and a backward of your own"
            )


def with_prefix(prepared: Prepared, model: Model) -> Prepared:
    """The batch with the embeddings of the decoder's tokens, where the model has a decoder that is known.

    Raises:
        ValueError: a classifier whose decoder does not read the source shifted one place to the right.
    """
    if not getattr(model.config, "is_encoder_decoder", False):
        return prepared
    embedding = _embedding(model, "decoder")
    if embedding is None:
        return prepared
    ids = prepared.decoder_ids
    if ids is None:  # a classifier: its decoder reads the source
        if prepared.token_ids is None:
            raise ValueError(
                f"{type(model).__name__} can be explained from text or token ids only, not from embeddings"
            )
        ids = _decoder_ids(prepared, model, embedding)
    with torch.no_grad():
        embeds = embedding(ids)
    return replace(prepared, decoder_ids=ids, decoder_embeds=embeds.detach(), reads_source=prepared.decoder_ids is None)


def _decoder_ids(prepared: Prepared, model: Model, embedding: nn.Module) -> Tensor:
    """What the model makes its decoder read: caught on its way, since each architecture shifts by a code of its own."""
    assert prepared.token_ids is not None
    ids = prepared.token_ids.to(prepared.embeds.device)
    seen: list[Tensor] = []
    handle = embedding.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=prepared.attention_mask)
    finally:
        handle.remove()
    found = next((one for one in reversed(seen) if one.shape == ids.shape), None)
    if found is None or not torch.equal(found[:, 1:], ids[:, :-1]):
        raise ValueError(
            f"the decoder of {type(model).__name__} does not read the source shifted by one place, so its relevance "
            "can't be told by token; use lxt.monkey_patch(model) and a backward of your own"
        )
    return found


def shifted(relevance: Tensor) -> tuple[Tensor, Tensor]:
    """A shifted decoder's relevance, [batch, token], as that of the source's tokens, and of the start, [batch]."""
    return torch.cat([relevance[:, 1:], torch.zeros_like(relevance[:, :1])], dim=1), relevance[:, 0]
