"""lxt.declare: say what a function, a module or an operation of yours is to relevance.

Nothing is changed but what is declared, and that only for models that lxt runs: elsewhere it does what it did.
 1. A plain function can't be seen by torch: what comes back is a wrapper, to be called in its place.
 2. A torch.autograd.Function gets an `apply` that knows the rule.
 3. An nn.Module, or a class of them, gets an attribute, which patching reads.
 4. An operation of torch, or one registered with torch.library, is entered by name into the registry of
    lxt.declarations.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import BuiltinFunctionType, MethodDescriptorType
from typing import Any, TypeVar, overload

import torch
from torch import nn
from torch._library.custom_ops import CustomOpDef

from lxt.declarations import ALLOWED, WATCHER, Declaration, attach, declaration_of, register_operation
from lxt.mode import current_mode
from lxt.opnames import KNOWN, MARK_KEEPING, operation_name

__all__ = ["declare", "run_declared"]

Thing = TypeVar("Thing")
Rule = str | Callable[..., Any]
_WRAPPER = "_lxt_wrapper"  # names, on the wrapper of a declared function, the wrapper itself
_SLOTS = {"attention": ("query q query_states", "key k key_states", "value v value_states")}


@overload
def declare(thing: str, rule: None = None) -> Callable[[Thing], Thing]: ...
@overload
def declare(thing: Thing, rule: Rule | None) -> Thing: ...
def declare(thing: Any, rule: Any = ...) -> Any:
    """Declare the rule of something that lxt has none for, or has another for.

    >>> @lxt.declare("attention")  # doctest: +SKIP
    ... def my_attention(query, key, value): ...
    >>> kernels.scan = lxt.declare(kernels.scan, "linear")  # a function of others: hand on what comes back
    >>> lxt.declare(kernels.FusedSwiGLU, "gated")  # a torch.autograd.Function, nn.Module or class: in place
    >>> lxt.declare("my_library_op", "product")  # an operation of torch or of torch.library
    >>> kernels.scan = lxt.declare(kernels.scan, None)  # and undone

    With y the output, J the function's own derivative and c = relevance / activation, the rules are

    ==========  ==========================================  ===================================================
    linear      c_x = J^T c_y                               linear in the input, or a selection of its entries
    identity    c_x = (y / x) c_y                           element-wise, f(0) = 0 (AttnLRP, 2402.05602, eq. 9)
    norm        c_x = (y / x) c_y, which is weight / sigma  RMSNorm and kin (Prop. 3.4); LayerNorm centres: give
                                                            a reference
    product     c_x = J^T c_y / n                           a product of n activations (eq. 7)
    gated       c_gate = (y / gate) c_y / 2,                act(gate) * up, called with (gate, up); under "cp"
                c_up = J^T c_y / 2                          c_gate = 0 and c_up = J^T c_y
    attention   J^T c_y, times 1/4 for query and key, 1/2   softmax(scores(query, key)) value; scores linear in
                for value (eq. 13)                          each: normalise outside. Under "cp" only the value
    constant    c_x = 0                                     the output isn't there because of the input
    a function  that of its operations                      called in its place, with the same arguments and (to
                                                            sqrt(eps)) the same result, whose numbers are kept
    ==========  ==========================================  ===================================================

    Inside the function, no rule but this one holds. The composite's fields have their say: under `gradient`, for
    instance, all but constant are J^T c_y.

    Args:
        thing: what to declare; a rule alone makes a decorator.
        rule: its rule, or None to take it off. A module's reference gets the module first.

    Returns:
        What is to be used from now on: a wrapper for a plain function, else `thing` itself.

    Raises:
        ValueError: no such rule; an operation that has one; parameters that the rule can't find.
        TypeError: not something that can have a rule.
    """
    if rule is ...:
        if not isinstance(thing, str) or thing not in ALLOWED:
            raise TypeError(
                f"lxt.declare(thing, rule) needs both, got {_name_of(thing)} alone; as a decorator it takes a rule: "
                f'@lxt.declare("linear"). Rules: {", ".join(ALLOWED)}, or a function of yours'
            )
        return functools.partial(_declare, rule=thing)
    return _declare(thing, rule)


def _declare(thing: Any, rule: Any) -> Any:
    name = _name_of(thing)
    if rule is not None and not callable(rule) and rule not in ALLOWED:
        raise ValueError(
            f"{name} can't be declared {rule!r}; rules: {', '.join(ALLOWED)}, or a function of yours that computes "
            "the same with torch operations"
        )
    operation = _operation_of(thing)
    if operation is not None:
        if operation in KNOWN | MARK_KEEPING:
            raise ValueError(
                f"{operation!r} has a rule already, for every model; for one model, set it in a patch map: "
                f'lxt.PatchMap(operations={{"{operation}": "linear"}})'
            )
        register_operation(operation, None if rule is None else _declaration(thing, rule, name))
        return thing
    if isinstance(thing, nn.Module) or (isinstance(thing, type) and issubclass(thing, nn.Module)):
        return _declare_module(thing, rule, name)
    if isinstance(thing, type) and issubclass(thing, torch.autograd.Function):
        return _declare_autograd_function(thing, rule, name)
    if isinstance(thing, type) or not callable(thing):
        raise TypeError(
            f"{name} can't have a rule: declare a function, an nn.Module, a class of them, a torch.autograd.Function, "
            "or a torch operation"
        )
    # functools.wraps copies attributes, so a decorator over a wrapper seems to be one
    function = thing.__wrapped__ if getattr(thing, _WRAPPER, None) is thing else thing
    return function if rule is None else _wrapped(function, _declaration(function, rule, name))


def _wrapped(function: Callable, declaration: Declaration) -> Callable:
    @functools.wraps(function)
    def declared(*args: Any, **kwargs: Any) -> Any:
        return run_declared(declaration, function, args, kwargs)

    attach(declared, declaration)
    setattr(declared, _WRAPPER, declared)
    return declared


def run_declared(declaration: Declaration, function: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`function(*args, **kwargs)`, under the declared rule where a patched model runs."""
    watcher, mode = WATCHER.get(), current_mode()
    if watcher is not None:
        return watcher(declaration, function, args, kwargs)
    if mode is None or mode.suspended or not torch.is_grad_enabled():
        return function(*args, **kwargs)
    return mode.declared(declaration, function, args, kwargs)


