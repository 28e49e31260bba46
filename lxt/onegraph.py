"""A patched model's forward as one call in the graph that torch.compile makes.

1. Dynamo, which can't follow the rules, writes the patched forward into its graph as one call, whose operands are the
   arguments and the model's parameters and buffers.
2. AOT autograd runs that call on tensors without numbers, in Python and as ever: the same rules, the same search for
   what they can't see. It records the operations of this forward and of its backward, which the backend compiles. A
   backend without AOT autograd gets the call itself and runs it eagerly.
3. Dynamo traces the model's own forward too, without gradients and on copies: its guards then say when the graph is
   out of date, and its output how the call's tensors were put together. Its operations serve nothing and are dropped.

What can't go this way runs eagerly; under `fullgraph=True` torch raises with the reason. This module is imported while
dynamo traces, and not before: it loads the compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.callback import callback_handler
from torch._dynamo.exc import Unsupported
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._functorch import config as functorch_config
from torch._guards import CompileContext

from lxt.compiling import PATCHES, call, call_eagerly, hooks_of
from lxt.declarations import declared_operations
from lxt.mode import RuleMode

__all__ = ["forward_in_graph", "plain_in_graph"]

_TENSORS = (Tensor, nn.Parameter, nn.Buffer)
_CONSTANTS = (bool, int, float, str)
_GROWING = ("DynamicLayer", "DynamicSlidingWindowLayer")  # a cache's layers whose tensors are keys and values

# Each has a function of its own, since the reason that torch shows under fullgraph=True belongs to the function.
_EAGERLY: dict[str, Callable[..., Any]] = {
    why: torch.compiler.disable(
        call, reason=f"lxt's rules run eagerly here, since {why}: compile without fullgraph=True"
    )
    for why in (
        "a part of the model is in training mode (model.eval())",
        "gradient checkpointing is on",
        "a module has hooks",
        "modules were replaced since the model was patched",
        "operations are declared with lxt.declare",
        "an argument is neither a tensor nor a number, or a container of them",
        "the model's own forward doesn't go into one graph, or writes to its arguments",
        "accelerate has its hooks on the model",
        "the attention implementation is no operation of torch",
        "weights are quantised, or of another tensor class",
        "an account of the operations is kept",
        "the model is exported",
        "a TorchFunctionMode of somebody else's is entered",
    )
}


def forward_in_graph(
    patch: Any, number: str, module: nn.Module, own: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """What dynamo traces in place of the outermost patched forward.

    Args:
        patch: of the model.
        number: of the forward among the patch's, by which the graph finds it again.
        module: whose forward it is.
        own: the forward without the rules.
        args: of the forward.
        kwargs: of the forward.
    """
    if not torch.compiler.is_dynamo_compiling():  # dynamo gave this function up
        return call_eagerly(patch.run, module, own, args, kwargs)
    why = patch.why_eager or _why(patch.name, number) or _why_arguments((args, kwargs)) or _why_state(patch, module)
    if why is not None:
        return _EAGERLY[why](patch.run, module, own, args, kwargs)
    _keep_what_is_saved()
    frame = _frame()
    found = _call(patch.name, number, _state(module), args, kwargs)
    patch.traces_own = True
    try:
        with torch.no_grad():
            output = own(module, *_copies(args), **_copies(kwargs))
    finally:
        patch.traces_own = False
    _make_constant()
    places = _tensors(output)
    if frame != _frame() or [x.shape for x in places] != [x.shape for x in found]:
        # dynamo went on in another graph, and the first one's guards don't know what stands in the second
        why = "the model's own forward doesn't go into one graph, or writes to its arguments"
        return _EAGERLY[why](_for_good, patch, why, module, own, args, kwargs)
    return _with(output, list(found))


def plain_in_graph(patch: Any, module: nn.Module, own: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The same under `torch.no_grad()`, where the rules only keep the model still."""
    if any(part.training for part in module.modules()):
        return _EAGERLY["a part of the model is in training mode (model.eval())"](patch.run, module, own, args, kwargs)
    return own(module, *args, **kwargs)


