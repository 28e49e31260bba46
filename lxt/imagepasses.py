"""One pass of a model that sees: pixels, and the embeddings of its text, forward once and backward once.

1. The pixel values are an input that requires grad. So is the output of the token embedding, which a hook exchanges.
2. Further hooks note the first convolution's output, whose grid is the patches, and the sequence that enters the
   language model, where projected image features stand among the tokens' embeddings.
3. One backward of the explained numbers gives the coefficients at all of these; relevance is value × coefficient.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from lxt.audit import audit
from lxt.coefficients import wide
from lxt.composites import Composite
from lxt.holds import Holds, make_constant
from lxt.inputs import Model, offender
from lxt.narrow import narrowed
from lxt.pixels import PIXELS
from lxt.targets import Goal, evaluate

__all__ = ["ImagePass", "ImageResult", "audited", "run"]

_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, eq=False)
class ImagePass:
    """What runs together.

    Attributes:
        inputs: the forward's keyword arguments.
        goals: one per row.
        places: [batch, K], the columns whose logits are explained.
        mask: [batch, token], True at tokens; None for classifiers.
    """

    inputs: Mapping[str, Any]
    goals: list[Goal]
    places: Tensor
    mask: Tensor | None


@dataclass(frozen=True, eq=False)
class ImageResult:
    """What one pass gave, on the CPU.

    Attributes:
        values: [batch], the explained numbers.
        logits: [batch, K, vocabulary].
        goals: one per row, with the predicted tokens filled in.
        pixels: relevance of each entry of the pixel inputs, by their names.
        patches: relevance at the first convolution's output, channels summed: [image, row, column]; None without one.
        tokens: [batch, token], relevance of the sequence that enters the language model; None for classifiers.
        relevance: that of everything that was given, in one row: what conserves, and what the auditor compares.
        prefix: none: encoder-decoders aren't among these.
    """

    values: Tensor
    logits: Tensor
    goals: list[Goal]
    pixels: dict[str, Tensor]
    patches: Tensor | None
    tokens: Tensor | None
    relevance: Tensor
    prefix: None = None


class _Seen:
    """What the hooks of one forward noted."""

    def __init__(self) -> None:
        self.embeds: Tensor | None = None
        self.sequence: Tensor | None = None
        self.stem: Tensor | None = None


def run(model: Model, batch: ImagePass, patch: Callable[[], AbstractContextManager[Any]]) -> ImageResult:
    """Explain the rows together, under the rules that `patch` brings.

    Raises:
        ValueError: numbers that aren't finite, or logits that don't depend on the pixels.
    """
    with torch.inference_mode(False), torch.enable_grad():
        inputs = _placed(batch.inputs, model)
        leaves = {name: inputs[name].requires_grad_() for name in PIXELS if name in inputs}
        head = None if batch.mask is None else model.get_output_embeddings()
        # constant on the bare model too: torch has another kernel where an attention bias requires grad
        constant = Holds().hold(model.parameters(), make_constant)
        seeing = watched(model, batch.mask is not None)
        with constant, seeing as seen, narrowed(head, batch.places) as finish, patch():
            logits = _usable(finish(_output(model(**inputs))), model)
            values, goals = evaluate(logits, batch.goals)
            parts = [*leaves.values(), *(x for x in (seen.embeds, seen.sequence, seen.stem) if x is not None)]
            gradients = torch.autograd.grad(values.sum(), parts, allow_unused=True)
    if all(gradient is None for gradient in gradients[: len(leaves)]):
        raise ValueError(
            f"the logits of {type(model).__name__} don't depend on its pixel values as far as autograd knows: it may "
            "read them as discrete codes, under no_grad, or not at all for these tokens"
        )
    found = {id(x): _product(x, gradient) for x, gradient in zip(parts, gradients, strict=True)}
    relevance = torch.cat([found[id(x)].flatten() for x in (*leaves.values(), seen.embeds) if x is not None])
    if not relevance.isfinite().all():
        raise ValueError(
            f"the relevance is not finite, though the logits of {type(model).__name__} are: the backward overflows in "
            f"{relevance.dtype}; load the model with dtype='bfloat16' or 'float32'"
        )
    tokens = seen.embeds if seen.sequence is None else seen.sequence
    return ImageResult(
        values=values.detach().cpu(),
        logits=logits.detach().to(wide(logits.dtype)).cpu(),
        goals=goals,
        pixels={name: found[id(x)] for name, x in leaves.items()},
        patches=None if seen.stem is None else found[id(seen.stem)].sum(1),
        tokens=None if tokens is None or batch.mask is None else found[id(tokens)].sum(-1) * batch.mask,
        relevance=relevance,
    )


def audited(model: Model, batch: ImagePass, rules: Composite) -> tuple[Tensor, tuple[str, ...]]:
    """What `ImageResult.relevance` is, by the auditor; and the operations unknown to it."""
    with torch.inference_mode(False), torch.enable_grad():
        inputs = _placed(batch.inputs, model)
        explained = [name for name in PIXELS if name in inputs]
        if batch.mask is not None:
            with torch.no_grad(), watched(model, True) as seen:
                model(**inputs)
            inputs["embeds"] = seen.embeds
            explained.append("embeds")

        with narrowed(None, batch.places) as finish:

            def target(output: Any) -> Tensor:
                return evaluate(finish(_output(output)), batch.goals)[0].sum()

            found = audit(_Opened(model), inputs, target, rules, wrt=explained)
    return torch.cat([found.relevance[name].flatten().cpu() for name in explained]), found.unknown


class _Opened(nn.Module):
    """The model with the embeddings of its tokens as an input, though it gets the ids as well."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, embeds: Tensor | None = None, **inputs: Any) -> Any:
        if embeds is None:
            return self.model(**inputs)
        with watched(self.model, True, embeds):
            return self.model(**inputs)


