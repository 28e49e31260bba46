"""monkey_patch: put a model under a composite's rules, and take it out again.

1. Each module with a fused forward, each activation written in several operations, and each module that somebody
   may call by itself gets a `forward` of its own.
2. The outermost of them that is called enters RuleMode, makes the parameters constants and the model still (no
   dropped layers), and has checkpointed functions enter the mode again when the backward recomputes them.
3. When it returns, the graph is searched for autograd functions that the mode can't see.
4. `PatchHandle.remove` puts every `forward` back.
"""

from __future__ import annotations

import functools
import sys
import threading
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import nn

from lxt.attention import SEEN_BY_THE_MODE
from lxt.compiling import PATCHES, call_eagerly, eager_caller, hooks_of, is_compiled, make_uncompiled, uncompiled
from lxt.composites import Composite, resolve
from lxt.declarations import Declaration, declaration_of
from lxt.declaring import run_declared
from lxt.graph import refuse_foreign_functions
from lxt.holds import Holds, make_constant, make_still, parts_of
from lxt.interfaces import rewired_forward, uses_interface
from lxt.marks import activations
from lxt.mode import RuleMode, checkpoint_hook, recomputable, same_stack, suspended
from lxt.patches import fence_for, patch_map_for
from lxt.patchmap import PatchMap
from lxt.preconditions import attention_names, refuse_what_has_no_rule
from lxt.recurrences import recurrent_forward
from lxt.swapping import has_class_forward, swap_class_forward, swap_forward

__all__ = ["ModeFactory", "PatchHandle", "monkey_patch", "patch_model", "rules_of"]

PLAIN_LAYERS = (nn.Linear, nn.Embedding, nn.Dropout, nn.Identity, nn.ModuleList, nn.ModuleDict)
ModeFactory = Callable[[Composite, Mapping[str, str]], RuleMode]

_RUNNING: ContextVar[object | None] = ContextVar("lxt_running", default=None)
# The one registry: which patch a module, or a transformers modeling module, belongs to. Weak on both sides, so that a
# model that is dropped while patched is freed.
_OWNERS: weakref.WeakKeyDictionary[Any, weakref.ref[_Patch]] = weakref.WeakKeyDictionary()
_OWNERS_LOCK = threading.RLock()


def monkey_patch(
    target: nn.Module | ModuleType,
    rules: str | Composite = "attnlrp",
    patch_map: PatchMap | None = None,
    verbose: bool = False,
) -> PatchHandle:
    """Put a model under the rules: one forward and one backward then give activation * gradient = relevance.

    Logits stay what they were. Parameters are constants while the model runs, dropout is inactive, and other models
    in the process are not touched.

    Args:
        target: a model, or a transformers modeling module (`transformers.models.llama.modeling_llama`): then every
            model of the classes defined there, made before or after.
        rules: "attnlrp", "cp", "gradient", or a Composite. Patching again switches the rules.
        patch_map: fused forwards and declared operations; by default those of the target's architecture.
        verbose: print what is patched.

    Returns:
        A handle: `.remove()` takes the rules off again, as leaving its `with` block does.

    Raises:
        TypeError: `target` is neither a model nor a module with model classes.
        ValueError: unknown rules; a part of an already patched model; weights on the meta device; an attention
            implementation or hub kernels without rules.
    """
    composite = resolve(rules)
    if patch_map is not None and not isinstance(patch_map, PatchMap):
        raise TypeError(f"patch_map must be an lxt.PatchMap, got {type(patch_map).__name__}; see lxt.patches")
    if patch_map is not None and patch_map.rules is not None:
        if rules not in ("attnlrp", patch_map.rules.name, patch_map.rules):
            raise ValueError(
                f"patch_map is made for the rules {patch_map.rules.name!r}, but rules={composite.name!r} was asked "
                "for; leave one of them out"
            )
        composite = patch_map.rules
    if isinstance(target, nn.Module):
        handle = patch_model(target, composite, patch_map)
    elif isinstance(target, ModuleType):
        handle = PatchHandle(target, functools.partial(_ClassesPatch, target, composite, patch_map))
    else:
        raise TypeError(
            f"monkey_patch takes a model (torch.nn.Module) or a transformers modeling module, got "
            f"{type(target).__name__}: pass the loaded model, not its name"
        )
    if verbose:
        print(handle.describe())
    return handle


def patch_model(
    model: nn.Module, composite: Composite, patch_map: PatchMap | None = None, mode: ModeFactory = RuleMode
) -> PatchHandle:
    """monkey_patch for a model instance, with a mode of the caller's: one that also keeps account, for instance."""
    return PatchHandle(model, functools.partial(_patch_of, weakref.ref(model), composite, patch_map, mode))


