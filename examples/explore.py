"""One page to look around in: why the bundled model continues a sentence so, down to what its neurons stand for.

1. Relevance of its five likeliest next words is read at every layer, head and neuron, and from token to token.
2. A small corpus of stories names the neurons of two layers: each by the places where it matters most.
3. Both go into out/explorer.html, which needs no network. Open it and follow the strongest head of the first word.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

from transformers.utils import logging

import lxt
from lxt.tiny.stories import story

TEXT = "I have 5 cats and 3 dogs. My cats love to play with my"
STORIES = 150


def main(path: Path = Path("out/explorer.html")) -> None:
    logging.disable_progress_bar()  # the weights are there in a blink
    explainer = lxt.load("tiny")
    latents = ("residual", "head", "flow", lxt.Keep("neuron", top=20))
    out = explainer.attribute_targets(TEXT, top=5, latents=latents)

    random = Random(0)
    corpus = [story(random) for _ in range(STORIES)]
    labels = lxt.neurons.label(explainer, corpus, layers=[1, 2], top=10, length=64)

    out.explore(path, labels=labels)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
