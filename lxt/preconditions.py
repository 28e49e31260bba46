"""What can't be patched, refused before anything is touched."""

from __future__ import annotations

from torch import nn

__all__ = ["refuse_what_has_no_rule"]

SUPPORTED_ATTENTION = ("eager", "sdpa")


def refuse_what_has_no_rule(model: nn.Module) -> None:
    """Check weights, kernels and the attention implementation.

    Raises:
        ValueError: names what was found and what to do about it.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta and not _is_offloaded(model, name):
            raise ValueError(
                f"parameter {name!r} is on the meta device: the model has no weights; load it with from_pretrained, "
                "or dispatch it with accelerate"
            )
    if getattr(model, "use_kernels", False) or getattr(model, "_use_kernels", False):
        raise ValueError(
            "the model runs hub kernels, which have no rules; load it with use_kernels=False (or call "
            "model.use_kernels = False) before patching"
        )
    config = getattr(model, "config", None)
    implementation = getattr(config, "_attn_implementation", None)
    for name in implementation.values() if isinstance(implementation, dict) else (implementation,):
        if name is not None and name not in SUPPORTED_ATTENTION:
            raise ValueError(
                f"attention implementation {name!r} has no rule; allowed: {', '.join(SUPPORTED_ATTENTION)}: call "
                'model.set_attn_implementation("sdpa") first'
            )


def _is_offloaded(model: nn.Module, parameter: str) -> bool:
    owner = model.get_submodule(parameter.rpartition(".")[0])
    return any(hasattr(module, "_hf_hook") for module in (owner, model))
