"""Where relevance ends: every activation of a forward that depends on no other.

1. Floating point arguments (pixels, sound) are sources.
2. So is what an embedding module returns and no other source has made: tokens, positions, token types. It is replaced
   by a tensor of the same value that requires grad.
3. So are parameters that stand for tokens (a class token, learned queries, registers): replaced likewise.

Only the sum over all sources is conserved, and zeroing positions or queries instead would leave some models dead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

__all__ = ["Explained", "has_embedding", "logits_of"]

# Parts of the names of parameters that stand for tokens or positions.
_TOKENS = (
    "cls_token class_token class_embedding dist_token distillation_token mask_token register_token query_tokens "
    "position_embedding pos_embed positional_embedding latents image_newline view_separator prefix_tokens "
    "temporal_embed"
).split()
_NOT_ADDED = ("rotary", "rope", "relative", "rel_pos", "rel_attn", "distance")


class Explained(nn.Module):
    """A model as a function of its sources: takes them by name, returns the model's logits.

    Args:
        model: not patched.
        arguments: of its forward.
        parameters: further names of parameters that are sources, or the last parts of their names; those of modules
            whose output is one, where what comes before is cut off from the gradient.
    """

    def __init__(self, model: nn.Module, arguments: Mapping[str, Any], parameters: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.model = model
        self.arguments = dict(arguments)
        self.embeddings = {
            path: module
            for path, module in model.named_modules()
            if _is_embedding(path, module) or _is_named(path, parameters)
        }
        self.tokens = [
            name
            for name, parameter in model.named_parameters()
            if _stands_for_tokens(model, name, parameters) and parameter.is_floating_point()
        ]

    def sources(self) -> dict[str, Tensor]:
        """The value of every source, by name; found by one forward."""
        found = dict(_floats(self.arguments))
        found |= {name: self.model.get_parameter(name) for name in self.tokens}
        found = {name: value.detach().clone() for name, value in found.items()}

        def note(name: str, output: Tensor) -> Tensor:
            found[name] = output.detach().clone()
            return found[name].clone().requires_grad_().clone()

        with torch.enable_grad():
            self._run({name: value.clone().requires_grad_().clone() for name, value in found.items()}, note)
        return found

    def forward(self, **sources: Tensor) -> Tensor:
        """The logits, [batch, …]."""
        # copies, since some models write into their embeddings
        sources = {name: value.clone() for name, value in sources.items()}
        return logits_of(self._run(sources, lambda name, output: sources.get(name, output)))

    def _run(self, sources: Mapping[str, Tensor], embed: Callable[[str, Tensor], Tensor]) -> Any:
        calls: Counter[str] = Counter()

        def hook(path: str, module: nn.Module, args: Any, output: Any) -> Any:
            if isinstance(output, tuple) and output:  # a quantised embedding's scale comes with it
                embedded = hook(path, module, args, output[0])
                return None if embedded is None else (embedded, *output[1:])
            if not _is_float(output):
                return None
            calls[path] += 1  # of all calls, since rules make constants of what depends on a source
            if output.requires_grad:
                return None
            return embed(f"{path}#{calls[path]}", output)

        arguments = _with(self.arguments, sources)
        with ExitStack() as undo:
            for path, module in self.embeddings.items():
                undo.callback(module.register_forward_hook(partial(hook, path)).remove)
            for name in self.tokens:
                if name in sources:
                    undo.enter_context(_replaced(self.model, name, sources[name]))
            return self.model(**arguments)


def _floats(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The floating point tensors in nested mappings and tuples, by their path: `states.full.0`."""
    if _is_float(value):
        yield path, value
    elif isinstance(value, (Mapping, tuple)):
        for name, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _floats(item, f"{path}.{name}" if path else str(name))


def _with(value: Any, tensors: Mapping[str, Tensor], path: str = "") -> Any:
    """The same nested value with tensors replaced by path."""
    if isinstance(value, Mapping):
        return {name: _with(item, tensors, f"{path}.{name}" if path else str(name)) for name, item in value.items()}
    if type(value) is tuple:
        return tuple(_with(item, tensors, f"{path}.{index}") for index, item in enumerate(value))
    return tensors.get(path, value)


def has_embedding(module: nn.Module) -> bool:
    """Whether an embedding that is a source lies inside."""
    return any(_is_embedding(path, inner) for path, inner in module.named_modules())


def _is_embedding(path: str, module: nn.Module) -> bool:
    """Whether the module gives tokens or positions that are added to the stream, not to attention's scores."""
    name = f"{path.rpartition('.')[2]} {type(module).__name__}".lower()
    added = not any(word in name for word in _NOT_ADDED)
    return added and (isinstance(module, nn.Embedding) or "embed" in name)


def _is_named(name: str, wanted: tuple[str, ...]) -> bool:
    return any(name == last or name.endswith(f".{last}") for last in wanted)


def _stands_for_tokens(model: nn.Module, name: str, more: tuple[str, ...]) -> bool:
    owner, last = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    if _is_named(name, more):
        return True
    if isinstance(owner, (nn.Embedding, nn.Linear, nn.modules.conv._ConvNd)) or last in ("weight", "bias"):
        return False
    return any(token in last for token in _TOKENS) and not any(word in last for word in _NOT_ADDED)


@contextmanager
def _replaced(model: nn.Module, name: str, value: Tensor) -> Iterator[None]:
    """Meanwhile the parameter is a plain tensor."""
    path, _, last = name.rpartition(".")
    owner = model.get_submodule(path)
    parameter = owner._parameters.pop(last)
    owner.__dict__[last] = value
    try:
        yield
    finally:
        del owner.__dict__[last]
        owner._parameters[last] = parameter


def _is_float(value: Any) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.is_floating_point()


def logits_of(output: Any) -> Tensor:
    """What the model says: its logits, or else its first floating point output."""
    if isinstance(output, Tensor):
        return output
    named: dict[Any, Any] = dict(output) if hasattr(output, "keys") else dict(enumerate(output))
    for name in ("logits", "start_logits", "prediction_logits"):
        if _is_float(named.get(name)):
            return named[name]
    return next(value for name, value in named.items() if _is_float(value) and name != "loss")
