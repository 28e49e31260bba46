"""Upstream's patch maps, one module per family, each with `attnLRP` and `cp_LRP`.

They exist for programs written for lxt 2.1; architectures without a module here work too, with `lxt.monkey_patch`.
"""

from __future__ import annotations

from types import ModuleType

from lxt.efficient.models import bert, gemma3, gpt2, llama, qwen2, qwen3, qwen3_moe, vit_torch
from lxt.patchmap import PatchMap

__all__ = ["bert", "gemma3", "get_default_map", "gpt2", "llama", "qwen2", "qwen3", "qwen3_moe", "vit_torch"]

_FAMILIES = (bert, gemma3, gpt2, llama, qwen2, qwen3, qwen3_moe)


def get_default_map(module: ModuleType) -> PatchMap:
    """Upstream's choice for a modeling module: AttnLRP, but for torchvision's `vision_transformer` `vit_torch.cp_LRP`.

    Raises:
        ValueError: upstream has no map for it.
    """
    if getattr(module, "__name__", "") == vit_torch.MODULE:
        return vit_torch.cp_LRP
    family = getattr(module, "__name__", "").rpartition(".modeling_")[2]
    maps = {each.__name__.rpartition(".")[2]: each.attnLRP for each in _FAMILIES}
    if family not in maps:
        raise ValueError(
            f"no patch map of upstream's for {getattr(module, '__name__', module)!r}; there are maps for "
            f"{', '.join(maps)}, vision_transformer. lxt.monkey_patch needs none: leave patch_map out"
        )
    return maps[family]