def _declare_module(module: Any, rule: Any, name: str) -> Any:
    cls = module if isinstance(module, type) else type(module)
    if module is cls and cls.__module__.split(".")[0] == "torch":
        raise ValueError(
            f"{name} is torch's, and every model that has one would follow; declare the instance, as in "
            "lxt.declare(model.layer, rule), or a subclass"
        )
    attach(module, None if rule is None else _declaration(cls.forward, rule, name, skip=1))
    return module


def _declare_autograd_function(function: Any, rule: Any, name: str) -> Any:
    if declaration_of(function) is not None:
        former = getattr(vars(function)["apply"], "former", None)
        if former is None:
            del function.apply
        else:
            function.apply = former
    attach(function, None)
    if rule is None:
        return function
    declaration = _declaration(function.forward, rule, name, skip=not _has_setup_context(function))
    apply: Any = inspect.getattr_static(function, "apply")  # a classmethod, or torch's own of C

    def declared_apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        bound = apply.__get__(None, cls)
        if cls is not function:  # a subclass computes something else
            return bound(*args, **kwargs)
        return run_declared(declaration, bound, args, kwargs)

    function.apply = _DeclaredApply(declared_apply, vars(function).get("apply"))
    attach(function, declaration)
    return function


class _DeclaredApply(classmethod):
    """The `apply` of a declared autograd function, with the one of its own that it had before, if it had one."""

    def __init__(self, declared: Callable, former: Any) -> None:
        super().__init__(declared)
        self.former = former


def _has_setup_context(function: Any) -> bool:
    return function.setup_context is not torch.autograd.function._SingleLevelFunction.setup_context


def _declaration(function: Any, rule: Any, name: str, skip: int = 0) -> Declaration:
    """The declaration of something called like `function`, less the first `skip` parameters."""
    if rule not in ("attention", "gated"):
        return Declaration(rule, name)
    parameters = _parameters(function)[skip:]
    wanted = [choice.split() for choice in _SLOTS["attention"]] if rule == "attention" else []
    slots = [next((p for p in parameters if p.lower() in names), "") for names in wanted] or parameters[:2]
    if "" in slots or len(slots) < 2:
        need = "gate and up, in this order" if rule == "gated" else "query, key and value (or q, k and v)"
        raise ValueError(
            f"{name} is declared {rule!r}, but takes ({', '.join(parameters)}), not {need}; declare a function with "
            "these parameters that calls it, or the one inside it"
        )
    return Declaration(rule, name, tuple(slots), tuple(parameters))


def _parameters(function: Any) -> list[str]:
    """Names of the parameters that may come by position."""
    function = getattr(function, "_opoverload", getattr(function, "default", function))
    if isinstance(function, torch._ops.OpOverload):
        return [argument.name for argument in function._schema.arguments]
    if getattr(function, "__name__", "") == "apply" and isinstance(getattr(function, "__self__", None), type):
        return _parameters(function.__self__.forward)[not _has_setup_context(function.__self__) :]
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _operation_of(thing: Any) -> str | None:
    """The name under which the rules' mode sees it, if it is an operation."""
    if isinstance(thing, str):
        return thing.rpartition("::")[2].rpartition(".")[2]
    if isinstance(thing, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return operation_name(thing)
    if isinstance(thing, CustomOpDef):
        return thing._name
    of_torch = (getattr(thing, "__module__", None) or "torch").split(".")[0] == "torch"
    if isinstance(thing, (BuiltinFunctionType, MethodDescriptorType)) and of_torch:
        return operation_name(thing)
    overridable = of_torch and inspect.isfunction(thing) and thing in torch.overrides.get_testing_overrides()
    return operation_name(thing) if overridable else None


def _name_of(thing: Any) -> str:
    if isinstance(thing, str):
        return repr(thing)
    own = thing if isinstance(thing, type) or not isinstance(thing, nn.Module) else type(thing)
    return str(getattr(own, "__name__", None) or getattr(own, "_name", None) or type(thing).__name__)
