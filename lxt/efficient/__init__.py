"""Upstream's import paths: programs written for lxt 2.1 run as they are.

New programs call `lxt.monkey_patch`, which also takes a model instance and returns a handle.
"""

from __future__ import annotations

from types import ModuleType
from typing import NoReturn

from torch import nn

from lxt import patching
from lxt.efficient.models import vit_torch
from lxt.patching import PatchHandle
from lxt.patchmap import PatchMap

__all__ = ["monkey_patch", "monkey_patch_zennit"]


def monkey_patch(
    module: nn.Module | ModuleType, patch_map: PatchMap | None = None, verbose: bool = False
) -> PatchHandle:
    """`lxt.monkey_patch` with upstream's arguments in upstream's order.

    Args:
        module: a transformers modeling module, or torchvision's `vision_transformer`, before or after its models are
            made; or a model.
        patch_map: `attnLRP` or `cp_LRP` of a module of `lxt.efficient.models`. As in lxt 2.1 the default is AttnLRP,
            but `vit_torch.cp_LRP` for `vision_transformer`.
        verbose: print what is patched.

    Raises:
        TypeError: `patch_map` is not a PatchMap, as upstream's dictionaries of functions.
    """
    if patch_map is None and getattr(module, "__name__", "") == vit_torch.MODULE:
        patch_map = vit_torch.cp_LRP
    return patching.monkey_patch(module, patch_map=patch_map, verbose=verbose)


def monkey_patch_zennit(verbose: bool = False) -> NoReturn:
    """Not needed any more, and always an error: the Gamma rule is built in.

    Raises:
        NotImplementedError: always, naming what to write instead.
    """
    raise NotImplementedError(
        "zennit is not patched: its rules are not needed here. The Gamma rule for linear and convolution layers is "
        "built in: lxt.monkey_patch(model, rules=lxt.Composite(linear=lxt.Gamma(0.25))). For lxt 2.1's vision "
        "transformer, with zennit's Gamma(0.25) on Conv2d and Gamma(0.05) on Linear, write "
        'rules=lxt.Composite(attention="value_only", linear=lxt.Gamma(0.05), convolution=lxt.Gamma(0.25))'
    )
