"""What can't be patched, refused before anything is touched."""

from __future__ import annotations

from torch import nn

from lxt.interfaces import SEEN_BY_THE_MODE, uses_interface

__all__ = ["attention_names", "refuse_missing_weights", "refuse_what_has_no_rule"]


def refuse_what_has_no_rule(model: nn.Module) -> None:
    """Check weights, kernels and the attention implementation.

    Raises:
        ValueError: names what was found and what to do about it.
    """
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


def attention_names(model: nn.Module) -> set[str | None]:
    """The attention implementations that the model and its sub-configurations ask for."""
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    return {getattr(config, "_attn_implementation", None) for config in configs}


def _is_offloaded(model: nn.Module, parameter: str) -> bool:
    owner = model.get_submodule(parameter.rpartition(".")[0])
    return any(hasattr(module, "_hf_hook") for module in (owner, model))
