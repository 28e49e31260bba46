"""Attributions for the explorer's tests, and the page's numbers read back."""

from __future__ import annotations

import base64
import json
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lxt.attribution import Attribution, Explained, Prediction
from lxt.latents.values import LatentRelevance
from lxt.neurons.results import Context, Neuron

SENTENCE = [
    "<s>",
    "When",
    " Mary",
    " and",
    " John",
    " went",
    " to",
    " the",
    " store",
    ",",
    " John",
    " gave",
    " a",
    " book",
]
HOSTILE = [
    *("<s>", "<script>alert(1)</script>", "</script><script>alert(1)</script>", "<!--", "-->", "]]>", "&amp;", "\"'`"),
    *("\u202eevil", "\u2066", "\u200b", "\ufeff", "\x00", "\x1b[31m", "\n", "\r\n", "\t", "\ud83d", "\u2028", "\u2029"),
    *(
        "",
        "   ",
        "x" * 5000,
        "שלום",
        "日本語",
        "👨\u200d👩\u200d👧",
        "{{data}}",
        "{{script}}",
        "=1+1",
        "a,b;c",
        "$x_1$",
        "\\u003c",
    ),
]


def attribution(
    tokens: list[str] | None = None,
    rows: int = 1,
    layers: int = 3,
    heads: int = 4,
    neurons: int = 50,
    top: int | None = 6,
    flow: bool = False,
    latents: bool = True,
    model: str = "small",
) -> Attribution:
    """Random numbers of the right shapes: neurons dense, or the `top` at each token; flow with a causal mask."""
    tokens = SENTENCE if tokens is None else tokens
    random = torch.Generator().manual_seed(len(tokens) + rows)
    length = len(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    numbers = tuple(range(layers))
    kept: dict[str, Tensor] = {}
    if latents:
        kept["residual"] = LatentRelevance("residual", normal(layers, rows, length), numbers)
        kept["head"] = LatentRelevance("head", normal(layers, rows, length, heads), numbers)
        kept["neuron"] = LatentRelevance("neuron", normal(layers, rows, length, neurons), numbers)
        if top is not None:
            kept["neuron"] = largest(kept["neuron"], top)
    if flow:
        kept["flow"] = LatentRelevance("flow", normal(layers, rows, heads, length, length).tril(), numbers)
    special = torch.zeros(rows, length, dtype=torch.bool)
    special[:, 0] = tokens[0] == "<s>"
    names = [" Mary", " him", " her", " John", " them"]
    return Attribution(
        tokens=[list(tokens)] * rows,
        token_ids=None,
        relevance=normal(rows, length),
        mask=torch.ones(rows, length, dtype=torch.bool),
        special=special,
        explained=[
            Explained(repr(names[row % 5]), "logit", 14.5 - row, length - 1, rank=row, probability=0.8 / 10**row)
            for row in range(rows)
        ],
        predictions=[Prediction(" Mary", 7, 14.5, 0.8)] * rows,
        model=model,
        rules="attnlrp",
        latents=kept,
        versions={"lxt": "3"},
    )


def largest(latent: LatentRelevance, top: int) -> LatentRelevance:
    """As `Keep(name, top=top)` leaves it."""
    values = latent.values
    indices = values.abs().topk(top, -1).indices
    kept = values.gather(-1, indices)
    rest = values.sum(-1) - kept.sum(-1)
    return LatentRelevance(latent.name, kept, latent.layers, indices.int(), rest, parts=values.shape[-1])


def labels(
    layers: tuple[int, ...] = (0, 1, 2),
    count: int = 50,
    model: str = "small",
    text: str = " cats",
    latent: str = "neuron",
) -> Any:
    """What `lxt.neurons.load` gives, as far as the explorer reads it."""

    def neuron(key: tuple[int, int]) -> Neuron:
        layer, number = key
        context = Context("story 1", 7, 1.25, ("I", " have"), text, (" at", " home"))
        found = {("relevance", "positive"): (context,) * 6, ("relevance", "negative"): ()}
        found |= {("activation", sign): (context,) for sign in ("positive", "negative")}
        zero = {"relevance": 0.0, "activation": 0.0}
        return Neuron(layer, number, found, zero, zero, zero, f"label {layer}:{number}", (), 0.875)

    class Labels:
        by = "relevance"
        manifest = {"settings": {"model_name": model}}  # noqa: RUF012
        tally = SimpleNamespace(tokens=1234)

        def __init__(self) -> None:
            self.layers = list(layers)
            self.latent = latent

        def count(self, layer: int) -> int:
            return count

        def __getitem__(self, key: tuple[int, int]) -> Neuron:
            return neuron(key)

    return Labels()


# ---- the page's numbers


def data_of(page: str) -> dict[str, Any]:
    """The data in a page."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found is not None
    return json.loads(found[1])


def floats(packed: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(packed["data"]), f"<f{packed['bytes']}").astype(np.float64)


def integers(packed: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(packed["data"]), f"<u{packed['bytes']}").astype(np.int64)


def numbers(packed: dict[str, Any]) -> np.ndarray:
    """[series, number], as the page's script reads them."""
    steps = np.frombuffer(base64.b64decode(packed["data"]), "<i2").reshape(packed["shape"])
    scale = floats(packed["scale"])
    return np.where(steps == -32768, np.nan, steps * scale[:, None])
