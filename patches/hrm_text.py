"""HRM-Text: cycles of two stacks, the inner of which transformers runs without gradients but for the last ones.

That saves memory in training. An explanation needs all of them: what a cycle without gradients hands on would count as
a constant, and take its share.
"""

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from lxt.composites import Composite
from lxt.patchmap import PatchMap

__all__ = ["HRM_TEXT"]


def _all_cycles(module: nn.Module, composite: Composite) -> Callable:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        whole = copy.copy(self)  # the same parts; what is set below is the copy's own
        whole.L_bp_cycles_padded = [self.config.L_cycles] * self.config.H_cycles
        return type(self).forward(whole, *args, **kwargs)

    return forward


HRM_TEXT = PatchMap(
    architectures=("hrm_text",), forwards={"HrmTextModel": _all_cycles}, layers=("HrmTextDecoderLayer",)
)
