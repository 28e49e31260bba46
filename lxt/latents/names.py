"""The names of latents: what there is to ask for, and how it is asked for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches

__all__ = ["ALLOWED", "KINDS", "LATENTS", "Keep", "Kind", "alias", "parts_of", "suggestion", "wanted"]


@dataclass(frozen=True)
class Kind:
    """One kind of latent.

    Attributes:
        name: what it is asked for by.
        parts: what the last dimension counts ("head", "neuron", ...); None where there is one number for each token.
        meaning: what it is, in one line.
        hook: what TransformerLens calls it behind `blocks.<layer>.`; None where it has no such name.
    """

    name: str
    parts: str | None
    meaning: str
    hook: str | None = None


_KINDS = (
    Kind("embed", None, "embedding of a token"),
    Kind("residual", None, "output of a layer", "hook_resid_post"),
    Kind("residual_pre", None, "input of a layer", "hook_resid_pre"),
    Kind("residual_mid", None, "residual stream between a layer's attention and its MLP", "hook_resid_mid"),
    Kind("attn_out", None, "what attention adds to the residual stream", "hook_attn_out"),
    Kind("mlp_out", None, "what the MLP adds to the residual stream", "hook_mlp_out"),
    Kind("head", "head", "one head, before the attention's output projection", "attn.hook_z"),
    Kind("neuron", "neuron", "one neuron, before the MLP's down projection", "mlp.hook_post"),
    Kind("query", "head", "queries of one head, as they enter the product with the keys", "attn.hook_q"),
    Kind("key", "head", "keys of one head, as they enter the product with the queries", "attn.hook_k"),
    Kind("value", "head", "values of one head, as attention weighs them", "attn.hook_v"),
    Kind("pattern", "key", "attention weights of one head, by query and key token", "attn.hook_pattern"),
    Kind("flow", "key", "relevance carried from key to query token"),
    Kind("expert", "expert", "one expert, weighted by its router"),
    Kind("router", "expert", "the logit that the router gives one expert"),
)
KINDS = {kind.name: kind for kind in _KINDS}
LATENTS = tuple(KINDS)

_SYNONYMS = {"residual_post": "residual"}
# A head's relevance is the same before and after the rotation.
_HOOKS = {kind.hook: kind.name for kind in _KINDS if kind.hook} | {"attn.hook_rot_q": "query", "attn.hook_rot_k": "key"}
_OF_A_LAYER = re.compile(r"blocks\.(\d+)\.(.+)")
_BY_LAST = {hook.rpartition(".")[2]: hook for hook in _HOOKS}
_OTHER_HOOKS = {
    "hook_attn_scores": "why a head looked where it did is told by explainer.attribute_attention(prompt, layer, head)",
    "hook_result": "behind its projection a head has the relevance that it has before: ask for 'head'",
    "hook_pre": "neurons are read behind their activation function: ask for 'neuron'",
    "hook_pre_linear": "neurons are read as the product of their two factors: ask for 'neuron'",
}
_AS_TYPED = re.compile(r"(\w+):(\d+)")
_SURELY_A_TYPO = 0.8  # of a latent's name, and no module's: 'heads' is, 'lm_head' isn't

ALLOWED = (
    f"{', '.join(LATENTS)}; names as TransformerLens has them, such as 'blocks.5.attn.hook_z'; and the path of a "
    "module, such as 'model.layers.5.mlp'"
)


@dataclass(frozen=True, init=False)
class Keep:
    """A latent to keep, and how much of it.

    Attributes:
        name: one of LATENTS, or the path of a module, whose output it is.
        top: how many of its parts (heads, neurons, ...) to keep at each token, those of the largest |relevance|; of the
            others only the sum is kept. None is all.
        layers: which layers, counted from 0, or one; None is all.

    Raises:
        ValueError: a `top` or `layers` that can't be.
        TypeError: no name, or no whole numbers.
    """

    name: str
    top: int | None = None
    layers: tuple[int, ...] | None = None

    def __init__(self, name: str, top: int | None = None, layers: int | Iterable[int] | None = None) -> None:
        for field, value in {"name": name, "top": top, "layers": layers}.items():
            object.__setattr__(self, field, value)
        self.__post_init__()

    @property
    def names(self) -> tuple[str, ...]:
        """The latents that come of it: itself, and what belongs to it."""
        return (self.name,)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"a latent is named by a string, got {self.name!r}")
        object.__setattr__(self, "name", _SYNONYMS.get(self.name, self.name))
        if self.top is not None and not _is_whole(self.top):
            raise TypeError(f"top must be a whole number >= 1, or None for all, got {self.top!r}")
        if self.top is not None and self.top < 1:
            raise ValueError(f"top must be a whole number >= 1, or None for all, got {self.top}")
        if self.layers is None:
            return
        given: object = self.layers
        layers = tuple(given) if isinstance(given, Iterable) else (given,)
        if not layers or not all(map(_is_whole, layers)):
            raise TypeError(f"layers must be whole numbers such as (3, 7), or None for all, got {given!r}")
        if min(layers) < 0:
            raise ValueError(f"layers are counted from 0, and none from the end; got {min(layers)}")
        object.__setattr__(self, "layers", tuple(sorted(set(layers))))


def alias(name: str) -> tuple[str, int | None] | None:
    """The kind and layer that TransformerLens calls so; None where it is no such name.

    >>> alias("blocks.5.attn.hook_z"), alias("hook_embed"), alias("neuron")
    (('head', 5), ('embed', None), None)
    """
    if name == "hook_embed":
        return "embed", None
    match = _OF_A_LAYER.fullmatch(name)
    if match is None or match[2] not in _HOOKS:
        return None
    return _HOOKS[match[2]], int(match[1])


def parts_of(name: str) -> str | None:
    """What the last dimension of a latent counts; None where there is one number for each token, as of a module."""
    return KINDS[name].parts if name in KINDS else None


def suggestion(name: str, names: Iterable[str] = LATENTS) -> str:
    """A half sentence with the nearest of the names, empty where none is near."""
    near = get_close_matches(name, list(names), n=1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else ""


def wanted(latents: str | Keep | Sequence[str | Keep]) -> tuple[Keep, ...]:
    """What is asked for, checked as far as that goes without a model: each latent once, with all its layers.

    Raises:
        ValueError: there is no such latent, or one is asked for in two ways.
        TypeError: not names.
    """
    if not isinstance(latents, (str, Keep, Iterable)):
        raise TypeError(f"latents must be names out of {', '.join(LATENTS)}, got {type(latents).__name__}")
    several = (latents,) if isinstance(latents, (str, Keep)) else tuple(latents)
    kept: dict[str, Keep] = {}
    for keep in map(_keep, several):
        kept[keep.name] = _merged(kept[keep.name], keep) if keep.name in kept else keep
    return tuple(kept.values())


def _keep(one: str | Keep) -> Keep:
    keep = one if isinstance(one, Keep) else Keep(one)
    if type(keep) is not Keep:  # it says by itself what it is
        return keep
    meant = alias(keep.name)
    if meant is not None:
        kind, layer = meant
        if layer is not None and keep.layers not in (None, (layer,)):
            raise ValueError(f"{keep.name!r} names its layer; ask for Keep({kind!r}, layers={keep.layers})")
        keep = replace(keep, name=kind, layers=keep.layers if layer is None else (layer,))
    if keep.name not in KINDS:
        _refuse_no_path(keep)
    if keep.top is not None and parts_of(keep.name) is None:
        raise ValueError(
            f"{keep.name!r} is one number for each token, and top={keep.top} chooses among parts; leave it"
        )
    if keep.layers is not None and (keep.name == "embed" or keep.name not in KINDS):
        raise ValueError(f"{keep.name!r} is in no layer, and layers={keep.layers} chooses among them; leave it")
    return keep


def _refuse_no_path(keep: Keep) -> None:
    """Refuse a name that can't be the path of any module; the model knows of others."""
    name = keep.name
    typed = _AS_TYPED.fullmatch(name)
    if typed and typed[1] in KINDS:
        raise ValueError(f"{name!r} is for the command line; here it is lxt.Keep({typed[1]!r}, top={typed[2]})")
    last = name.rpartition(".")[2]
    if last.startswith("hook_"):
        raise ValueError(f"no latent is called {name!r}; {_hook_meant(name, last)}")
    typo = bool(get_close_matches(name, LATENTS, n=1, cutoff=_SURELY_A_TYPO))
    if "." not in name and (not name or typo or keep.top is not None or keep.layers is not None):
        raise ValueError(f"unknown latent {name!r}{suggestion(name) or '.'} Allowed: {ALLOWED}")


