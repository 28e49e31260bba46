"""f(x) / x for each activation, inside kernels: the twins of lxt.coefficients, in float32.

The closed forms are the twins'. What differs is how they are computed, as Triton offers exp but neither erfc nor tanh:

 1. sigmoid(x) takes e = exp(-|x|), which can't overflow, and is 1 / (1 + e) or e / (1 + e): the far negative tail keeps
    its relative accuracy down to the smallest subnormal.
 2. Phi(x) = erfc(-x / sqrt 2) / 2, for GELU, is exp(-x^2 / 2) times a slowly falling function (Mills' ratio; Abramowitz
    and Stegun 26.2), taken as t p(t) with t = 1 / (1 + |x| / 4) and a polynomial p, fitted to scipy's erfcx over
    |x| <= 200 (relative error 2.3e-8). x^2 is split into an exact square and the rest: behind exp, the rounding of a
    square of 100 costs 50 times as much.
 3. tanh(x) / x divides (1 - e) / (1 + e), e = exp(-2 |x|), by |x|, but for |x| < 1/2, where the difference cancels, is
    a Taylor series in x^2 (error below 1e-8 there).
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["FORMS", "coefficient"]

FORMS = frozenset(
    {
        "gelu",
        "gelu_tanh",
        "hardswish",
        "mish",
        "quick_gelu",
        "relu",
        "relu6",
        "relu_squared",
        "silu",
        "softsign",
        "tanh",
    }
)


@triton.jit
def _least(x, bound):
    return tl.minimum(x, bound, propagate_nan=tl.PropagateNan.ALL)  # as torch's; Triton's own gives the bound for NaN


@triton.jit
def _most(x, bound):
    return tl.maximum(x, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def _phi(x):
    magnitude = _least(tl.abs(x), 200.0)  # exp is 0 long before, and the square stays finite
    t = 1.0 / (1.0 + 0.25 * magnitude)
    p = 0.0203707074
    p = p * t - 0.0834867967
    p = p * t + 0.100443038
    p = p * t - 0.0366144694
    p = p * t + 0.0666266051
    p = p * t + 0.0579207345
    p = p * t + 0.08182625
    p = p * t + 0.0934405533
    p = p * t + 0.099737831
    p = p * t + 0.0997355419
    high = tl.floor(magnitude * 16.0) * 0.0625  # 12 bits, so that its square is exact
    low = (magnitude - high) * (magnitude + high)
    tail = t * p * tl.exp(-0.5 * high * high) * tl.exp(-0.5 * low)
    return tl.where(x > 0, 1.0 - tail, tail)


@triton.jit
def _tanh_ratio(x):
    magnitude = tl.abs(x)
    e = tl.exp(-2.0 * magnitude)
    far = (1.0 - e) / ((1.0 + e) * _most(magnitude, 0.25))
    s = x * x
    near = 1.0 + s * (
        -1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835 + s * (-1382 / 155925 + s * (21844 / 6081075)))))
    )
    return tl.where(magnitude < 0.5, near, far)


@triton.jit
def _mish(x):
    e = tl.exp(-tl.abs(x))
    above = (1.0 + 2.0 * e) / (1.0 + 2.0 * e + 2.0 * e * e)
    below = e * (e + 2.0) / (e * e + 2.0 * e + 2.0)
    return tl.where(x > 0, above, below)


@triton.jit
def coefficient(x, FORM: tl.constexpr):
    """f(x) / x of float32 numbers, FORM one of FORMS."""
    if FORM == "silu":
        return _sigmoid(x)
    elif FORM == "gelu":
        return _phi(x)
    elif FORM == "gelu_tanh":
        return _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # sqrt(8 / pi)
    elif FORM == "quick_gelu":
        return _sigmoid(1.702 * x)
    elif FORM == "relu":
        return tl.where(x > 0, 1.0, 0.0)
    elif FORM == "relu_squared":
        return _most(x, 0.0)
    elif FORM == "tanh":
        return _tanh_ratio(x)
    elif FORM == "mish":
        return _mish(x)
    elif FORM == "hardswish":
        return _least(_most(x / 6.0 + 0.5, 0.0), 1.0)
    elif FORM == "softsign":
        return 1.0 / (1.0 + tl.abs(x))
    else:
        tl.static_assert(FORM == "relu6", "no coefficient of that name")
        return tl.where(x <= 0, 0.0, _least(x, 6.0) / tl.where(x <= 0, 1.0, x))
