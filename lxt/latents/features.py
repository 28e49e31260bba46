"""Relevance of the features of a sparse autoencoder or transcoder, at one place of the model.

It encodes an activation x into features f and decodes those to ŷ, which should be what the model has at the place y
(x itself for an autoencoder). The model goes on with y, and as y = ŷ + (y - ŷ), its coefficient c_y is that of all
three. When it arrives in the backward:

    R(f_i)    = f_i ∂(c_y · decode(f)) / ∂f_i      for a linear decoder f_i (c_y · W_i), W_i its row
    R(error)  = c_y · (y - ŷ)
    R(bias)   = c_y · ŷ - Σ R(f_i)                 for a linear decoder c_y · b

These add up to the relevance of y. Nothing in the model changes: not y, nor what goes on to the layers below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lxt.coefficients import wide
from lxt.latents.adding import Reading, added, carried
from lxt.latents.hooking import hooked
from lxt.latents.names import LATENTS, Keep, alias, wanted
from lxt.latents.reading import reading
from lxt.latents.sink import Sink, Site

__all__ = ["Features", "on_features"]

_ENDS = ("output", "input", "branch")


@dataclass(frozen=True, eq=False, init=False)
class Features(Keep):
    """The features of a sparse autoencoder or transcoder, as a latent to keep.

    >>> explainer.attribute(prompt, latents=("residual", lxt.Features(sae, at="residual", layer=6)))  # doctest: +SKIP

    The result has three latents of it: under its name [1, batch, token, feature], under `<name>.error` what it doesn't
    reconstruct and under `<name>.bias` what is there without any feature, [1, batch, token]. Together they are the
    relevance of the place.

    Args:
        sae: anything with `encode(x)`, [batch, token, hidden] -> [batch, token, feature], and `decode(features)` back,
            as SAELens has them. It runs where it is and in its own dtype, that of its first parameter: activations are
            brought there.
        at: what is reconstructed: a latent ("residual", "mlp_out", ...), its TransformerLens name, or the path of a
            module, whose output it is; "mlp" is a transcoder's: it reads the MLP's input and writes its output. None
            is the name that the object's own `cfg` has, as those of SAELens do.
        layer: of the latent; None where the name or path says it.
        name: by which the result has it.
        top: how many features to keep at each token, those of the largest |relevance|; None is all.
        reads: the path of the module whose input is encoded, where that isn't what is reconstructed.

    Raises:
        TypeError: an object that can't encode and decode.
        ValueError: a place or a name that can't be.
    """

    sae: Any
    at: str
    reads: str | None

    def __init__(
        self,
        sae: Any,
        at: str | None = None,
        layer: int | None = None,
        name: str = "sae",
        top: int | None = 20,
        reads: str | None = None,
    ) -> None:
        if not (callable(getattr(sae, "encode", None)) and callable(getattr(sae, "decode", None))):
            raise TypeError(
                f"Features needs an object with encode(x) and decode(features), as SAELens has them, got "
                f"{type(sae).__name__}"
            )
        if not isinstance(name, str) or not name or name in LATENTS:
            raise ValueError(f"name={name!r} of Features must be a text that is no latent's: {', '.join(LATENTS)}")
        place, own_layer = _own_place(sae) if at is None else (at, None)
        layer = own_layer if layer is None else layer
        if not isinstance(place, str) or not place:
            raise ValueError(
                f"Features needs at=, the place that {type(sae).__name__} reconstructs, such as at='residual', layer=6"
                f"; its cfg has no hook_name"
            )
        fields = {"name": name, "top": top, "layers": None if layer is None else (layer,)}
        for field, value in {**fields, "sae": sae, "at": place, "reads": reads}.items():
            object.__setattr__(self, field, value)
        self.__post_init__()

    @property
    def names(self) -> tuple[str, ...]:
        """The features, what they miss, and what is there without them."""
        return self.name, f"{self.name}.error", f"{self.name}.bias"

    def site(self, sites: Callable[[Sequence[Keep]], list[Site]]) -> Site:
        """Where it is, by what finds the sites of a model's other latents.

        Raises:
            ValueError: there is no such place, or there are several.
        """
        transcodes = self.at == "mlp" and self.reads is None
        at = self._only(sites, "mlp_out" if self.at == "mlp" else self.at, self.layers)
        if transcodes and isinstance(getattr(at.module, "weight", None), Tensor):
            raise ValueError(
                f"Features {self.name!r} transcode an MLP, and that of layer {at.layer} is no module of its own; give "
                "at='mlp_out' and reads=, the path of the module whose input is encoded"
            )
        read = at
        if transcodes:
            read = replace(at, end="input")
        elif self.reads is not None:
            read = replace(self._only(sites, self.reads, None), end="input")
        return Site(self.name, at.layer, at.module, "features", at.heads, (read, at))

    def _only(self, sites: Callable[[Sequence[Keep]], list[Site]], place: str, layers: tuple[int, ...] | None) -> Site:
        found = sites(wanted(Keep(place, layers=layers)))
        if len(found) > 1:
            raise ValueError(
                f"Features {self.name!r} is at {place!r}, which the model has in {len(found)} layers; give layer= too"
            )
        if not found or found[0].end not in _ENDS or len(found[0].of) > 1:  # a sum is read from several
            raise ValueError(
                f"Features {self.name!r} is at {place!r}, which is no module's input or output; give the path of one"
            )
        return found[0]


def _own_place(sae: Any) -> tuple[str | None, int | None]:
    """What SAELens writes into its objects: the TransformerLens name of the place that they reconstruct."""
    cfg = getattr(sae, "cfg", None)
    for about in (getattr(cfg, "metadata", None), cfg):
        read, written = (getattr(about, key, None) for key in ("hook_name", "hook_name_out"))
        if isinstance(written, str) and written and written != read:
            kind, layer = alias(written) or (written, None)
            return ("mlp", layer) if kind == "mlp_out" else (written, None)
        if isinstance(read, str) and read:
            return read, None
    return None, None


def on_features(sites: Sequence[Site], sink: Sink, shape: torch.Size) -> AbstractContextManager[Any]:
    """The Reader of Features."""
    undo = ExitStack()
    for site in sites:
        undo.enter_context(_Taps(site, sink, shape).placed())
    return undo


class _Taps:
    """The hooks of one Features."""

    def __init__(self, site: Site, sink: Sink, shape: torch.Size) -> None:
        self._site, self._sink, self._shape = site, sink, shape
        self._read, self._at = site.of
        self._given: Tensor | None = None

    @contextmanager
    def placed(self) -> Iterator[None]:
        with ExitStack() as undo:
            if self._read != self._at:
                undo.enter_context(hooked(self._read, self._encoded))
            if self._at.end == "branch":
                for handle in added(self._at, self._reached):
                    undo.callback(handle.remove)
            else:
                undo.enter_context(hooked(self._at, carried(partial(self._reached, current=Reading()))))
            yield

    def _encoded(self, x: Tensor) -> Tensor:
        self._given = x.detach().clone()  # in some models sums are written into what modules get and give
        return x

    def _reached(self, y: Tensor, current: Reading) -> Tensor:
        if not (torch.is_grad_enabled() and y.requires_grad):
            return y
        self._site.refuse_other_tokens(y, self._shape)
        if self._read != self._at and self._given is None:
            raise ValueError(
                f"{self._site.latent!r} encodes what {type(self._read.module).__name__} is given, which runs after "
                f"{type(self._at.module).__name__}, whose output it reconstructs; were they exchanged?"
            )
        x = y if self._given is None else self._given
        write = partial(_write, self._site, self._sink, object(), self._shape)

        def read(c_y: Tensor, x: Tensor, y: Tensor) -> None:
            if current.live:
                write(c_y, x, y)

        return reading(y, (x, y), read, written_into=True)


def _write(site: Site, sink: Sink, owner: object, shape: torch.Size, c_y: Tensor, x: Tensor, y: Tensor) -> None:
    features = sink.keeps[site.latent]
    assert isinstance(features, Features)
    heads = site.heads if getattr(features.sae, "hook_z_reshaping_mode", False) else None
    x, y, c_y = (_shaped(tensor, shape, heads) for tensor in (x, y, c_y))
    own = next(features.sae.parameters(), None) if isinstance(features.sae, nn.Module) else None
    if own is not None:
        x, y, c_y = x.to(own.device, own.dtype), y.to(own.device), c_y.to(own.device)
    found, decoded = _coded(features, x)
    if decoded.shape != y.shape or found.shape[:2] != shape:
        raise ValueError(
            f"{type(features.sae).__name__} turns {tuple(x.shape)} into features {tuple(found.shape)} and those into "
            f"{tuple(decoded.shape)}, but what {features.at!r} has is {tuple(y.shape)}: it was made for another place "
            "or model"
        )
    if not decoded.requires_grad:
        raise ValueError(
            f"{type(features.sae).__name__}.decode gives no gradient of the features; let it run without no_grad"
        )
    (c_found,) = torch.autograd.grad(decoded, found, c_y.to(decoded.dtype))
    dtype = wide(y.dtype)
    found, c_found, decoded, y, c_y = (tensor.detach().to(dtype) for tensor in (found, c_found, decoded, y, c_y))
    relevance = found * c_found
    error = ((y - decoded) * c_y).flatten(2).sum(-1)
    bias = (decoded * c_y).flatten(2).sum(-1) - relevance.sum(-1)
    for name, value in zip(features.names, (relevance, error, bias), strict=True):
        sink.write(replace(site, latent=name), owner, value)


def _coded(features: Features, x: Tensor) -> tuple[Tensor, Tensor]:
    """The features of `x`, and what is decoded from them, with a graph between the two."""
    try:
        with torch.no_grad():
            found = features.sae.encode(x)
            found = (found if found.layout == torch.strided else found.to_dense()).detach()
        with torch.enable_grad():
            return found, features.sae.decode(found.requires_grad_())
    except RuntimeError as error:  # torch's, of shapes that don't go together
        raise ValueError(
            f"{type(features.sae).__name__} fails on what {features.reads or features.at!r} has, {tuple(x.shape)}: it "
            f"was made for another place or model ({error})"
        ) from error


def _shaped(tensor: Tensor, shape: torch.Size, heads: int | None) -> Tensor:
    """[batch, token, hidden]; or [batch, token, head, d_head] for what wants heads apart."""
    tensor = tensor.reshape(*shape, -1)
    return tensor if heads is None else tensor.unflatten(-1, (heads, -1))
