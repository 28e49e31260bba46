"""One handler per kind of operation, and the table of all handlers for a composite.

A handler is called as handler(func, args, kwargs) in place of func(*args, **kwargs), with gradients on; marks are
those of lxt.marks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lxt import linear_rules, opnames, rules
from lxt.attention import scaled_dot_product_attention
from lxt.coefficients import ratio
from lxt.composites import Composite, Epsilon, Gamma
from lxt.marks import activations, copy_mark, is_activation, mark, mark_of
from lxt.shifted import constant_if_shifted, keep_shifted, shifted_is_constant

__all__ = ["Handler", "handlers", "without_dropout"]

Handler = Callable[[Callable, tuple[Any, ...], dict[str, Any]], Any]

SMALLEST_GATE_SCALAR = 1e-2  # a larger Python scalar added to an activation makes a gate; a smaller one is an epsilon


def _stop_all(value: Any) -> Any:
    """`value` with every activation in it made a constant."""
    if isinstance(value, Tensor):
        return rules.stop(value) if value.requires_grad else value
    if isinstance(value, (tuple, list)):
        return type(value)([_stop_all(item) for item in value])
    return {key: _stop_all(item) for key, item in value.items()} if isinstance(value, dict) else value


def _positional(args: tuple[Any, ...], kwargs: dict[str, Any], *slots: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Operands that came by name, moved to their place; a slot is the names that torch has for one operand."""
    operands, options = list(args), dict(kwargs)
    for slot in slots[len(args) :]:
        name = next((name for name in slot.split() if name in options), None)
        if name is None:
            break
        operands.append(options.pop(name))
    return tuple(operands), options


