"""What can't be patched, refused before anything is touched."""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch
from torch import nn

from lxt.attention import SEEN_BY_THE_MODE
from lxt.interfaces import uses_interface
from lxt.opnames import (
    BOUNDS,
    BY_RATIO,
    CLOSED_FORMS,
    DIVISIONS,
    MATRIX_PRODUCTS,
    POWERS,
    PRODUCTS,
    SOFTMAX,
    SUMS_OF_PRODUCT,
)

__all__ = ["attention_names", "refuse_missing_weights", "refuse_virtual_tokens", "refuse_what_has_no_rule"]

_OF_ACTIVATIONS = (
    (frozenset(CLOSED_FORMS) | BY_RATIO | MATRIX_PRODUCTS | SOFTMAX) - BOUNDS
    | {"gelu", "sigmoid", "softplus", "exp", "glu", "layer_norm", "rms_norm", "group_norm", "linear", "rsqrt"}
    | {"scaled_dot_product_attention"}
)  # fmt: skip
_OF_NUMBERS_TOO = PRODUCTS | DIVISIONS | SUMS_OF_PRODUCT | POWERS | {"square"}
_STEPS = frozenset("ceil floor round trunc sign sgn".split())  # what follows has no gradient


def refuse_what_has_no_rule(model: nn.Module) -> None:
    """Check the kind of model, weights, kernels and the attention implementation.

    Raises:
        ValueError: names what was found and what to do about it.
    """
    _refuse_what_the_mode_cannot_see(model)
    refuse_missing_weights(model)
    if getattr(model, "use_kernels", False) or getattr(model, "_use_kernels", False):
        raise ValueError(
            "the model runs hub kernels, which have no rules; load it with use_kernels=False (or call "
            "model.use_kernels = False) before patching"
        )
    for name in attention_names(model):
        known = name in SEEN_BY_THE_MODE or any(map(uses_interface, model.modules()))
        if not known or str(name).startswith("paged|"):
            raise ValueError(
                f"attention implementation {name!r} has no rule in {type(model).__name__}: call "
                'model.set_attn_implementation("sdpa") or ("eager") first'
            )


def _refuse_what_the_mode_cannot_see(model: nn.Module) -> None:
    for name, module in model.named_modules():
        at = f"{name!r}" if name else "the model"
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"{at} is TorchScript, which runs without Python, so that no rule can reach its operations; patch the "
                "module that torch.jit.trace or torch.jit.script was given"
            )
        if isinstance(module, nn.DataParallel):
            raise ValueError(
                f"{at} is a DataParallel, whose copies run in threads of their own, without the rules; patch its "
                ".module and run that, in batches or in a process for each device"
            )
    named = {cls: _scripted_function(cls) for cls in {type(module) for module in model.modules()}}
    for module in model.modules():
        held = next((key for key, value in module.__dict__.items() if _hides_a_rule(value)), None)
        function = held or named[type(module)]
        if function is not None:
            raise ValueError(
                f"{type(module).__name__} calls {function!r}, a function under torch.jit.script, which runs without "
                "Python, so that no rule can reach its operations; set the environment variable PYTORCH_JIT=0 before "
                "importing torch"
            )
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise ValueError(
                f"parameter {name!r} was made under torch.inference_mode(), so that no gradient can go through it; "
                "load the model outside of inference_mode"
            )


def _hides_a_rule(function: object) -> bool:
    """Whether it is TorchScript with an operation that has a rule: DeBERTa's, of positions, is fine."""
    return isinstance(function, torch.jit.ScriptFunction) and _has_rule_inside(function.inlined_graph, set())  # pyright: ignore[reportAttributeAccessIssue]


def _has_rule_inside(block: Any, constant: set[str]) -> bool:
    for node in block.nodes():
        name = node.kind().removeprefix("aten::").rstrip("_")
        active = [x.debugName() for x in node.inputs() if x.type().isSubtypeOf(torch._C.TensorType.get())]
        active = [value for value in active if value not in constant]
        factors = 1 if name in POWERS or name == "square" else 2
        if name in _OF_ACTIVATIONS or (name in _OF_NUMBERS_TOO and len(active) >= factors):
            return True
        if any(_has_rule_inside(inner, constant) for inner in node.blocks()):
            return True
        if name in _STEPS or (not active and node.kind().startswith("aten::")):
            constant.update(value.debugName() for value in node.outputs())
    return False


def _scripted_function(cls: type[nn.Module]) -> str | None:
    """A TorchScript function that a method of the class names, or that the functions it names do."""
    todo = [method for method in vars(cls).values() if isinstance(method, FunctionType)]
    seen = set(todo)
    while todo:
        function = todo.pop()
        for name in function.__code__.co_names:
            value = function.__globals__.get(name)
            if _hides_a_rule(value):
                return name
            if isinstance(value, FunctionType) and value.__module__ == cls.__module__ and value not in seen:
                seen.add(value)
                todo.append(value)
    return None


def refuse_missing_weights(model: nn.Module) -> None:
    """Check that the weights are there, or that accelerate brings them.

    Raises:
        ValueError: names the first that is on the meta device.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta and not _is_offloaded(model, name):
            raise ValueError(
                f"parameter {name!r} is on the meta device: the model has no weights; load it with from_pretrained, "
                "or dispatch it with accelerate"
            )


def refuse_virtual_tokens(model: nn.Module) -> None:
    """Check that the logits are those of the tokens that were given, one position each.

    Raises:
        ValueError: peft puts tokens of its own before them (prompt tuning, p-tuning).
    """
    config = getattr(model, "active_peft_config", None)
    kind = getattr(getattr(config, "peft_type", None), "value", "")
    if getattr(config, "is_prompt_learning", False) and kind not in ("PREFIX_TUNING", "ADAPTION_PROMPT"):
        raise ValueError(
            f"peft puts virtual tokens before the prompt ({kind}), so that positions and logits are not the prompt's; "
            "use lxt.monkey_patch(model) and a backward from model(inputs_embeds=...).logits of your own"
        )


def attention_names(model: nn.Module) -> set[str | None]:
    """The attention implementations that the model and its sub-configurations ask for."""
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    return {getattr(config, "_attn_implementation", None) for config in configs}


def _is_offloaded(model: nn.Module, parameter: str) -> bool:
    owner = model.get_submodule(parameter.rpartition(".")[0])
    return any(hasattr(module, "_hf_hook") for module in (owner, model))
