"""Fused forwards: one definition for each kind of module, used by the maps of all families that have it.

Each is a factory (module, composite) -> forward, or None where the module or the composite has no fused form; the
operator mode then takes the module as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from lxt.coefficients import COEFFICIENTS, Coefficient, clipped_gelu
from lxt.composites import Composite
from lxt.declarations import Declaration
from lxt.marks import mark
from lxt.mode import current_mode, plain_gradient, unwatched
from lxt.patchmap import ForwardFactory
from lxt.rules import NormStyle, gated_product, identity, rms_norm
from lxt.swapping import has_class_forward

__all__ = [
    "activation_fence",
    "bare",
    "coefficient_of",
    "fused_gate_up_mlp",
    "gated_mlp",
    "is_fusable",
    "is_watched",
    "rebound",
    "rms_norm_forward",
    "with_names",
]


def rms_norm_forward(style: NormStyle, eps: str = "variance_epsilon") -> ForwardFactory:
    """RMSNorm modules with a `weight` and their epsilon in the attribute `eps`."""

    def factory(module: nn.Module, composite: Composite) -> Callable | None:
        if composite.norm == "gradient":
            return plain(module, composite)

        def forward(self: Any, hidden_states: Tensor) -> Tensor:
            return unwatched(rms_norm, hidden_states, self.weight, getattr(self, eps), style)

        return forward

    return factory


def plain(module: nn.Module, composite: Composite) -> Callable:
    """The module's own forward with the plain gradient of everything in it."""

    def forward(self: Any, *args: object, **kwargs: object) -> object:
        with plain_gradient():
            return type(self).forward(self, *args, **kwargs)

    return forward


def gated_mlp(
    gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj", act: str = "act_fn"
) -> ForwardFactory:
    """down(act(gate(x)) * up(x)), by the names of the submodules."""

    def factory(module: nn.Module, composite: Composite) -> Callable | None:
        if coefficient_of(getattr(module, act)) is None or not is_fusable(composite):
            return None

        def forward(self: Any, x: Tensor) -> Tensor:
            coefficient = coefficient_of(getattr(self, act))
            if coefficient is None or is_watched(getattr(self, act)):
                return type(self).forward(self, x)
            activation = bare(getattr(self, act))
            stop_gate = composite.product == "stop_gate"
            operands = getattr(self, gate)(x), getattr(self, up)(x), activation, coefficient, stop_gate
            return getattr(self, down)(unwatched(gated_product, *operands))

        return forward

    return factory


def fused_gate_up_mlp(module: Any, composite: Composite) -> Callable | None:
    """down_proj(up * activation_fn(gate)) with gate and up the two halves of gate_up_proj (Phi-3)."""
    if coefficient_of(module.activation_fn) is None or not is_fusable(composite):
        return None

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        coefficient = coefficient_of(self.activation_fn)
        if coefficient is None or is_watched(self.activation_fn):
            return type(self).forward(self, hidden_states)
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        stop_gate = composite.product == "stop_gate"
        return self.down_proj(unwatched(gated_product, gate, up, bare(self.activation_fn), coefficient, stop_gate))

    return forward


def rebound(**replacements: Callable[[Any], Any]) -> ForwardFactory:
    """The module's own forward, where a few names of its modeling file mean something else: nobody else sees that.

    A torch.autograd.Function hides what it does, so its name is given to torch operations that do the same.

    Args:
        replacements: name -> (what it means there) -> what it means in this forward.
    """
    return lambda module, composite: with_names(type(module).forward, **replacements)


def with_names(function: Any, **replacements: Callable[[Any], Any]) -> Callable | None:
    """A copy of `function` for which names mean something else; None where it doesn't use them.

    Another version's code may not: it is left to the operator mode, which refuses what it can't see.
    """
    if not replacements.keys() <= set(function.__code__.co_names):
        return None
    names = function.__globals__ | {name: new(function.__globals__[name]) for name, new in replacements.items()}
    copied = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def activation_fence(module: nn.Module, composite: Composite) -> Callable | None:
    """An activation module under its rule as one operation, however it is written."""
    coefficient = coefficient_of(module)
    if coefficient is None:
        return None

    def forward(self: Any, input: Tensor) -> Tensor:
        if not input.requires_grad:
            return type(self).forward(self, input)
        mode = current_mode()
        if composite.activation != "gradient":
            y = unwatched(identity, input, bare(self), coefficient)
        elif mode is None or mode.suspended:
            y = type(self).forward(self, input)
        else:  # whatever it is written with, an autograd function of its own included
            y = mode.declared(Declaration("linear", type(self).__name__), bare(self), (input,), {})
        return mark(y, "gate")

    return forward


def is_watched(module: nn.Module) -> bool:
    """Whether the module has to be called, since a hook or a forward of somebody else's is on it."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks) or bool(_has_any_global_hook()) or not has_class_forward(module)


def is_fusable(composite: Composite) -> bool:
    return composite.activation == "identity" and composite.product in ("uniform", "stop_gate")


def bare(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The activation without hooks; rules call it with gradients off, where the mode stays out of it."""
    return MethodType(type(module).forward, module)


def coefficient_of(module: Any) -> Coefficient | None:
    """f(x) / x of a known activation module, None of others and of those that write into their input."""
    if not isinstance(module, nn.Module) or getattr(module, "inplace", False):
        return None
    if not type(module).forward.__module__.startswith(("torch.", "transformers.")):
        return None
    if isinstance(module, nn.GELU):
        return COEFFICIENTS["gelu_tanh" if module.approximate == "tanh" else "gelu"]
    name = type(module).__name__
    if name == "ClippedGELUActivation":
        clipped: Any = module
        low, high = float(clipped.min), float(clipped.max)
        return lambda x: clipped_gelu(x, low, high)
    return COEFFICIENTS.get(_BY_CLASS.get(name, ""))


# torch.nn's and transformers' activation classes whose coefficient is known.
_BY_CLASS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "AccurateGELUActivation": "gelu_tanh",
    "BloomGelu": "gelu_tanh",
    "QuickGELUActivation": "quick_gelu",
    "MishActivation": "mish",
    "Mish": "mish",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu_squared",
    "ReLU6": "relu6",
    "Tanh": "tanh",
    "Hardswish": "hardswish",
    "Softsign": "softsign",
}