def _constant(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(*_stop_all(args), **_stop_all(kwargs))


def _norm_part(composite: Composite, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if composite.norm == "gradient":
        raise ValueError(
            f"Composite(norm='gradient') can't reach a norm that is written out in operations "
            f"({opnames.operation_name(func)}): its products would still be shared. Use norm='identity', or "
            "product='gradient' as well"
        )
    return _constant(func, args, kwargs)


def _shared(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A product of all its operands: 1/n for each of n activations."""
    result = func(*args, **kwargs)
    factors = len(activations((args, kwargs)))
    return result if factors < 2 else rules.scale_gradient(result, 1 / factors)


def _product(composite: Composite, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    (a, b), kwargs = _positional(args, kwargs, "input self", "other")
    args = (a, b)
    if not (is_activation(a) and is_activation(b)):
        return copy_mark(a if is_activation(a) else b, func(*args, **kwargs))
    if composite.softmax_temperature != 1 and "weights" in (mark_of(a), mark_of(b)):
        raise ValueError(
            f"Composite(softmax_temperature={composite.softmax_temperature}) is for attention, but a softmax met an "
            "element-wise product, as a router's does, and its backward can't be told from attention's; use 1.0"
        )
    for stops, name in ((composite.router == "stop", "weights"), (composite.product == "stop_gate", "gate")):
        if stops and (mark_of(a) == name) != (mark_of(b) == name):
            return func(rules.stop(a), b) if mark_of(a) == name else func(a, rules.stop(b))
    return rules.scale_gradient(func(*args, **kwargs), 0.5)


def _pair(composite: Composite, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The two factors of q k^T, of weights times values, or of another sum of products, with their shares."""
    query, key, value = composite.qkv
    if composite.attention == "gradient":
        return a, b
    if composite.attention == "value_only" or (query, key, value) == (0.25, 0.25, 0.5):
        return rules.scale_gradient(a, 0.5), rules.scale_gradient(b, 0.5)
    if query != key:
        raise ValueError(
            f"Composite(qkv={composite.qkv}) with different factors for query and key can't reach attention that is "
            'written out as matrix products; use model.set_attn_implementation("sdpa"), or equal factors'
        )
    if "weights" not in (mark_of(a), mark_of(b)):
        return rules.scale_gradient(a, 0.5), rules.scale_gradient(b, 0.5)
    # q k^T gives both one half; the rest of their factor goes on the weights.
    first, second = (2 * query if mark_of(x) == "weights" else value for x in (a, b))
    return rules.scale_gradient(a, first), rules.scale_gradient(b, second)


def _matrix_product(composite: Composite, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if len(args) == 2 and isinstance(args[1], (list, tuple)):  # einsum(equation, operands)
        args = (args[0], *args[1])
    factors = activations((args, kwargs))
    if len(factors) == 1 and composite.linear != Epsilon() and "weights" not in map(mark_of, args):
        return linear_rules.learned_product(func, args, kwargs, composite.linear)
    if composite.attention == "gradient":
        return func(*args, **kwargs)
    if len(factors) != 2 or composite.attention == "value_only" or composite.qkv == (0.25, 0.25, 0.5):
        return _shared(func, args, kwargs)
    shares = dict(zip(map(id, factors), _pair(composite, *factors), strict=True))
    if len(shares) == 1:  # one tensor twice
        return _shared(func, args, kwargs)
    return func(*_swap(args, shares), **_swap(kwargs, shares))


def _swap(value: Any, tensors: Mapping[int, Tensor]) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)([_swap(item, tensors) for item in value])
    if isinstance(value, dict):
        return {key: _swap(item, tensors) for key, item in value.items()}
    return tensors.get(id(value), value)


_SUM_OPERANDS = ("input self", "mat1 batch1 tensor1 vec1 mat", "mat2 batch2 tensor2 vec2 vec")


def _sum_of_product(composite: Composite, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    (summand, a, b, *rest), kwargs = _positional(args, kwargs, *_SUM_OPERANDS)
    pointwise = opnames.operation_name(func).startswith("addcmul")
    if composite.linear != Epsilon() and not pointwise and is_activation(a) != is_activation(b):
        if "weights" not in (mark_of(a), mark_of(b)):
            return linear_rules.sum_of_product(func, (summand, a, b, *rest), kwargs, composite.linear)
    if is_activation(a) and is_activation(b):
        if not pointwise:
            a, b = _pair(composite, a, b)
        elif composite.product != "gradient":
            a, b = rules.scale_gradient(a, 0.5), rules.scale_gradient(b, 0.5)
    return func(summand, a, b, *rest, **kwargs)


def _linear_layer(
    composite: Composite, rule: Epsilon | Gamma, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    (x, weight, *rest), kwargs = _positional(args, kwargs, "input", "weight", "bias")
    if is_activation(weight):
        x, weight = _pair(composite, x, weight) if is_activation(x) else (x, weight)
        return func(x, weight, *rest, **kwargs)
    if rule == Epsilon():
        return linear_rules.with_gradient(func(x, weight, *rest, **kwargs), weight)
    if type(weight) not in (Tensor, torch.nn.Parameter):
        raise linear_rules.unreachable(rule, type(weight).__name__)
    bias = rest.pop(0) if rest else None
    return linear_rules.linear(x, weight, bias, lambda x, w, b: func(x, w, b, *rest, **kwargs), rule)


def _plain(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(*args, **kwargs)


def _keep_weights(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What is put together of softmax weights alone is softmax weights."""
    weights = {mark_of(operand) for operand in activations((args, kwargs))} == {"weights"}
    result = func(*args, **kwargs)
    return mark(result, "weights") if weights else result


def _division(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    args, kwargs = _positional(args, kwargs, "input self")
    return copy_mark(args[0], func(args[0], *_stop_all(args[1:]), **_stop_all(kwargs)))


def _solve(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The matrix is a denominator and so a constant; the solution is linear in the right-hand side."""
    args, kwargs = _positional(args, kwargs, "input self A", "other B")
    return func(_stop_all(args[0]), *args[1:], **kwargs)


def _power(composite: Composite, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    base, exponent = _positional(args, kwargs, "input self", "exponent")[0]
    if isinstance(exponent, Tensor) and exponent.dim() == 0 and not exponent.requires_grad:
        exponent = exponent.item()
    if not is_activation(base) or not isinstance(exponent, (int, float)) or exponent < 1:
        return _constant(func, args, kwargs)
    share = 1.0 if _ends_activation(composite, base) else 1 / float(exponent)
    return copy_mark(base, rules.scale_gradient(func(*args, **kwargs), share))


def _square(composite: Composite, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    args, kwargs = _positional(args, kwargs, "input self")
    share = 1.0 if _ends_activation(composite, args[0]) else 0.5
    return copy_mark(args[0], rules.scale_gradient(func(*args, **kwargs), share))


def _ends_activation(composite: Composite, base: Tensor) -> bool:
    """Whether a power belongs to an activation function, as in relu(x)^2, that is differentiated as a whole."""
    return composite.activation == "gradient" and mark_of(base) == "gate"


def _scalar_sum(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A Python scalar added to an activation makes a gate where the sum is a factor: see lxt.shifted."""
    operands = _positional(args, kwargs, "input self", "other")[0]
    gate = any(isinstance(x, (int, float)) and abs(x) > SMALLEST_GATE_SCALAR for x in operands[:2])
    if gate:
        return mark(func(*args, **kwargs), "shifted")
    result = func(*args, **kwargs)
    return mark(result, "weights") if mark_of(operands[0]) == "weights" and _are_weights(operands[:2]) else result


def _are_weights(operands: Iterable[Any]) -> bool:
    return all(is_activation(x) and mark_of(x) == "weights" for x in operands)


def _scalar_sum_in_place(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    target, other = _positional(args, kwargs, "self", "other")[0][:2]
    if isinstance(other, (int, float)) and abs(other) > SMALLEST_GATE_SCALAR:
        return mark(func(*args, **kwargs), "shifted")
    name = "weights" if _are_weights((target, other)) else None
    return mark(func(*args, **kwargs), name)


def _copy(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    source = args[1] if len(args) > 1 else kwargs.get("src")
    return mark(func(*args, **kwargs), mark_of(source))  # and not that of what was there


def _set_item(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A mark stays where what comes in has it too; softmax weights written into constants are softmax weights."""
    target, _, source = args
    if is_activation(source):
        before = mark_of(target) if is_activation(target) else "weights"
        mark(target, before if mark_of(source) == before else None)
    func(*args, **kwargs)


def _overwrite(target: Tensor, result: Tensor) -> Tensor:
    """`result` in the memory of `target`; a constant leaves no activation behind."""
    constant = not result.requires_grad and target.requires_grad
    if constant and target._is_view():
        # torch can't detach a part: it goes on as a factor that is a constant where another is none
        return mark(target.copy_(result), "shifted")
    if constant:
        target.detach_()
    return mark(target.copy_(result), mark_of(result))


def _gelu(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    approximate = args[1] if len(args) > 1 else kwargs.get("approximate", "none")
    return _closed_form("gelu_tanh" if approximate == "tanh" else "gelu", func, args, kwargs)


def _closed_form(form: str, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, *rest = args if args else (kwargs["input"],)
    options = {key: value for key, value in kwargs.items() if key not in ("input", "inplace")}
    in_place = kwargs.get("inplace") or (rest and rest[0] is True)
    if in_place:
        x, target, rest = x.clone(), x, []
    result = mark(rules.identity(x, lambda x: func(x, *rest, **options), form), "gate")
    return _overwrite(target, result) if in_place else result


def _by_ratio(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    args, kwargs = _positional(args, kwargs, "input self")
    x, rest = args[0], _stop_all(args[1:])
    options = _stop_all({key: value for key, value in kwargs.items() if key != "inplace"})
    at_zero, slope = _near_zero(func, rest, options, x)
    if at_zero:  # a lower bound above 0 and kin
        result = func(rules.stop(x), *rest, **options)
    else:

        def function(x: Tensor) -> Tensor:
            return func(x, *rest, **options)

        dtype = x.dtype
        base = x.clone() if kwargs.get("inplace") else x
        result = rules.identity(base, function, lambda x: ratio(function(x.to(dtype)).to(x.dtype), x, slope))
        # a bound is not an activation: models clamp gate and up alike
        mark(result, mark_of(x) if opnames.operation_name(func) in opnames.BOUNDS else "gate")
    return _overwrite(x, result) if kwargs.get("inplace") else result


def _near_zero(func: Callable, rest: tuple[Any, ...], options: dict[str, Any], x: Tensor) -> tuple[bool, float]:
    """Whether f(0) is something else than 0, and f(x) / x as x rises to 0."""
    if any(isinstance(value, Tensor) for value in (*rest, *options.values())):
        return bool((func(torch.zeros_like(x), *rest, **options) != 0).any()), 1.0
    points = torch.tensor([0.0, -1e-20], dtype=torch.float64)
    at_zero, below = func(points, *rest, **options).tolist()
    return at_zero != 0, below / -1e-20


def _reduction(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Sums, means and selections are linear; a product of what falls together is not."""
    multiplies = any(isinstance(value, str) and value == "prod" for value in (*args, *kwargs.values()))
    return _constant(func, args, kwargs) if multiplies else func(*args, **kwargs)


def _marking_gate(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return mark(func(*args, **kwargs), "gate")


def _softmax(composite: Composite, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if composite.attention == "value_only":
        return mark(_constant(func, args, kwargs), "weights")
    if composite.softmax_temperature == 1:
        return mark(func(*args, **kwargs), "weights")
    named = dict(zip(("input", "dim", "dtype"), args[: 2 + isinstance(args[-1], torch.dtype)], strict=False)) | kwargs
    weights = rules.tempered_softmax(named["input"], named["dim"], named.get("dtype"), composite.softmax_temperature)
    return mark(weights, "weights")


def _layer_norm(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    args, kwargs = _positional(args, kwargs, "input", "normalized_shape", "weight", "bias", "eps")
    kwargs.pop("cudnn_enable", None)
    args = (args[0], tuple(args[1]), *args[2:5]) if len(args) > 1 else args
    _refuse_active_weights("layer_norm", args[2:4])
    return rules.layer_norm(*args, **kwargs)


def _refuse_active_weights(operation: str, weights: Iterable[Any]) -> None:
    if any(map(is_activation, weights)):
        raise ValueError(
            f"{operation} got a weight or bias that depends on the input, which its rule does not share with; apply "
            "them outside: y = norm(x, shape); y * weight + bias"
        )


def _rms_norm(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    named = dict(zip(("input", "normalized_shape", "weight", "eps"), args, strict=False)) | kwargs
    _refuse_active_weights("rms_norm", (named.get("weight"),))
    return rules.rms_norm_function(named["input"], named["normalized_shape"], named.get("weight"), named.get("eps"))


def _group_norm(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    args, kwargs = _positional(args, kwargs, "input", "num_groups", "weight", "bias", "eps")
    kwargs.pop("cudnn_enabled", None)
    _refuse_active_weights("group_norm", args[2:4])
    return rules.group_norm(*args[:5], **kwargs)


def _batch_norm(composite: Composite, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    statistics, affine = ("running_mean", "running_var"), ("weight", "bias")
    first = (*affine, *statistics) if func is torch.batch_norm else (*statistics, *affine)
    names = ("input", *first, "training", "momentum", "eps", "cudnn_enabled")
    named = dict(zip(names, args, strict=False)) | kwargs
    if named.get("training"):
        if composite.norm == "gradient":
            return func(*args, **kwargs)
        raise ValueError(
            "BatchNorm in training mode has no rule: its statistics mix the batch; call model.eval() first"
        )
    _refuse_active_weights("batch_norm", (named.get("weight"), named.get("bias")))
    mean, variance = (named[name] for name in statistics)
    return rules.batch_norm(named["input"], mean, variance, *map(named.get, affine), eps=named.get("eps", 1e-5))


def _grid_sampler(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(args[0], *_stop_all(args[1:]), **_stop_all(kwargs))


def _sdpa(composite: Composite, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return scaled_dot_product_attention(composite, *args, **kwargs)


def _glu(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return rules.glu(*args, **kwargs)


def without_dropout(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The operation as it is, where no gradient is recorded, except that dropout is inactive then too."""
    name = opnames.operation_name(func)
    if name in opnames.DROPOUTS:
        return _no_dropout(func, args, kwargs)
    if name == "scaled_dot_product_attention":
        args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
        kwargs = {key: value for key, value in kwargs.items() if key != "dropout_p"}
    return func(*args, **kwargs)


def _no_dropout(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0] if args else kwargs["input"]
    return (x, torch.ones_like(x, dtype=torch.bool)) if opnames.operation_name(func) == "native_dropout" else x


def _only_activations(handler: Handler) -> Handler:
    """Runs an operation as it is where no operand is an activation."""

    def handle(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for value in args:
            if isinstance(value, Tensor) and value.requires_grad:
                return handler(func, args, kwargs)
        return handler(func, args, kwargs) if activations((args, kwargs)) else func(*args, **kwargs)

    return handle


def _in_place(handler: Handler, out_of_place: Callable) -> Handler:
    """An in-place operation computed out of place, on a copy, then copied back: what was saved stays as it was."""

    def handle(func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = handler(out_of_place, (copy_mark(args[0], args[0].clone()), *args[1:]), kwargs)
        return _overwrite(args[0], result)

    return handle


def handlers(composite: Composite, operations: Mapping[str, str]) -> dict[str, Handler]:
    """Operation name -> handler, for `composite`.

    Args:
        composite: its fields choose the handlers.
        operations: names -> "identity", "product" or "constant", added to the known ones.

    Raises:
        ValueError: an unknown kind in `operations`.
    """
    table: dict[str, Handler] = {}

    def use(names: Any, handler: Handler) -> None:
        table.update(dict.fromkeys(names, handler))

    def use_over(names: Any, wrapped: Callable[[Handler], Handler]) -> None:
        table.update({name: wrapped(table[name]) for name in names if name in table})

    table["scaled_dot_product_attention"] = partial(_sdpa, composite)
    if composite.attention != "gradient" or composite.linear != Epsilon():
        use(opnames.MATRIX_PRODUCTS, partial(_matrix_product, composite))
    if composite.attention != "gradient":
        use(opnames.SOFTMAX, partial(_softmax, composite))
    elif composite.softmax_temperature != 1:
        use(opnames.SOFTMAX, partial(_softmax, composite))
    if composite.attention == "value_only":
        use(("log_softmax",), _constant)
    use(opnames.LINEAR_LAYERS, partial(_linear_layer, composite, composite.convolution or composite.linear))
    table["linear"] = partial(_linear_layer, composite, composite.linear)
    use(opnames.SUMS_OF_PRODUCT, partial(_sum_of_product, composite))
    if composite.product != "gradient":
        use(opnames.PRODUCTS, partial(_product, composite))
        use(opnames.POWERS, partial(_power, composite))
        use(opnames.CONSTANT, _constant)
        use(opnames.DIVISIONS, _division)
        use(opnames.REVERSE_DIVISIONS, _constant)
        use(opnames.SOLVES, _solve)
        use(("scatter_reduce", "index_reduce"), _reduction)
        use(opnames.NORM_PARTS, partial(_norm_part, composite))
        use(opnames.SCALAR_SUMS, _scalar_sum)
        table |= {"square": partial(_square, composite), "glu": _glu, "grid_sampler": _grid_sampler}
    table["batch_norm"] = partial(_batch_norm, composite)
    if composite.norm == "identity":
        use(opnames.NORM_PARTS, _constant)
        table |= {"layer_norm": _layer_norm, "rms_norm": _rms_norm, "group_norm": _group_norm}
    identity = composite.activation == "identity"
    for name, form in opnames.CLOSED_FORMS.items():
        table[name] = partial(_closed_form, form) if identity else _marking_gate
    use(opnames.BY_RATIO, _by_ratio if identity else _marking_gate)
    table["gelu"] = _gelu if identity else _marking_gate

    if composite.product != "gradient":
        use_over(opnames.PRODUCTS | opnames.MATRIX_PRODUCTS | opnames.LINEAR_LAYERS, shifted_is_constant)
        use_over(opnames.SUMS_OF_PRODUCT, partial(shifted_is_constant, summands=1))
        use_over((set(opnames.CLOSED_FORMS) | opnames.BY_RATIO | {"gelu"}) - opnames.BOUNDS, constant_if_shifted)
        use_over(opnames.POWERS | {"square"}, constant_if_shifted)

    kinds: dict[str, Handler] = {"identity": _by_ratio, "product": _shared, "constant": _constant}
    for name, kind in operations.items():
        if kind in kinds:
            table[name] = kinds[kind]
        elif kind != "linear":
            raise ValueError(f"operation {name!r} is declared {kind!r}; allowed: linear, {', '.join(kinds)}")

    table |= {
        name + "_": _in_place(handler, getattr(torch.Tensor, name, None) or getattr(F, name))
        for name, handler in table.items()
        if name not in opnames.SCALAR_SUMS and (hasattr(torch.Tensor, name + "_") or hasattr(F, name))
    }
    table |= {
        name: _in_place(table[base], getattr(torch.Tensor, base))
        for name, base in opnames.IN_PLACE_DUNDERS.items()
        if base in table
    }
    if composite.product != "gradient":
        use(("add_", "__iadd__", "sub_", "__isub__"), _scalar_sum_in_place)
    use(opnames.WEIGHT_KEEPING, _keep_weights)
    if composite.product != "gradient":
        table |= {name: keep_shifted(table.get(name, _plain)) for name in opnames.SHIFT_KEEPING}
    table |= {"copy_": _copy, "__setitem__": _set_item}
    table = {name: _only_activations(handler) for name, handler in table.items()}
    use(opnames.DROPOUTS, _no_dropout)
    return table