@contextmanager
def watched(model: Model, reads: bool, embeds: Tensor | None = None) -> Iterator[_Seen]:
    """Note what passes during the first forward inside.

    Args:
        model: the model.
        reads: whether it gets text, whose embeddings are exchanged for a tensor of their own.
        embeds: the tensor; by default a copy of the embedding's output, which requires grad where that is enabled.
    """
    seen, thread = _Seen(), threading.get_ident()

    def ours() -> bool:
        return threading.get_ident() == thread

    def on_embedding(module: nn.Module, args: Any, output: Any) -> Any:
        if not ours() or seen.embeds is not None or not isinstance(output, Tensor) or output.dim() != 3:
            return None
        seen.embeds = embeds if embeds is not None else output.detach().clone().requires_grad_(torch.is_grad_enabled())
        return seen.embeds.clone()  # which the model may write into

    def on_convolution(module: nn.Module, args: Any, output: Any) -> None:
        if ours() and seen.stem is None and isinstance(output, Tensor) and output.requires_grad:
            seen.stem = output

    def on_decoder(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given = kwargs.get("inputs_embeds")
        if ours() and seen.sequence is None and isinstance(given, Tensor) and seen.embeds is not None:
            seen.sequence = given if given.shape == seen.embeds.shape and given.requires_grad else None

    with ExitStack() as undo:
        for module in model.modules():
            if isinstance(module, _CONVOLUTIONS):
                undo.callback(module.register_forward_hook(on_convolution).remove)
        if reads:
            undo.callback(model.get_input_embeddings().register_forward_hook(on_embedding).remove)
            undo.callback(_decoder(model).register_forward_pre_hook(on_decoder, with_kwargs=True).remove)
        yield seen


def _decoder(model: Model) -> nn.Module:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    return decoder if isinstance(decoder, nn.Module) and decoder is not model else model.base_model


def _output(output: Any) -> Tensor:
    return output.logits if hasattr(output, "logits") else output[0]


def _usable(logits: Tensor, model: Model) -> Tensor:
    if not logits.requires_grad:
        raise ValueError(
            f"the logits of {type(model).__name__} don't depend on its inputs as far as autograd knows: a forward or a "
            "hook runs under no_grad, or detaches"
        )
    if not logits.isfinite().all():
        raise ValueError(f"the logits of {type(model).__name__} are not finite: {offender(model)}")
    return logits


def _placed(inputs: Mapping[str, Any], model: Model) -> dict[str, Any]:
    """The inputs where the model is, pixels as copies in its dtype."""
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    placed = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in inputs.items()}
    for name in set(PIXELS) & set(placed):
        placed[name] = placed[name].detach().to(dtype, copy=True)
    cached = "use_cache" in signature(type(model).forward).parameters
    return placed | ({"use_cache": False} if cached else {})


def _product(x: Tensor, gradient: Tensor | None) -> Tensor:
    dtype = wide(x.dtype)
    x = x.detach().to(dtype)
    return (torch.zeros_like(x) if gradient is None else x * gradient.to(dtype)).cpu()
