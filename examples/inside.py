"""What goes on inside the model, in four pictures.

The bundled model continues "My cats love to play with my" by " dogs", which it read eight tokens earlier. One backward
says how that word came to the end of the sentence:

1. layers x tokens: after which layer the relevance is at which token.
2. layers x heads: the heads that brought it there.
3. attention weighted by relevance: from which token to which.
4. the strongest neurons of each layer.
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers.utils import logging

import lxt

TEXT = "I have 5 cats and 3 dogs. My cats love to play with my"


def main(folder: str = "out") -> None:
    out = Path(folder)
    logging.disable_progress_bar()  # the weights are there in a blink
    explainer = lxt.load("tiny")
    inside = explainer.attribute(TEXT, latents=("residual", "head", "neuron", "flow"))

    inside.plot(out / "layers.png")
    inside.plot_heads(out / "heads.png")
    inside.plot_attention(out / "attention.png", top=3)
    inside.plot_neurons(out / "neurons.png", top=4)

    scores = inside.latents["head"].by_part()[:, 0]  # [layer, head], in logits
    layer, head = divmod(int(scores.argmax()), scores.shape[1])
    flow = inside.latents["flow"].values[layer, 0, head]  # [query, key]
    query, key = divmod(int(flow.argmax()), flow.shape[1])
    tokens = inside.tokens[0]
    print(f"L{layer}H{head} brings most: {scores.max():+.2f} logits, mostly from {tokens[key]!r} to {tokens[query]!r}")
    print(f"written: layers.png, heads.png, attention.png and neurons.png in {out}")


if __name__ == "__main__":
    main(*sys.argv[1:])
