"""Composites: which rule each kind of operation gets.

A composite is a plain frozen value. What the literature proposes as separate methods are different values of the
same few fields, so a new method is a new preset and not new code.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

__all__ = ["ATTN_LRP", "CP_LRP", "GRADIENT", "PRESETS", "Composite", "Epsilon", "Gamma", "resolve"]


@dataclass(frozen=True)
class Epsilon:
    """Epsilon rule for linear maps (Bach et al. 2015, eq. 58): a denominator z is replaced by z + epsilon * sign(z)."""

    epsilon: float = 0.0

    def __post_init__(self) -> None:
        if not self.epsilon >= 0:
            raise ValueError(f"Epsilon needs a number >= 0, got {self.epsilon!r}; 0 is the plain gradient")


@dataclass(frozen=True)
class Gamma:
    """Gamma rule for linear maps (Montavon et al. 2019): same-signed contributions weigh 1 + gamma."""

    gamma: float = 0.25

    def __post_init__(self) -> None:
        if not self.gamma > 0:
            raise ValueError(f"Gamma needs a number > 0, got {self.gamma!r}; use Epsilon() for the plain linear rule")


Activation = Literal["identity", "gradient"]
Norm = Literal["identity", "gradient"]
Product = Literal["uniform", "stop_gate", "gradient"]
Attention = Literal["uniform", "value_only", "gradient"]
Recurrence = Literal["value_only", "uniform", "gradient"]
Router = Literal["uniform", "half", "stop"]
_ALLOWED = {
    "activation": Activation,
    "norm": Norm,
    "product": Product,
    "attention": Attention,
    "recurrence": Recurrence,
    "router": Router,
}


@dataclass(frozen=True)
class Composite:
    """One rule per kind of operation.

    Attributes:
        activation: element-wise functions with f(0) = 0. `identity` passes relevance through unchanged
            (AttnLRP, arXiv 2402.05602, eq. 9), `gradient` differentiates.
        norm: LayerNorm, RMSNorm and kin. `identity` treats 1/sigma as a constant (same paper, Prop. 3.4).
        product: element-wise products of activations. `uniform` shares relevance equally between the factors
            (eq. 7), `stop_gate` treats the gate branch of a gated MLP as a constant (CP-LRP), `gradient`
            differentiates, which counts the relevance once for each factor.
        attention: `uniform` shares relevance between softmax and value and between query and key, and goes
            through the softmax (eq. 13, Prop. 3.1 and 3.3), `value_only` takes the softmax as a constant
            (CP-LRP, Ali et al. 2022), `gradient` differentiates.
        qkv: the factors on the gradients of query, key and value behind `uniform`.
        softmax_temperature: the temperature at which the backward of an attention softmax is taken; the forward
            is unchanged.
        router: mixture-of-experts routing weights in `weight * expert(x)`: `uniform`, also called `half`, gives a
            weight that comes from a softmax its half; `stop` takes it as a constant, as it is where it comes from a
            sigmoid, and as `attention="value_only"` does with every softmax.
        recurrence: state-space layers and linear attention. `value_only` takes all that steers the state, step sizes,
            decays, B and C, keys and queries, as constants (MambaLRP, arXiv 2406.07592); `uniform` shares relevance
            equally between the values and what reads the state, C or the queries; `gradient` stops nothing. It reaches
            recurrences that transformers computes in a function of their own (docs/recurrences.md lists them).
        linear: the rule of linear and convolution layers; `Epsilon(0)` is the plain gradient.
        convolution: the rule of convolutions, where it isn't that of linear layers.
        name: how the composite is called in results and messages.
    """

    activation: Activation = "identity"
    norm: Norm = "identity"
    product: Product = "uniform"
    attention: Attention = "uniform"
    qkv: tuple[float, float, float] = (0.25, 0.25, 0.5)
    softmax_temperature: float = 1.0
    router: Router = "uniform"
    recurrence: Recurrence = "value_only"
    linear: Epsilon | Gamma = Epsilon()
    convolution: Epsilon | Gamma | None = None
    name: str = "custom"

    def __post_init__(self) -> None:
        if self.router == "half":  # two names, one value: composites with either are equal
            object.__setattr__(self, "router", "uniform")
        for field, literal in _ALLOWED.items():
            value, allowed = getattr(self, field), get_args(literal)
            if value not in allowed:
                raise ValueError(f"Composite({field}={value!r}) is not a rule; allowed: {', '.join(allowed)}")
        if len(self.qkv) != 3 or not all(isinstance(f, (int, float)) and f >= 0 for f in self.qkv):
            raise ValueError(f"Composite(qkv={self.qkv!r}) must be three factors >= 0: for query, key and value")
        if not self.softmax_temperature > 0:
            raise ValueError(f"Composite(softmax_temperature={self.softmax_temperature!r}) must be > 0")
        if not isinstance(self.linear, (Epsilon, Gamma)):
            raise TypeError(f"Composite(linear={self.linear!r}) must be lxt.Epsilon(...) or lxt.Gamma(...)")
        if not isinstance(self.convolution, (Epsilon, Gamma, type(None))):
            raise TypeError(
                f"Composite(convolution={self.convolution!r}) must be lxt.Epsilon(...) or lxt.Gamma(...), or None, "
                "which means the rule of linear layers"
            )

    @property
    def conserves(self) -> bool:
        """Whether relevance sums to the target exactly when biases are zero."""
        return (
            self.activation == "identity"
            and self.norm == "identity"
            and self.product != "gradient"
            and self.attention == "value_only"
            and self.recurrence != "gradient"
            and all(not isinstance(rule, Epsilon) or rule == Epsilon() for rule in (self.linear, self.convolution))
        )

    def but(self, **changes: object) -> Composite:
        """A copy with some fields changed, named `<name>*` unless `name` is given.

        >>> ATTN_LRP.but(attention="value_only").attention
        'value_only'
        """
        unknown = set(changes) - {field.name for field in fields(self)}
        if unknown:
            allowed = ", ".join(field.name for field in fields(self))
            raise TypeError(f"Composite has no field {', '.join(sorted(unknown))}; it has {allowed}")
        return replace(self, **{"name": f"{self.name}*", **changes})  # type: ignore[arg-type]


ATTN_LRP = Composite(name="attnlrp")
CP_LRP = Composite(product="stop_gate", attention="value_only", router="stop", name="cp")
GRADIENT = Composite(
    activation="gradient",
    norm="gradient",
    product="gradient",
    attention="gradient",
    recurrence="gradient",
    name="gradient",
)
PRESETS = {composite.name: composite for composite in (ATTN_LRP, CP_LRP, GRADIENT)}


def resolve(rules: str | Composite) -> Composite:
    """The composite of that name, or the composite itself.

    Raises:
        ValueError: no preset has that name.
        TypeError: neither a name nor a Composite.
    """
    if isinstance(rules, Composite):
        return rules
    if not isinstance(rules, str):
        raise TypeError(f"rules must be a preset's name or an lxt.Composite, got {type(rules).__name__}")
    if rules not in PRESETS:
        raise ValueError(f"unknown rules {rules!r}; allowed: {', '.join(PRESETS)}, or an lxt.Composite of your own")
    return PRESETS[rules]