def rules_of(model: nn.Module) -> Composite | None:
    """The composite that the model is patched with at the moment, if it is."""
    owner = _owner(model) or _owner(sys.modules.get(type(model).__module__))
    return None if owner is None else owner.composite


class PatchHandle:
    """What monkey_patch returns: removes the rules, by `remove()` or at the end of a `with` block.

    `with` blocks nest: at the end of an inner one, the rules of the outer one are in force again.
    """

    def __init__(self, target: nn.Module | ModuleType, make: Callable[[], _Patch]) -> None:
        with _OWNERS_LOCK:
            outer = _owner(target)
            self._outer = outer.handle() if outer is not None else None
            self._make, self._entered = make, False
            self._start()

    def _start(self) -> None:
        self._patch = self._make()
        self._patch.handle = weakref.ref(self)

    @property
    def rules(self) -> Composite:
        """The composite in force."""
        return self._patch.composite

    @property
    def active(self) -> bool:
        """False after `remove()`, or after the target was patched again with other rules."""
        return self._patch.active

    def remove(self) -> None:
        """Put every forward back as it was; harmless when done twice."""
        with _OWNERS_LOCK:
            self._patch.remove()

    def describe(self) -> str:
        """One line: what is patched, under which rules, and how much of it has a fused forward."""
        return self._patch.describe()

    def __enter__(self) -> PatchHandle:
        self._entered = True
        return self

    def __exit__(self, *exception: object) -> None:
        with _OWNERS_LOCK:
            was_active, self._entered = self.active, False
            self.remove()
            if was_active and self._outer is not None and self._outer._entered:
                self._outer._start()

    def __repr__(self) -> str:
        return f"<PatchHandle: {self.describe()}{'' if self.active else ' (removed)'}>"


class _Patch:
    """Common to both kinds of target: a composite, and how to undo."""

    def __init__(self, composite: Composite) -> None:
        self.composite = composite
        self.active = True
        self.handle: Callable[[], PatchHandle | None] = lambda: None
        self._undo = ExitStack()

    def remove(self) -> None:
        self.active = False
        self._undo.close()

    def describe(self) -> str:
        raise NotImplementedError


def _patch_of(
    model: Callable[[], nn.Module | None], composite: Composite, patch_map: PatchMap | None, mode: ModeFactory
) -> _ModelPatch:
    target = model()
    if target is None:
        raise ReferenceError("the model of this handle is gone")
    _release(target)
    return _ModelPatch(target, composite, patch_map, mode)


