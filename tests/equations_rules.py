"""The reference that the library is judged by: LRP as the papers write it, slowly, in float64, without autograd.

Relevances R are propagated, not coefficients c = R / x, so an error in the library's gradient x input form cannot
be shared by this file. Each rule is a function of its operation's inputs, its outputs and the outputs' relevance:

    linear, epsilon rule    R_j  = sum_i x_j w_ij / (z_i + eps sign z_i) R_i     Bach et al. 2015, eq. 58
    linear, gamma rule      same-signed contributions weigh 1 + gamma            Montavon et al. 2019
    element-wise f, norms   R_x  = R_y                                           AttnLRP (2402.05602), eq. 9, Prop. 3.4
    product of activations  R_a  = R_b = R / 2                                   eq. 7
    O = A V                 R_ji = sum_p A_ji V_ip / (2 O_jp) R_jp, same for V   eq. 13, 14
    s = softmax(x)          R_i  = x_i (R_i - s_i sum_j R_j)                     Prop. 3.1

A division by zero output is 0 where its relevance is 0 too, which is the limit eps -> 0, and an error elsewhere.
What R-form cannot say: where x = 0, R = 0 whatever the coefficient is, so coefficients can only be compared at x != 0;
and an attention score of exactly 0 passes nothing to its query and key, though their coefficients need not be 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy import ndarray

from lxt.composites import Composite

PI = np.longdouble("3.14159265358979323846")  # math.pi would cost the tanh form of GELU two digits in its tail


def _wide(x: Any) -> ndarray:
    # The 64 bits of x86's long double keep exp of a rounded argument exact to 1e-16; where the platform has no wider
    # type the far tails lose two digits.
    return np.asarray(x, dtype=np.float64).astype(np.longdouble)


def _sigmoid(x: ndarray) -> ndarray:
    decay = np.exp(-abs(x))
    return np.where(x >= 0, 1, decay) / (1 + decay)


def coefficient_silu(x: Any) -> ndarray:
    """sigmoid(x)."""
    return _sigmoid(_wide(x)).astype(np.float64)


def coefficient_gelu(x: Any) -> ndarray:
    """Phi(x) = erfc(-x / sqrt 2) / 2, with the rounding of the argument corrected to first order."""
    exact = -_wide(x) / np.sqrt(np.longdouble(2))
    rounded = exact.astype(np.float64)
    slope = -2 / np.sqrt(PI) * np.exp(-(rounded.astype(np.longdouble) ** 2))
    erfc = np.vectorize(math.erfc, otypes=[np.float64])(rounded)
    return ((erfc + (exact - rounded) * slope) / 2).astype(np.float64)


def coefficient_gelu_tanh(x: Any) -> ndarray:
    """(1 + tanh u) / 2 = sigmoid(2u), u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    x = _wide(x)
    with np.errstate(over="ignore"):
        return _sigmoid(2 * np.sqrt(2 / PI) * (x + np.longdouble("0.044715") * x**3)).astype(np.float64)


def coefficient_quick_gelu(x: Any) -> ndarray:
    """sigmoid(1.702 x)."""
    return _sigmoid(np.longdouble("1.702") * _wide(x)).astype(np.float64)


def coefficient_relu(x: Any) -> ndarray:
    """1 where x > 0; at 0 the subgradient 0, as torch has it."""
    return (np.asarray(x, dtype=np.float64) > 0).astype(np.float64)


def coefficient_relu2(x: Any) -> ndarray:
    """relu(x)^2 / x = relu(x)."""
    return np.maximum(np.asarray(x, dtype=np.float64), 0.0)


def coefficient_tanh(x: Any) -> ndarray:
    """tanh(x) / x, which is 1 at 0; every other float64 is a normal long double, so the division is exact enough."""
    x = _wide(x)
    return np.where(x == 0, 1, np.tanh(x) / np.where(x == 0, 1, x)).astype(np.float64)


