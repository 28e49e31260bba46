"""The table of handlers for a composite: operation name -> what runs in its place.

A handler is called as handler(func, args, kwargs) in place of func(*args, **kwargs), with gradients on; marks are
those of lxt.marks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from lxt import carrying, elementwise, normalising, opnames, products
from lxt.composites import Composite, Epsilon
from lxt.operands import Handler, constant, run
from lxt.shifted import constant_if_shifted, keep_shifted, shifted_is_constant

__all__ = ["handlers", "without_dropout"]


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


def handlers(composite: Composite, operations: Mapping[str, str]) -> dict[str, Handler]:
    """Operation name -> handler, for `composite`; but for those of dropout, for operations with an activation.

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

    table["scaled_dot_product_attention"] = partial(products.sdpa, composite)
    if composite.attention != "gradient" or composite.linear != Epsilon():
        use(opnames.MATRIX_PRODUCTS, partial(products.matrix_product, composite))
    if composite.attention != "gradient":
        use(opnames.SOFTMAX, partial(products.softmax, composite))
    elif composite.softmax_temperature != 1:
        use(opnames.SOFTMAX, partial(products.softmax, composite))
    if composite.attention == "value_only":
        use(("log_softmax",), constant)
    use(opnames.LINEAR_LAYERS, partial(products.linear_layer, composite, composite.convolution or composite.linear))
    table["linear"] = partial(products.linear_layer, composite, composite.linear)
    use(opnames.SUMS_OF_PRODUCT, partial(products.sum_of_product, composite))
    if composite.product != "gradient":
        use(opnames.PRODUCTS, partial(products.product, composite))
        use(opnames.POWERS, partial(products.power, composite))
        use(opnames.CONSTANT, constant)
        use(opnames.DIVISIONS, products.division)
        use(opnames.REVERSE_DIVISIONS, constant)
        use(opnames.SOLVES, products.solve)
        use(("scatter_reduce", "index_reduce"), products.reduction)
        use(opnames.NORM_PARTS, partial(normalising.norm_part, composite))
        use(opnames.SCALAR_SUMS, carrying.scalar_sum)
        table |= {
            "square": partial(products.square, composite),
            "glu": products.glu,
            "grid_sampler": products.grid_sampler,
        }
    table["batch_norm"] = partial(normalising.batch_norm, composite)
    if composite.norm == "identity":
        use(opnames.NORM_PARTS, constant)
        table |= {
            "layer_norm": normalising.layer_norm,
            "rms_norm": normalising.rms_norm,
            "group_norm": normalising.group_norm,
        }
    identity = composite.activation == "identity"
    for name, form in opnames.CLOSED_FORMS.items():
        table[name] = partial(elementwise.closed_form, form) if identity else elementwise.marking_gate
    use(opnames.BY_RATIO, elementwise.by_ratio if identity else elementwise.marking_gate)
    table["gelu"] = elementwise.gelu if identity else elementwise.marking_gate

    if composite.product != "gradient":
        use_over(opnames.PRODUCTS | opnames.MATRIX_PRODUCTS | opnames.LINEAR_LAYERS, shifted_is_constant)
        use_over(opnames.SUMS_OF_PRODUCT, partial(shifted_is_constant, summands=1))
        use_over((set(opnames.CLOSED_FORMS) | opnames.BY_RATIO | {"gelu"}) - opnames.BOUNDS, constant_if_shifted)
        use_over(opnames.POWERS | {"square"}, constant_if_shifted)

    kinds: dict[str, Handler] = {"identity": elementwise.by_ratio, "product": products.shared, "constant": constant}
    for name, kind in operations.items():
        if kind in kinds:
            table[name] = kinds[kind]
        elif kind != "linear":
            raise ValueError(f"operation {name!r} is declared {kind!r}; allowed: linear, {', '.join(kinds)}")

    table |= {
        name + "_": carrying.in_place(handler, getattr(torch.Tensor, name, None) or getattr(F, name))
        for name, handler in table.items()
        if name not in opnames.SCALAR_SUMS and (hasattr(torch.Tensor, name + "_") or hasattr(F, name))
    }
    table |= {
        name: carrying.in_place(table[base], getattr(torch.Tensor, base))
        for name, base in opnames.IN_PLACE_DUNDERS.items()
        if base in table
    }
    if composite.product != "gradient":
        use(("add_", "__iadd__", "sub_", "__isub__"), carrying.scalar_sum_in_place)
    use(opnames.WEIGHT_KEEPING, carrying.keep_weights)
    if composite.product != "gradient":
        table |= {name: keep_shifted(table.get(name, run)) for name in opnames.SHIFT_KEEPING}
    table |= {"copy_": carrying.copy, "__setitem__": carrying.set_item}
    use(opnames.DROPOUTS, _no_dropout)
    return table
