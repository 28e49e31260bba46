"""Relevance inside the model, by names: what there is, where it is, and how one backward gives it."""

from lxt.latents.features import Features
from lxt.latents.kept import Latents
from lxt.latents.layers import residual_layers, streams
from lxt.latents.locating import UnknownPlace, sites
from lxt.latents.names import KINDS, LATENTS, Keep, Kind, alias, wanted
from lxt.latents.sink import Sink, Site
from lxt.latents.taps import capture, hooked
from lxt.latents.values import LatentRelevance, Tokens, joined

__all__ = [
    "KINDS",
    "LATENTS",
    "Features",
    "Keep",
    "Kind",
    "LatentRelevance",
    "Latents",
    "Sink",
    "Site",
    "Tokens",
    "UnknownPlace",
    "alias",
    "capture",
    "hooked",
    "joined",
    "residual_layers",
    "sites",
    "streams",
    "wanted",
]