def _hook_meant(name: str, last: str) -> str:
    """What to ask for in the place of what TransformerLens may have there."""
    if last in _OTHER_HOOKS:
        return _OTHER_HOOKS[last]
    layer = re.match(r"blocks\.(\d+)\.", name)
    near = get_close_matches(last, _BY_LAST, n=1, cutoff=0.8)
    if near:
        hook = _BY_LAST[near[0]]
        whole = "" if layer else f" (with the layer's number), or {_HOOKS[hook]!r}, which is that of all layers"
        return f"did you mean 'blocks.{layer[1] if layer else 5}.{hook}'{whole}?"
    return f"those of TransformerLens's names that there are: hook_embed, blocks.5. with {', '.join(_HOOKS)}"


def _merged(first: Keep, second: Keep) -> Keep:
    if type(first) is type(second) is not Keep:
        raise ValueError(f"{first.name!r} is asked for twice, as two of {type(first).__name__}; give each a name=")
    if type(first) is not Keep or type(second) is not Keep or first.top != second.top:
        raise ValueError(
            f"{first.name!r} is asked for twice, as {first} and as {second}; ask for it once, with one `top`"
        )
    if first.layers is None or second.layers is None:
        return replace(first, layers=None)
    return replace(first, layers=(*first.layers, *second.layers))


def _is_whole(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)