class _ModelPatch(_Patch):
    """The rules on one model instance."""

    def __init__(
        self, model: nn.Module, composite: Composite, patch_map: PatchMap | None, mode: ModeFactory = RuleMode
    ) -> None:
        super().__init__(composite)
        refuse_what_has_no_rule(model)
        self._rewire = bool(attention_names(model) - set(SEEN_BY_THE_MODE))
        self._model = weakref.ref(model)
        self._map = patch_map_for(model) if patch_map is None else patch_map
        self._mode = functools.partial(mode, composite, self._map.operations)
        self._mode()  # a wrong declaration fails here and not in the first forward
        self._holds, self._still, self._compiled = Holds(), Holds(), Holds()
        self.fused: dict[str, int] = {}
        self.name = uuid.uuid4().hex  # to compiled graphs, with all that they need to know:
        self.entries: list[tuple[Callable[[], nn.Module | None], Callable]] = []
        self.why_eager: str | None = None
        self.traces_own = False
        self.hooks = hooks_of(model.modules())
        PATCHES[self.name] = self
        try:
            for module in model.modules():
                self._patch_module(module, is_target=module is model)
                _own(module, self)
        except BaseException:
            self.remove()
            raise

    def describe(self) -> str:
        model = self._model()
        fused = ", ".join(f"{count} × {name}" for name, count in self.fused.items()) or "the operator mode alone"
        return f"{type(model).__name__} under {self.composite.name!r}: {fused}"

    def _patch_module(self, module: nn.Module, is_target: bool) -> None:
        name = type(module).__name__
        if is_compiled(module):
            self._undo.callback(swap_forward(module, lambda _: _call_uncompiled))
        declaration = declaration_of(module)
        if declaration is not None:
            self._undo.callback(swap_forward(module, self._declared(declaration)))
            self.fused[f"{name} as declared"] = self.fused.get(f"{name} as declared", 0) + 1
            self._let_enter(module, is_target)
            return
        factory = self._map.forwards.get(name) if _is_own(module) else None
        if factory is None and has_class_forward(module):
            factory = fence_for(module)
        forward = factory(module, self.composite) if factory else None
        if forward is None and self._rewire and uses_interface(module):
            forward = rewired_forward(module, self.composite)
        if forward is None and _is_own(module):
            forward = recurrent_forward(module, self.composite)
        if forward is not None:
            self._undo.callback(swap_forward(module, self._fused(forward, type(module).forward)))
            self.fused[name] = self.fused.get(name, 0) + 1
        self._let_enter(module, is_target)

    def _let_enter(self, module: nn.Module, is_target: bool) -> None:
        if is_target or _is_entry(module):
            self._undo.callback(swap_forward(module, functools.partial(self._entry, weakref.ref(module))))

    def _declared(self, declaration: Declaration) -> Callable[[Callable], Callable]:
        rule = declaration.rule

        def make(previous: Callable) -> Callable:
            def declared_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
                own = functools.partial(previous, module)
                if not self.active:
                    return own(*args, **kwargs)
                mine = replace(declaration, rule=functools.partial(rule, module)) if callable(rule) else declaration
                return run_declared(mine, own, args, kwargs)

            return declared_forward

        return make

    def _fused(self, forward: Callable, known: Callable) -> Callable[[Callable], Callable]:
        def make(previous: Callable) -> Callable:
            def fused_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
                fits = type(module).forward is known  # and nobody has replaced it since
                if fits and self.active and torch.is_grad_enabled() and not suspended():
                    return forward(module, *args, **kwargs)
                return previous(module, *args, **kwargs)

            return fused_forward

        return make

    def _entry(self, home: Callable[[], nn.Module | None], previous: Callable) -> Callable:
        number = str(len(self.entries))
        self.entries.append((home, previous))

        def entered_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if not self.active:
                return previous(module, *args, **kwargs)
            if torch.compiler.is_dynamo_compiling():
                return self._in_graph(number, module, previous, args, kwargs)
            if _RUNNING.get() is None:
                return call_eagerly(self.run, module, previous, args, kwargs)
            if checkpoint_hook() is None:
                return previous(module, *args, **kwargs)
            with recomputable():
                return previous(module, *args, **kwargs)

        return entered_forward

    def _in_graph(
        self, number: str, module: nn.Module, previous: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        from lxt.onegraph import forward_in_graph, plain_in_graph  # loads the compiler

        if self.traces_own:
            return previous(module, *args, **kwargs)
        if torch.is_grad_enabled():
            return forward_in_graph(self, number, module, previous, args, kwargs)
        return plain_in_graph(self, module, previous, args, kwargs)

    def run(self, module: nn.Module, forward: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`forward(module, *args, **kwargs)` under the rules, as the outermost forward."""
        with self._running(module) as mode:
            mode.explained = frozenset(map(id, activations((args, kwargs))))
            output = forward(module, *args, **kwargs)
        if torch.is_grad_enabled():
            refuse_foreign_functions(output, (args, kwargs), self._map.operations, mode.approved, self.composite.linear)
        return output

    @contextmanager
    def _running(self, module: nn.Module) -> Iterator[RuleMode]:
        token = _RUNNING.set(self)
        modules, parameters = parts_of(module)
        compiled = [part for part in modules if "_compiled_call_impl" in part.__dict__]
        checkpointing = [part for part in modules if "_gradient_checkpointing_func" in part.__dict__]
        if not torch.is_grad_enabled():
            # Nothing needs constants, and torch's choice of kernels would see the difference.
            parameters, checkpointing = [], []
        try:
            with (
                self._holds.hold(parameters, make_constant),
                self._still.hold(modules, make_still),
                self._compiled.hold(compiled, make_uncompiled),
                self._holds.hold(checkpointing, self._checkpoint_under_rules),
                same_stack(),
                self._mode() as mode,
            ):
                yield mode
        finally:
            _RUNNING.reset(token)

    def _checkpoint_under_rules(self, module: nn.Module) -> Callable[[], None] | None:
        """What the module checkpoints enters the mode again when the backward recomputes it."""
        checkpoint = module.__dict__.get("_gradient_checkpointing_func")
        if checkpoint is None or not getattr(module, "gradient_checkpointing", False):
            return None
        if getattr(checkpoint, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                "reentrant gradient checkpointing recomputes outside the rules and is silently wrong; use "
                'model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})'
            )

        def under_rules(function: Callable, *args: Any, **kwargs: Any) -> Any:
            def recomputed(*args: Any, **kwargs: Any) -> Any:
                if not self.active:
                    raise RuntimeError(
                        "the rules were removed or switched between this forward and its backward; with gradient "
                        "checkpointing the backward runs layers again: call backward() before handle.remove()"
                    )
                with recomputable() if _RUNNING.get() is not None else self._running(module):
                    return function(*args, **kwargs)

            return checkpoint(recomputed, *args, **kwargs)

        module.__dict__["_gradient_checkpointing_func"] = under_rules
        return functools.partial(module.__dict__.__setitem__, "_gradient_checkpointing_func", checkpoint)


class _ClassesPatch(_Patch):
    """The rules on every model of the classes of a modeling module: each instance is patched when first called."""

    def __init__(self, module: ModuleType, composite: Composite, patch_map: PatchMap | None) -> None:
        super().__init__(composite)
        self._name, self._map = module.__name__, patch_map
        RuleMode(composite, patch_map.operations if patch_map else {})  # a wrong declaration fails here
        classes = _model_classes(module)
        if not classes:
            raise TypeError(f"module {module.__name__!r} defines no model class; pass a modeling module or a model")
        previous = _owner(module)
        if previous is not None:
            previous.remove()
        for cls in classes:
            for name in ("forward", "__call__"):  # under accelerate's hooks an instance keeps the forward of before
                self._undo.callback(swap_class_forward(cls, self._entry, name))
        self.classes = [cls.__name__ for cls in classes]
        _own(module, self)

    def describe(self) -> str:
        return f"{self._name} under {self.composite.name!r}: {', '.join(self.classes)}"

    def _entry(self, previous: Callable) -> Callable:
        untraced = eager_caller()

        def entered_forward(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if not self.active:
                return previous(model, *args, **kwargs)
            if torch.compiler.is_dynamo_compiling():
                return untraced(entered_forward, model, *args, **kwargs)
            if _RUNNING.get() is not None:
                return previous(model, *args, **kwargs)
            return call_eagerly(self._adopt(model).run, model, previous, args, kwargs)

        return entered_forward

    def _adopt(self, model: nn.Module) -> _ModelPatch:
        with _OWNERS_LOCK:
            owner = _owner(model)
            if isinstance(owner, _ModelPatch):
                return owner
            patch = _ModelPatch(model, self.composite, self._map)
            self._undo.callback(_remove_if_alive, weakref.ref(patch))
            return patch


def _call_uncompiled(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return uncompiled(module)(*args, **kwargs)


def _own(module: Any, patch: _Patch) -> None:
    """Enter `module` into the registry, until `patch` is removed."""
    _OWNERS[module] = weakref.ref(patch)
    patch._undo.callback(_OWNERS.pop, module, None)


def _owner(module: Any) -> _Patch | None:
    reference = _OWNERS.get(module)
    return None if reference is None else reference()


def _remove_if_alive(reference: weakref.ref[_Patch]) -> None:
    patch = reference()
    if patch is not None:
        patch.remove()


def _release(target: nn.Module) -> None:
    """Take off what already patches exactly this model; refuse a part of a patched one."""
    for module in target.modules():
        owner = _owner(module)
        if not isinstance(owner, _ModelPatch):
            continue
        if owner._model() is not target:
            raise ValueError(
                f"{type(target).__name__} shares modules with a patched {type(owner._model()).__name__}: "
                "remove that patch first"
            )
        owner.remove()
        return


def _is_own(module: nn.Module) -> bool:
    """Whether the forward is its class's own: one that a user or a kernel library put there is left to the mode."""
    return has_class_forward(module) and type(module).forward.__module__ == type(module).__module__


def _is_entry(module: nn.Module) -> bool:
    """Whether somebody may call it by itself: all but containers, and layers whose plain gradient is the rule."""
    return type(module).forward is not nn.Module.forward and not isinstance(module, PLAIN_LAYERS)


def _model_classes(module: ModuleType) -> list[type[nn.Module]]:
    """The pretrained-model classes defined in the module; where it has none, its outermost nn.Modules."""
    classes = [
        cls
        for cls in vars(module).values()
        if isinstance(cls, type) and issubclass(cls, nn.Module) and cls.__module__ == module.__name__
    ]
    pretrained = [cls for cls in classes if any(base.__name__ == "PreTrainedModel" for base in cls.__mro__)]
    return [cls for cls in pretrained or classes if cls.forward is not nn.Module.forward]