def coefficient_mish(x: Any) -> ndarray:
    """tanh(log(1 + e^x)) = ((1 + e^x)^2 - 1) / ((1 + e^x)^2 + 1), written with decaying exponentials only."""
    x = _wide(x)
    e = np.exp(-abs(x))
    positive, negative = (1 + 2 * e) / (1 + 2 * e + 2 * e**2), e * (e + 2) / (e * (e + 2) + 2)
    return np.where(x >= 0, positive, negative).astype(np.float64)


COEFFICIENTS: Mapping[str, Callable[[Any], ndarray]] = {
    "silu": coefficient_silu,
    "gelu": coefficient_gelu,
    "gelu_tanh": coefficient_gelu_tanh,
    "quick_gelu": coefficient_quick_gelu,
    "relu": coefficient_relu,
    "relu2": coefficient_relu2,
    "tanh": coefficient_tanh,
    "mish": coefficient_mish,
}
"""name -> f(x) / x in float64, relative error about 1e-15, f'(0) at 0; takes whatever numpy makes float64 of."""

_TRANSFORMERS_NAMES = {"swish": "silu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


def activation(name: str, x: ndarray) -> ndarray:
    """f(x) for a name in COEFFICIENTS or transformers' name of the same function."""
    name = _TRANSFORMERS_NAMES.get(name, name)
    if name not in COEFFICIENTS:
        allowed = ", ".join(sorted({*COEFFICIENTS, *_TRANSFORMERS_NAMES}))
        raise ValueError(f"no reference for the activation {name!r}; there are {allowed}: add its coefficient here")
    return x * COEFFICIENTS[name](x)


def ratio(relevance: ndarray, z: ndarray) -> ndarray:
    """relevance / z with 0 / 0 = 0.

    Raises:
        FloatingPointError: relevance at an output that is exactly 0, where the epsilon rule has no limit.
    """
    if np.any((z == 0) & (relevance != 0)):
        raise FloatingPointError("relevance arrived at an output that is exactly 0: R-form has no limit there")
    return np.divide(relevance, z, out=np.zeros(np.broadcast(relevance, z).shape), where=z != 0)


def linear_epsilon_rule(
    x: ndarray, weight: ndarray, z: ndarray, relevance: ndarray, *, epsilon: float = 0.0
) -> ndarray:
    """R_j = sum_i x_j w_ij / (z_i + eps sign z_i) R_i, for z = W x + b: the bias keeps its share of R.

    Args:
        weight: [..., out, in], broadcast against x: [..., in].
    """
    share = ratio(relevance, z + epsilon * np.sign(z))
    return x * (share[..., None, :] @ weight)[..., 0, :]


def linear_gamma_rule(
    x: ndarray, weight: ndarray, bias: ndarray | None, z: ndarray, relevance: ndarray, *, gamma: float
) -> ndarray:
    """Contributions x_j w_ij and b_i of the output's sign weigh 1 + gamma, the others 1; then as the epsilon rule.

    Equal to zennit's Gamma, which runs four modified layers: for z > 0 that is x+ (w + gamma w+) + x- (w + gamma w-)
    with b + gamma b+, for z < 0 the mirror image, and nothing where z = 0.
    """
    sign = np.sign(z)
    contribution = x[..., None, :] * weight
    contribution = contribution * np.where(contribution * sign[..., None] > 0, 1 + gamma, 1)
    constant = np.zeros_like(z) if bias is None else bias * np.where(bias * sign > 0, 1 + gamma, 1)
    total = contribution.sum(-1) + constant
    return (contribution * np.where(sign == 0, 0, ratio(relevance, np.where(sign == 0, 0, total)))[..., None]).sum(-2)


def add_rule(a: ndarray, b: ndarray, z: ndarray, relevance: ndarray) -> tuple[ndarray, ndarray]:
    """Epsilon rule of z = a + b: each term's share of the sum."""
    share = ratio(relevance, z)
    return a * share, b * share


def identity_rule(relevance: ndarray) -> ndarray:
    """An element-wise function, or a factor taken as constant such as 1 / sigma, passes its relevance on."""
    return relevance


def product_rule(relevance: ndarray, shares: tuple[float, float] = (0.5, 0.5)) -> tuple[ndarray, ndarray]:
    """z = a b element-wise: (1/2, 1/2) is uniform, (0, 1) takes a for a constant, (1, 1) is the gradient."""
    return shares[0] * relevance, shares[1] * relevance


def matmul_rule(
    a: ndarray, b: ndarray, z: ndarray, relevance: ndarray, shares: tuple[float, float] = (0.5, 0.5)
) -> tuple[ndarray, ndarray]:
    """z = a @ b: the epsilon rule over the sum, the product rule in each of its terms (eq. 13, 14)."""
    share = ratio(relevance, z)
    return (
        shares[0] * a * (share @ b.swapaxes(-1, -2)),
        shares[1] * b * (a.swapaxes(-1, -2) @ share),
    )


def softmax(x: ndarray) -> ndarray:
    """Over the last axis; -inf is a masked entry."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def softmax_rule(x: ndarray, s: ndarray, relevance: ndarray, *, temperature: float = 1.0) -> ndarray:
    """R_i = x_i (R_i - s_i sum_j R_j); masked entries, x = -inf, receive nothing.

    At another temperature the Jacobian p_i (delta_ij - p_j) is evaluated at p = softmax(x / temperature), without the
    chain rule's 1 / temperature (Edin et al. 2025, 2505.17630), hence R_i = x_i p_i (R_i / s_i - sum_j p_j R_j / s_j).
    """
    finite = np.where(np.isfinite(x), x, 0)
    if temperature == 1:
        return finite * (relevance - s * relevance.sum(-1, keepdims=True))
    p, coefficient = softmax(x / temperature), ratio(relevance, s)
    return finite * p * (coefficient - (p * coefficient).sum(-1, keepdims=True))


def layer_norm_rule(
    x: ndarray, weight: ndarray, bias: ndarray | None, normed: ndarray, y: ndarray, relevance: ndarray
) -> ndarray:
    """y = w n + b, n = d / sigma, d = x - mean x: epsilon rule of w n + b, identity at 1 / sigma, epsilon rule of d."""
    relevance_normed = relevance if bias is None else weight * normed * ratio(relevance, y)
    relevance_centred = identity_rule(relevance_normed)
    size = x.shape[-1]
    centring = np.eye(size) - 1 / size
    return linear_epsilon_rule(x, centring, x - x.mean(-1, keepdims=True), relevance_centred)


def embedding_rule(relevance: ndarray) -> ndarray:
    """A looked-up row is a linear map of a one-hot vector: the token takes the sum. [token, hidden] -> [token]."""
    return relevance.sum(-1)


def attention_shares(composite: Composite) -> tuple[tuple[float, float], tuple[float, float]]:
    """The shares of (softmax, value) in O = A V and of (query, key) in their product.

    The product rule splits twice, so query, key and value end with the factors a_q, a_k, a_v = 1/4, 1/4, 1/2. Other
    factors scale the branches: the softmax gets a_q + a_k, of which query and key take their proportions. It is the
    one reading in which each of the three ends scaled by its own factor, the softmax rule being linear in R.
    """
    if composite.attention == "value_only":
        return (0.0, 1.0), (0.0, 0.0)
    if composite.attention == "gradient":
        return (1.0, 1.0), (1.0, 1.0)
    query, key, value = composite.qkv
    both = query + key
    return (both, value), ((query / both, key / both) if both else (0.0, 0.0))


PRODUCT_SHARES = {"uniform": (0.5, 0.5), "stop_gate": (0.0, 1.0), "gradient": (1.0, 1.0)}
