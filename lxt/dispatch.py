"""Which implementation a rule runs: the Triton kernel for tensors on an NVIDIA GPU, its eager twin for all others.

LXT_KERNELS in the environment says how far kernels may go:
    off (default)   no kernels, until they have been run on a GPU
    exact           the forward stays the model's to the last bit: kernels run the backward, and of the forward what
                    can't change a bit
    fast            also forwards that add in another order than torch or take another exp: the logits then differ
                    from the unpatched model's by their rounding
Without triton, with one older than 3.6 (3.4 can't compile a kernel) or on a GPU older than Ampere, rules run eagerly. A
kernel that fails raises: a silent second try would hide it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from functools import partial
from importlib import import_module

import torch
from torch import Tensor

from lxt.coefficients import COEFFICIENTS, Coefficient

__all__ = ["form", "kernel"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # float64 would lose digits: kernels add in float32
CAPABILITY = (8, 0)  # Ampere: the oldest with bfloat16, and that tests compile for
TRITON = (3, 6)
INEXACT_FORWARDS = ("add_layer_norm", "add_rms_norm", "gated_product", "rms_norm")
_NAMES = {coefficient: name for name, coefficient in COEFFICIENTS.items()}


def kernel(name: str, *tensors: Tensor | None) -> Callable | None:
    """The kernel with the name and signature of a rule, None where the rule runs eagerly.

    Args:
        name: of a function in lxt.rules that has a kernel.
        tensors: what the kernel would read, the first of them not None.

    Raises:
        ValueError: LXT_KERNELS has another value than the three.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    if not given[0].is_cuda or (mode := _mode()) == "off" or not _runs_kernels(given[0].device):
        return None
    if any(x.device != given[0].device or x.dtype not in DTYPES or not _is_plain(x) for x in given):
        return None
    function = getattr(import_module(f"lxt.triton_kernels.{name}"), name)
    return partial(function, exact=False) if mode == "fast" and name in INEXACT_FORWARDS else function


def form(coefficient: Coefficient | str) -> str | None:
    """The name of a coefficient f(x) / x that kernels have, None for others."""
    from lxt.triton_kernels.activations import FORMS

    name = coefficient if isinstance(coefficient, str) else _NAMES.get(coefficient)
    return name if name in FORMS else None


def _mode() -> str:
    mode = os.environ.get("LXT_KERNELS", "off")
    if mode not in ("exact", "fast", "off"):
        raise ValueError(f"LXT_KERNELS={mode!r} in the environment; allowed: exact, fast, off")
    return mode


@functools.cache
def _runs_kernels(device: torch.device) -> bool:
    if importlib.util.find_spec("triton") is None or torch.version.hip is not None:
        return False
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return version >= TRITON and torch.cuda.get_device_capability(device) >= CAPABILITY


def _is_plain(x: Tensor) -> bool:
    """Whether memory holds just its numbers; a quantised or distributed tensor is a subclass."""
    return type(x) in (Tensor, torch.nn.Parameter)