def _for_good(
    patch: Any, why: str, module: nn.Module, own: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Eagerly now, and from the start in the next call: a guard of the graph reads `why_eager`."""
    patch.why_eager = why
    return patch.run(module, own, args, kwargs)


def _why_state(patch: Any, module: nn.Module) -> str | None:
    """What guards must read anew in each call."""
    for hooks in patch.hooks:  # not by way of the modules: dynamo leaves out guards on theirs
        if len(hooks):
            return "a module has hooks"
    if declared_operations():
        return "operations are declared with lxt.declare"
    for part in module.modules():
        if part.training:
            return "a part of the model is in training mode (model.eval())"
        if getattr(part, "gradient_checkpointing", False):
            return "gradient checkpointing is on"
    return None


def _why_arguments(value: Any) -> str | None:
    if isinstance(value, (tuple, list)):
        inside = value
    elif isinstance(value, dict):
        inside = value.values()
    else:
        known = value is None or isinstance(value, (Tensor, *_CONSTANTS))
        return None if known else "an argument is neither a tensor nor a number, or a container of them"
    for item in inside:
        why = _why_arguments(item)
        if why is not None:
            return why
    return None


@torch.compiler.assume_constant_result
def _why(name: str, number: str) -> str | None:
    """What can't change without a new forward or another class of tensor, both of which guards see."""
    patch = PATCHES[name]
    module, _ = patch.entries[int(number)]
    parts = list(module().modules())
    tracer = InstructionTranslator.current_tx()
    if tracer.symbolic_torch_function_state.mode_stack:
        return "a TorchFunctionMode of somebody else's is entered"
    if tracer.export or torch.compiler.is_exporting():
        return "the model is exported"
    if patch._mode.func is not RuleMode:
        return "an account of the operations is kept"
    if patch._rewire:
        return "the attention implementation is no operation of torch"
    if any("_hf_hook" in part.__dict__ for part in parts):
        return "accelerate has its hooks on the model"
    if {id(hooks) for hooks in hooks_of(parts)} - {id(hooks) for hooks in patch.hooks}:
        return "modules were replaced since the model was patched"
    if any(type(tensor) not in _TENSORS for tensor in _state(module())):
        return "weights are quantised, or of another tensor class"
    return None


@torch.compiler.assume_constant_result
def _frame() -> str:
    """Names the graph that is being traced: another one after a graph break."""
    return str(CompileContext.current_compile_id())


@torch.compiler.assume_constant_result
def _keep_what_is_saved() -> None:
    """Have this compilation make a backward that may run again.

    Inductor's backward writes into what it has saved unless its first run is under retain_graph=True. Its cache on the
    disk doesn't tell the two apart (torch 2.13), and the one for a single run then gives wrong gradients, silently.
    """
    if not functorch_config.donated_buffer:
        return
    functorch_config.donated_buffer = False

    def restore(_: object) -> None:
        functorch_config.donated_buffer = True
        callback_handler.end_callbacks = [other for other in callback_handler.end_callbacks if other is not restore]

    callback_handler.register_end_callback(restore)


@torch.compiler.assume_constant_result
def _make_constant() -> None:
    """Have guards on the values of numbers that dynamo took for variables, which the call in the graph has read."""
    if CompileContext.current_compile_id() is None:
        return  # a graph break was here, and what follows runs eagerly
    for number in InstructionTranslator.current_tx().output.unspec_variable_map.values():
        value = getattr(number, "sym_num", None)
        if isinstance(value, torch.SymFloat):
            float(value)
        elif isinstance(value, torch.SymInt):
            int(value)


def _state(module: nn.Module) -> tuple[Tensor, ...]:
    state = []
    for part in module.modules():
        for tensor in part._parameters.values():
            if tensor is not None:
                state.append(tensor)
        for tensor in part._buffers.values():
            if tensor is not None:
                state.append(tensor)
    return tuple(state)


def _copies(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, (tuple, list)):
        return type(value)([_copies(item) for item in value])
    if isinstance(value, dict):
        return {key: _copies(item) for key, item in value.items()}
    return value


def _tensors(output: Any) -> list[Tensor]:
    """The tensors in a model's output, in order.

    Raises:
        TypeError: there is something in it that may hold others.
    """
    if isinstance(output, Tensor):
        return [output]
    found = []
    if isinstance(output, dict):
        for item in output.values():
            found += _tensors(item)
    elif type(output) in (tuple, list):
        for item in output:
            found += _tensors(item)
    elif type(output).__name__ == "EncoderDecoderCache":
        found += _tensors(output.self_attention_cache) + _tensors(output.cross_attention_cache)
    elif type(output).__name__ == "DynamicCache":
        for layer in output.layers:
            if type(layer).__name__ not in _GROWING:
                raise TypeError(f"the model returns a cache with a {type(layer).__name__}")
            found += [layer.keys, layer.values]
    elif output is not None and not isinstance(output, _CONSTANTS):
        raise TypeError(f"the model returns a {type(output).__name__}")
    return found


def _with(output: Any, tensors: list[Tensor]) -> Any:
    """`output` with `tensors` in the places of its own."""
    if isinstance(output, Tensor):
        return tensors.pop(0)
    if isinstance(output, dict):
        for key in list(output.keys()):
            output[key] = _with(output[key], tensors)
    elif isinstance(output, (tuple, list)):
        return type(output)([_with(item, tensors) for item in output])
    elif hasattr(output, "self_attention_cache"):
        _with(output.self_attention_cache, tensors)
        _with(output.cross_attention_cache, tensors)
    elif hasattr(output, "layers"):
        for layer in output.layers:
            layer.keys, layer.values = tensors.pop(0), tensors.pop(0)
    return output


@torch.compiler.allow_in_graph
def _call(
    name: str, number: str, state: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, ...]:
    """The call in the graph: the patched forward with `state` as the module's parameters and buffers."""
    patch = PATCHES[name]
    reference, own = patch.entries[int(number)]
    module = reference()
    if all(given is held for given, held in zip(state, _state(module), strict=True)):
        return tuple(_tensors(call_eagerly(patch.run, module, own, args, kwargs)))  # no compiler runs it
    try:
        with _in_place(module, state):
            return tuple(_tensors(patch.run(module, own, _numbers(args), _numbers(kwargs))))
    except Exception as error:  # an eager run raises what is the model's fault, and works where it is the compiler's
        raise Unsupported(
            "lxt's rules run eagerly here, since the patched forward can't be traced: compile without "
            f"fullgraph=True\n{type(error).__name__}: {error}"
        ) from error


def _numbers(value: Any) -> Any:
    """`value` with numbers for those that dynamo took for variables; models ask whether they are int."""
    if isinstance(value, (tuple, list)):
        return type(value)([_numbers(item) for item in value])
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, torch.SymInt):
        return int(value)
    return float(value) if isinstance(value, torch.SymFloat) else value


@contextmanager
def _in_place(module: nn.Module, state: Sequence[Tensor]) -> Iterator[None]:
    """Meanwhile the module has other parameters and buffers: constants, as the rules want them.

    Raises:
        RuntimeError: the forward left something on a module, which would be a tensor without numbers.
    """
    parts = list(module.modules())
    before = [(part.__dict__, dict(part.__dict__)) for part in parts]
    before += [(own, dict(own)) for part in parts for own in (part._parameters, part._buffers, part._modules)]
    own: dict[str, Any]
    rest = iter(state)
    for part in parts:
        for own in (part._parameters, part._buffers):
            own.update({name: next(rest).detach() for name, tensor in own.items() if tensor is not None})
    inside = [dict(own) for own, _ in before]
    try:
        yield
        left = [
            name
            for (own, _), was in zip(before, inside, strict=True)
            for name in own.keys() | was.keys()
            if own.get(name) is not was.get(name)
        ]
    finally:
        for own, was in before:
            if own.keys() != was.keys():
                own.clear()
            own.update(was)
    if left:
        raise RuntimeError(f"the forward writes to {', '.join(sorted(left))} of its modules")
